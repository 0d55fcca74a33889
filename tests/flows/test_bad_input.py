"""What a user gets wrong: exit code, a message with the value and the next step, nothing half-written."""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from flows.cli.app import app
from flows.cli.reporting import reporting


@pytest.fixture
def qlora_here(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Run a command in this process; returns the exit code and all it said."""

    def run(*arguments: object) -> tuple[int, str]:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        said = capfd.readouterr()
        return result.exit_code, result.output + said.out + said.err

    return run


Run = Callable[..., tuple[int, str]]


def stored(config: Path) -> list[str]:
    """The stages that have an artifact in the project's store, and anything unfinished."""
    root = config.parent / ".qlora" / "v1"
    stages = sorted(path.parent.parent.name for path in root.glob("stage/*/*/manifest.json"))
    # Locks hold nothing, and a lease that was given back stays, so that its token grows.
    resting = ("stage", "quarantine", "lock", "lease")
    unfinished = [path.name for path in root.glob("*") if path.name not in resting and any(path.iterdir())]
    leases = [json.loads(path.read_bytes()) for path in root.glob("lease/**/*.json")]
    return stages + unfinished + [lease["state"] for lease in leases if lease["state"] != "free"]


def replace_rows(config: Path, text: str) -> None:
    (config.parent / "data" / "rows.json").write_text(text)


def test_misspelt_key_exits_2_and_names_the_line(qlora_here: Run, tiny_project: Path) -> None:
    tiny_project.write_text(tiny_project.read_text() + "trian: {}\n")
    code, said = qlora_here("run", tiny_project)
    assert code == 2
    assert "trian: unknown key; did you mean 'train'?" in said
    assert not (tiny_project.parent / ".qlora").exists()


def test_misspelt_option_of_a_command_exits_2(qlora_here: Run, tmp_path: Path) -> None:
    code, said = qlora_here("quantize", tmp_path, tmp_path / "out", "--blocksize", "63")
    assert code == 2
    assert "blocksize" in said
    assert "64" in said


def test_missing_dataset_file_is_named(qlora_here: Run, tiny_project: Path) -> None:
    code, said = qlora_here("curate", tiny_project, "--set", "data.sources=[absent.json]")
    assert code in (1, 2)
    assert str(tiny_project.parent / "absent.json") in said
    assert stored(tiny_project) == []


@pytest.mark.parametrize("text", ["{not json", "", "\x00\x01\x02"])
def test_corrupt_dataset_file_is_named(qlora_here: Run, tiny_project: Path, text: str) -> None:
    replace_rows(tiny_project, text)
    code, said = qlora_here("curate", tiny_project)
    assert code == 1
    assert "rows.json" in said
    assert stored(tiny_project) == []


def test_row_with_an_unknown_role_is_quarantined_with_its_reason(qlora_here: Run, tiny_project: Path) -> None:
    good = [
        {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "a"}]} for n in range(60)
    ]
    bad = {"messages": [{"role": "wizard", "content": "q"}, {"role": "assistant", "content": "a"}]}
    (tiny_project.parent / "data" / "rows.json").unlink()
    lines = "\n".join(json.dumps(row) for row in [*good, bad])
    (tiny_project.parent / "data" / "rows.jsonl").write_text(lines)
    code, said = qlora_here("curate", tiny_project, "--json")
    assert code == 0, said
    payload = json.loads(next(line for line in said.splitlines() if line.startswith("{")))
    assert payload["rows"] == {"in": 61, "kept": 60, "dropped": 0, "quarantined": 1}


def test_dataset_that_is_empty_after_curation_is_refused(qlora_here: Run, tiny_project: Path) -> None:
    code, said = qlora_here("curate", tiny_project, "--set", "data.max_tokens=8")
    assert code == 1
    assert "over_long" in said
    assert "max_tokens" in said
    # What was measured on the rows is whole, and is kept for the next try.
    assert stored(tiny_project) == ["tags"]


def test_base_folder_without_weights_is_refused(qlora_here: Run, tiny_project: Path, tiny_base: Path) -> None:
    base = tiny_project.parent / "base"
    shutil.copytree(tiny_base, base)
    (base / "model.safetensors").unlink()
    code, said = qlora_here("sweep", tiny_project, "--set", "base.model=base")
    assert code == 1
    assert "safetensors" in said
    assert str(base) in said
    assert stored(tiny_project) == []


def test_pickled_checkpoint_is_refused_unread(qlora_here: Run, tiny_project: Path, tiny_base: Path) -> None:
    base = tiny_project.parent / "base"
    shutil.copytree(tiny_base, base)
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    code, said = qlora_here("sweep", tiny_project, "--set", "base.model=base")
    assert code == 1
    assert "pytorch_model.bin" in said
    assert "safetensors" in said


