"""What training begins from: pinned for a run, part of the sweep's key by content, and watched slice by slice."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from qlora_core.config.load import load_config
from qlora_core.config.pipeline import PipelineConfig
from qlora_core.errors import ConfigError
from qlora_core.pipeline.inputs import read_inputs, what_changed
from qlora_core.pipeline.job import Job
from qlora_core.pipeline.start_adapter import find_start, pin_start
from qlora_core.registry.adapter_files import adapter_sha256
from qlora_core.registry.aliases import CHAMPION, set_alias
from qlora_core.registry.connection import connect, find_or_create_experiment, registry_lock
from qlora_core.registry.tracking import SweepRecord, log_sweep
from qlora_core.registry.versions import register_adapter

SLICES = "gate.slices.by=category"
LINEAGE = {
    "base_model": "demo",
    "base_revision": "r1",
    "quantized_base_digest": "b" * 64,
    "data_digest": "d" * 64,
    "config_digest": "c" * 64,
}


def write_adapter(folder: Path, seed: int) -> Path:
    folder.mkdir(exist_ok=True)
    weights = np.random.default_rng(seed).normal(size=(2, 3)).astype(np.float32)
    save_file({"lora_A.weight": weights}, folder / "adapter_model.safetensors")
    save_file({"logits_0": weights[0]}, folder / "golden.safetensors")
    (folder / "golden.json").write_text(json.dumps({"prompts": [[1, 2]]}))
    (folder / "adapter_config.json").write_text(json.dumps({"r": 2}))
    (folder / "qlora.json").write_text(json.dumps({"precision": "float32"}))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "rows.json").write_text("[]")
    (tmp_path / "pipeline.yaml").write_text("data: {sources: [rows.json]}\nbase: {model: demo}\n")
    return tmp_path


def config(folder: Path, *overrides: str) -> PipelineConfig:
    return load_config(folder / "pipeline.yaml", list(overrides))


def register(config: PipelineConfig, folder: Path, seed: int) -> str:
    """A registered version, made champion."""
    client = connect(config.tracking_uri)
    experiment = find_or_create_experiment(client, "tests", config.work_dir)
    sweep = {"method": "grid", "best": "t000", "trials": []}
    with registry_lock(config.tracking_uri):
        run_id = log_sweep(client, experiment, SweepRecord(f"run-{seed}", "sweep", {}, sweep, "d" * 64, LINEAGE))
        adapter = write_adapter(folder / f"adapter-{seed}", seed)
        name = config.registry.model_name
        version = register_adapter(client, name, adapter, run_id=run_id, run_key=f"run-{seed}", lineage=LINEAGE)
    set_alias(client, name, CHAMPION, version.version)
    return version.version


def test_warm_start_without_regression_constraints_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"gate\.slices\.by"):
        find_start(config(folder, "train.start_from=champion"))
    assert find_start(config(folder)) is None


def test_without_a_champion_training_begins_from_scratch_and_no_registry_is_made(folder: Path) -> None:
    wanted = config(folder, "train.start_from=champion", SLICES)
    assert find_start(wanted) is None
    assert pin_start(wanted).train.start_from is None
    over = pin_start(config(folder, "train.start_from=champion", "train.start_as=parent", SLICES))
    assert (over.train.start_from, over.train.start_as) == (None, "weights")
    assert not (folder / ".qlora" / "mlflow.db").exists()


def test_champion_is_pinned_for_the_run_whoever_is_promoted_meanwhile(folder: Path) -> None:
    wanted = config(folder, "train.start_from=champion", SLICES)
    assert register(wanted, folder, 1) == "1"
    pinned = pin_start(wanted)
    assert pinned.train.start_from == "models:/assistant/1" and pinned.folder == wanted.folder
    register(wanted, folder, 2)
    start = Job(pinned).start_adapter
    assert start is not None and start.quantized_base_digest == "b" * 64
    assert start.adapter_sha256 == adapter_sha256(folder / "adapter-1") == adapter_sha256(start.folder)
    assert pin_start(wanted).train.start_from == "models:/assistant/2"


def test_a_parent_must_be_named_and_is_the_same_for_all_trials(folder: Path) -> None:
    for overrides, said in (
        (["train.start_as=parent"], "needs start_from"),
        (["train.start_as=parent", "train.start_from=champion", "train.use_dora=true"], "could not be fused"),
        (["sweep.space={start_as: [weights, parent]}"], "begin alike"),
        (["sweep.space={start_from: [a, b]}"], "begin alike"),
    ):
        with pytest.raises(ConfigError, match=said):
            config(folder, *overrides, SLICES)


def test_folder_is_an_input_by_its_content(folder: Path) -> None:
    write_adapter(folder / "start", 1)
    wanted = config(folder, "train.start_from=start", SLICES)
    start = Job(wanted).start_adapter
    assert start is not None and start.quantized_base_digest is None
    before = read_inputs(wanted)
    write_adapter(folder / "start", 2)
    assert what_changed(before, read_inputs(wanted)) == ["files named in the config: changed"]
    with pytest.raises(ConfigError, match="no such folder"):
        find_start(config(folder, "train.start_from=absent", SLICES))
