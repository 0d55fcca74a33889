"""YAML with line numbers. Knows nothing of the config's sections."""

import re
from typing import Any

import yaml

from qlora_core.errors import ConfigError

Location = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """Safe YAML in which `1e-4` is a number, as in YAML 1.2 and everywhere else people write it."""


_Loader.yaml_implicit_resolvers = {
    first: list(resolvers) for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def parse_value(text: str) -> Any:
    """One YAML value, as given after `--set key=`."""
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - a subclass of SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(f"--set value {text!r} is not valid YAML: {_problem(error)}") from error


def parse_document(text: str, name: str) -> tuple[Any, dict[Location, int]]:
    """The document's value and, for every key and list item, the line it stands on (from 1).

    An empty document is None. A key given twice in one mapping is an error: YAML would drop the first silently.
    """
    try:
        node = yaml.compose(text, _Loader)
        value = yaml.load(text, _Loader)  # noqa: S506 - a subclass of SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(f"{name} is not valid YAML: {_problem(error)}") from error
    lines: dict[Location, int] = {}
    if node is not None:
        _note_lines(node, (), lines, name)
    return value, lines


def _note_lines(node: yaml.Node, at: Location, lines: dict[Location, int], name: str) -> None:
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key_node, value_node in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key in seen:
                raise ConfigError(f"{name}:{line}: key {key!r} stands twice, first on line {seen[key]}; keep one")
            seen[key] = line
            lines[(*at, key)] = line
            _note_lines(value_node, (*at, key), lines, name)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[(*at, index)] = item.start_mark.line + 1
            _note_lines(item, (*at, index), lines, name)


def _problem(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    what = getattr(error, "problem", None) or str(error)
    return f"line {mark.line + 1}, column {mark.column + 1}: {what}" if mark else what