def test_base_that_is_neither_folder_nor_hub_name_is_a_config_error(qlora_here: Run, tiny_project: Path) -> None:
    code, said = qlora_here("plan", tiny_project, "--set", "base.model=no-such-folder")
    assert code == 2
    assert "no-such-folder" in said


def test_hub_name_without_a_commit_is_a_config_error(qlora_here: Run, tiny_project: Path) -> None:
    code, said = qlora_here("plan", tiny_project, "--set", "base.model=owner/model")
    assert code == 2
    assert "40-digit commit" in said


def test_chat_template_that_cannot_be_masked_is_refused(qlora_here: Run, tiny_project: Path) -> None:
    template = tiny_project.parent / "shouting.jinja"
    template.write_text("{% for message in messages %}{{ message['content'] | upper }}{% endfor %}")
    code, said = qlora_here("curate", tiny_project, "--set", "data.chat_template=shouting.jinja")
    assert code == 1
    assert "template" in said
    assert stored(tiny_project) == []


def test_store_that_is_a_file_is_refused_before_any_work(qlora_here: Run, tiny_project: Path) -> None:
    (tiny_project.parent / "occupied").write_text("")
    code, said = qlora_here("run", tiny_project, "--set", "store=occupied")
    assert code == 1
    assert str(tiny_project.parent / "occupied") in said
    assert stored(tiny_project) == []


def test_failure_with_json_leaves_one_object_with_the_error(qlora_here: Run, tiny_project: Path) -> None:
    code, said = qlora_here("curate", tiny_project, "--set", "data.sources=[absent.json]", "--json")
    assert code != 0
    (line,) = [line for line in said.splitlines() if line.startswith("{")]
    assert "absent.json" in json.loads(line)["error"]["message"]


def test_init_refuses_to_overwrite_a_config(qlora_here: Run, tiny_project: Path) -> None:
    before = tiny_project.read_text()
    code, said = qlora_here("init", tiny_project.parent)
    assert code == 2
    assert "exists already" in said
    assert tiny_project.read_text() == before


def test_promotion_without_a_registry_says_what_to_do_first(qlora_here: Run, tiny_project: Path) -> None:
    code, said = qlora_here("promote", tiny_project)
    assert code == 1
    assert "qlora run" in said


VERDICT = {"prompt_id": "1", "model_a": "old", "model_b": "new", "verdict": "b", "first": "a", "judge": "me"}


def test_page_over_a_folder_is_one_line_and_no_traceback(qlora_here: Run, tmp_path: Path) -> None:
    rows = tmp_path / "verdicts.jsonl"
    rows.write_text("".join(json.dumps(VERDICT | {"prompt_id": str(n)}) + "\n" for n in range(4)))
    (tmp_path / "page").mkdir()
    code, said = qlora_here("tournament", rows, "--report", tmp_path / "page")
    assert code == 1
    (line,) = [line for line in said.splitlines() if line.startswith("error:")]
    assert line == f"error: cannot use {str(tmp_path / 'page')!r}: Is a directory; name a file, not a folder"
    assert "Traceback" not in said


def test_folder_below_a_file_is_one_line_and_in_json_too(qlora_here: Run, tmp_path: Path) -> None:
    (tmp_path / "occupied").write_text("")
    code, said = qlora_here("init", tmp_path / "occupied" / "demo", "--json")
    assert code == 1
    (line,) = [line for line in said.splitlines() if line.startswith("{")]
    error = json.loads(line)["error"]
    assert error["type"] == "NotADirectoryError"
    assert str(tmp_path / "occupied") in error["message"] and "name another place" in error["message"]
    assert "Traceback" not in said


def test_folder_in_the_place_of_a_config_names_the_file_in_it(qlora_here: Run, tiny_project: Path) -> None:
    code, said = qlora_here("plan", tiny_project.parent)
    assert code == 2
    assert f"is a folder; name the config in it: {tiny_project.parent / 'pipeline.yaml'}" in said
    assert "Errno" not in said


def test_fault_that_is_about_no_file_keeps_its_traceback() -> None:
    with pytest.raises(ConnectionRefusedError), reporting(False):
        raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
    with pytest.raises(ZeroDivisionError), reporting(False):
        raise ZeroDivisionError


def test_full_disk_is_told_though_no_file_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as ended, reporting(False):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert ended.value.exit_code == 1
    assert capsys.readouterr().err == "error: No space left on device; free some space, and give the command again\n"
