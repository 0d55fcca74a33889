"""Reading a pipeline config: file, `--set` overrides, and every mistake at once, with its line and the nearest name."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from qlora_core.config.pipeline import PipelineConfig
from qlora_core.config.section import SECRET, Section
from qlora_core.config.yaml_text import Location, parse_document, parse_value
from qlora_core.errors import ConfigError

S = TypeVar("S", bound=Section)

_SHORT_FORMS = {"store": "url"}
"""Sections that may be given as one value, and the setting which that value is."""


def load_config(path: Path, overrides: Sequence[str] = ()) -> PipelineConfig:
    """The config in `path` with `overrides` ("train.learning_rate=1e-4") laid over it.

    Relative paths in it start at the file's folder. Raises ConfigError listing all mistakes together.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"no config file {str(path)!r}; `qlora init` writes one that runs as is") from None
    except IsADirectoryError:
        raise ConfigError(f"{str(path)!r} is a folder; name the config in it: {path / 'pipeline.yaml'}") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot read config {str(path)!r}: {reason}; check the path, and that it is text") from error
    values, lines = parse_document(text, path.name)
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path.name} must be a mapping of sections such as `data:` and `base:`, not {values!r}")
    return parse_config(dict(values), folder=path.parent, overrides=overrides, name=path.name, lines=lines)


def parse_config(
    values: dict[str, Any],
    *,
    folder: Path,
    overrides: Sequence[str] = (),
    name: str = "config",
    lines: Mapping[Location, int] | None = None,
) -> PipelineConfig:
    """The config given as plain data; `folder` is where its relative paths start, `lines` where its keys stand."""
    overridden: set[Location] = set()
    for override in overrides:
        overridden.add(_apply_override(values, override))
    try:
        config = PipelineConfig.model_validate(values)
    except ValidationError as error:
        faults = [_explain(fault, name, lines or {}, overridden) for fault in error.errors()]
        unique = list(dict.fromkeys(faults))
        head = f"{len(unique)} mistakes in {name}" if len(unique) > 1 else f"a mistake in {name}"
        raise ConfigError("\n  ".join([f"{head}:", *unique])) from None
    return config.rooted_at(folder)


def _apply_override(values: dict[str, Any], override: str) -> Location:
    """Write one "a.b=value" into `values` and return its location."""
    key, equals, text = override.partition("=")
    parts = tuple(part.strip() for part in key.split("."))
    if not equals or not all(parts):
        raise ConfigError(f"--set takes section.key=value, for example train.learning_rate=1e-4, not {override!r}")
    target: dict[str, Any] = values
    for depth, part in enumerate(parts[:-1]):
        inner = target.get(part)
        if inner is None:
            inner = target[part] = {}
        if part in _SHORT_FORMS and not isinstance(inner, dict):
            inner = target[part] = {_SHORT_FORMS[part]: inner}
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {override}: {'.'.join(parts[: depth + 1])} is the value {inner!r}, not a section")
        target = inner
    target[parts[-1]] = parse_value(text)
    return parts


def _explain(
    fault: Any,
    name: str,
    lines: Mapping[Location, int],
    overridden: set[Location],
    root: type[BaseModel] = PipelineConfig,
) -> str:
    """One line for one pydantic fault in a `root`: where, which key, what is wrong, what is allowed."""
    location: Location = tuple(fault["loc"])
    dotted = _dotted(location)
    if any(location[: len(path)] == path for path in overridden):
        where = "--set"
    else:
        line = next((lines[location[:end]] for end in range(len(location), 0, -1) if location[:end] in lines), None)
        where = f"{name}:{line}" if line else name
    if fault["type"] == "extra_forbidden":
        allowed = _field_names(root, location[:-1])
        near = get_close_matches(str(location[-1]), allowed, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "allowed: " + ", ".join(allowed)
        return f"{where}: {dotted}: unknown key; {hint}"
    if fault["type"] == "missing":
        return f"{where}: {dotted}: missing; add it (see `qlora init` for an example)"
    message = fault["msg"].removeprefix("Value error, ").removeprefix("Input ").replace("should be", "must be")
    hidden = fault["type"] == SECRET or isinstance(fault["input"], dict | BaseModel)
    given = "" if hidden else f", not {fault['input']!r}"
    return f"{where}: {dotted}: {message}{given}"


def _dotted(location: Location) -> str:
    """`location` as people write it, without pydantic's names for the branches of a union."""
    parts = [part for part in location if isinstance(part, int) or not any(mark in part for mark in "[(-")]
    return ".".join(str(part) for part in parts if part != "FloatRange")


def _field_names(root: type[BaseModel], location: Location) -> list[str]:
    """The keys allowed in the section at `location` of a `root`."""
    section = root
    for part in location:
        field = section.model_fields.get(str(part))
        if field is None:
            break
        candidates = [field.annotation, *get_args(field.annotation)]
        inner = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
        if inner is None:
            break
        section = inner
    return list(section.model_fields)


def parse_section(section: type[S], values: dict[str, Any], name: str) -> S:
    """One section alone, for commands that take its settings as options; mistakes as for a whole config."""
    try:
        return section.model_validate(values)
    except ValidationError as error:
        faults = [_explain(fault, name, {}, set(), section) for fault in error.errors()]
        raise ConfigError("\n  ".join(["mistakes in the options:", *faults])) from None
