"""The cheap check before a scheduled run: what counts as new, and that it costs next to nothing."""

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qlora_core.config.load import load_config
from qlora_core.config.pipeline import PipelineConfig
from qlora_core.errors import ConfigError
from qlora_core.pipeline.decided import check_inputs, record_decided
from qlora_core.pipeline.inputs import read_inputs
from qlora_core.pipeline.job import Job

SUMMARY = {
    "run_id": "20260101-020000-abcdef",
    "verdict": "PROMOTE",
    "reasons": ["better"],
    "best": "t001",
    "model_version": "1",
    "report": "report.html",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.json").write_text("[]")
    (tmp_path / "pipeline.yaml").write_text("data: {sources: [data]}\nbase: {model: demo}\n")
    return tmp_path


def config(folder: Path, *overrides: str) -> PipelineConfig:
    return load_config(folder / "pipeline.yaml", list(overrides))


def decide(folder: Path, **summary: Any) -> None:
    loaded = config(folder)
    record_decided(Job(loaded).store, loaded.registry.model_name, read_inputs(loaded), {**SUMMARY, **summary})


def test_nothing_was_decided_so_there_is_work(folder: Path) -> None:
    check = check_inputs(config(folder))
    assert not check.unchanged
    assert check.changes == ["no run was decided yet"]


def test_unchanged_inputs_give_the_last_decision(folder: Path) -> None:
    decide(folder)
    check = check_inputs(config(folder))
    assert check.unchanged
    answer = check.to_json()
    assert answer["skipped"] == "no new data, no GPU"
    assert {name: answer[name] for name in SUMMARY} == SUMMARY
    assert answer["stages"] == [] and answer["trials"] == []


def test_new_changed_and_removed_files_are_named(folder: Path) -> None:
    (folder / "data" / "old.json").write_text("[]")
    decide(folder)
    (folder / "data" / "more.jsonl").write_text("{}\n")
    (folder / "data" / "rows.json").write_text('[{"instruction": "a", "output": "b"}]')
    (folder / "data" / "old.json").unlink()
    assert check_inputs(config(folder)).changes == [
        "data: 1 new (data/more.jsonl)",
        "data: 1 changed (data/rows.json)",
        "data: 1 gone (data/old.json)",
    ]


@pytest.mark.parametrize("setting", ["train.learning_rate=1e-3", "gate.min_rows=40", "base.revision=v2"])
def test_setting_that_can_change_a_result_is_a_change(folder: Path, setting: str) -> None:
    decide(folder)
    assert "config: changed" in check_inputs(config(folder, setting)).changes


def test_where_it_runs_is_no_change(folder: Path) -> None:
    decide(folder)
    assert check_inputs(config(folder, "compute.workers=7")).unchanged


def test_judge_that_the_environment_makes_available_is_a_change(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decide(folder)
    monkeypatch.setenv("OPENAI_API_KEY", "a key")
    assert check_inputs(config(folder)).changes == ["judge: changed"]


def test_another_version_of_the_code_is_a_change(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decide(folder)
    known = importlib.metadata.version("qlora-fleet")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "99.0")
    assert check_inputs(config(folder)).changes == [f"code: version {known} -> 99.0"]


def test_content_of_a_file_that_the_config_names_is_an_input(folder: Path) -> None:
    (folder / "chat.jinja").write_text("one")
    (folder / "pipeline.yaml").write_text("data: {sources: [data], chat_template: chat.jinja}\nbase: {model: demo}\n")
    decide(folder)
    assert check_inputs(config(folder)).unchanged
    (folder / "chat.jinja").write_text("two")
    assert check_inputs(config(folder)).changes == ["files named in the config: changed"]
    (folder / "chat.jinja").unlink()
    with pytest.raises(ConfigError, match=r"data\.chat_template: no such file"):
        check_inputs(config(folder))


def test_other_weights_of_a_base_folder_are_a_change(folder: Path, tiny_base: Path) -> None:
    base = folder / "base"
    base.mkdir()
    for path in tiny_base.iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    (folder / "pipeline.yaml").write_text("data: {sources: [data]}\nbase: {model: base}\n")
    decide(folder)
    assert check_inputs(config(folder)).unchanged
    weights = base / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert check_inputs(config(folder)).changes == ["base model: changed"]


def test_last_decision_takes_the_place_of_the_one_before_and_is_the_stores(folder: Path) -> None:
    decide(folder)
    decide(folder, verdict="REJECT")
    store = Job(config(folder)).store
    (ref,) = (record for record in store.backend.list("v1/ref/decided/"))
    assert ref.size_bytes < 1000
    # Nothing but the store is needed: another machine has no work folder.
    check = check_inputs(config(folder, "compute.work_dir=elsewhere"))
    assert check.unchanged and check.to_json()["verdict"] == "REJECT"


def test_same_decision_again_leaves_the_record_as_it_is(folder: Path) -> None:
    decide(folder)
    store = Job(config(folder)).store
    (name,) = (listed.name for listed in store.backend.list("v1/ref/decided/"))
    before = store.backend.read(name)
    decide(folder, run_id="another", report="another.html")
    assert store.backend.read(name) == before is not None
    decide(folder, verdict="HOLD")
    assert store.backend.read(name) != before


def test_lost_record_means_work_and_not_silence(folder: Path) -> None:
    decide(folder)
    store = Job(config(folder)).store
    (listed,) = (entry for entry in store.backend.list("v1/stage/decided/"))
    store.backend.remove(listed.name)
    assert not check_inputs(config(folder)).unchanged


def test_check_imports_nothing_heavy(folder: Path) -> None:
    decide(folder)
    code = (
        "import sys, json; from flows.cli.app import main; sys.argv = ['qlora', 'run', 'pipeline.yaml', '--if-changed',"
        " '--json']\ntry: main()\nexcept SystemExit as end: assert not end.code, end.code\n"
        "print(json.dumps(sorted({'torch', 'transformers', 'ray', 'mlflow', 'prefect', 'boto3'} & set(sys.modules))))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    answer, heavy = (json.loads(line) for line in done.stdout.splitlines())
    assert answer["skipped"] == "no new data, no GPU"
    assert heavy == []
