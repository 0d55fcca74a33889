"""What the documents say exists, exists; what exists is documented."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from flows.cli.app import app
from qlora_core.config.pipeline import PipelineConfig
from qlora_core.demo.config_text import demo_config

ROOT = Path(__file__).resolve().parents[2]


def commands_of(group: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    """Every command by its name, those of groups as "store ls"."""
    for name, command in sorted(group.commands.items()):
        if hasattr(command, "commands"):
            yield from commands_of(command, f"{above}{name} ")
        else:
            yield f"{above}{name}", command


DESCRIBED = dict(commands_of(get_command(app)))
COMMANDS = list(DESCRIBED)
STORE_COMMANDS = [
    "explain", "export", "gc", "import", "lineage", "ls", "pin", "refs", "show", "unpin", "unref", "verify",
]  # fmt: skip


def test_commands_are_those_promised() -> None:
    assert sorted(DESCRIBED) == [
        *(f"adapter {name}" for name in ("bisect", "diff", "export", "inspect", "record")),
        "agreement", "benchmark", "chat", "compose", "curate", "doctor", "evaluate", "gate", "history", "init",
        "judge certify", "judge preferences", "merge",
        "perplexity", "plan", "promote", "quantize", "rollback",
        "run", "serve", *(f"store {name}" for name in STORE_COMMANDS), "sweep", "tournament",
        "vote export", "vote import", "vote serve",
    ]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_command_stands_in_readme_and_changelog(command: str) -> None:
    for document in ("README.md", "CHANGELOG.md"):
        assert re.search(rf"`[^`]*\b{command.split()[-1]}\b[^`]*`", (ROOT / document).read_text()), document


@pytest.mark.parametrize("command", COMMANDS)
def test_command_has_help_with_an_example_and_takes_json(command: str) -> None:
    described = DESCRIBED[command]
    assert "Example" in (described.help or "")
    assert f"qlora {command}" in (described.help or "")
    assert "--json" in [option for parameter in described.params for option in parameter.opts]


@pytest.mark.parametrize("section", list(PipelineConfig.model_fields))
def test_section_stands_in_the_guide_and_in_the_config_that_init_writes(section: str) -> None:
    assert f"| `{section}` |" in (ROOT / "docs" / "guide.md").read_text()
    assert re.search(rf"^{section}:", demo_config(), flags=re.MULTILINE)


@pytest.mark.parametrize("target", ["demo", "test", "check", "bench", "bench-gpu", "clean"])
def test_make_target_says_what_it_does(target: str) -> None:
    assert re.search(rf"^{target}:.*## \S", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


def test_links_between_documents_lead_somewhere() -> None:
    for document in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"
