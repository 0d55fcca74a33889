"""A shadow period with real adapters over a real quantized base: answered once, kept in the store, ended by rule."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_core.config.gate import GateConfig
from qlora_core.config.load import load_config
from qlora_core.config.pipeline import PipelineConfig
from qlora_core.data.dataset import read_split
from qlora_core.errors import DataError
from qlora_core.model.base import load_quantized
from qlora_core.pipeline.pipeline import Pipeline
from qlora_core.pipeline.shadow import shadow_round
from qlora_core.registry.aliases import CANDIDATE, CHAMPION, alias_version, set_alias
from qlora_core.registry.connection import connect, find_or_create_experiment, registry_lock
from qlora_core.registry.evidence import evidence_for, write_evidence
from qlora_core.registry.load_check import LOAD_CHECK_TAG, PASSED
from qlora_core.registry.promotion import SHADOW_TAG
from qlora_core.registry.shadow import begin
from qlora_core.registry.tracking import SweepRecord, log_sweep
from qlora_core.registry.versions import RegisteredVersion, get_version, register_adapter, set_version_tag
from qlora_core.store.refs import add_ref
from qlora_core.sweep.adapter_card import write_adapter_card
from qlora_core.training.trainer import Trainer
from qlora_core.training.trial import Trial

SHADOW = "gate.shadow={period_s: 3600, prompts: asked.jsonl, min_prompts: 3, max_degenerate_increase: 0.0}"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, make_project: Callable[[Path], Path]) -> dict[str, Any]:
    """A project whose base is quantized and data curated, and a trained adapter."""
    config = load_config(make_project(tmp_path_factory.mktemp("shadow") / "project"), [SHADOW])
    pipeline = Pipeline(config)
    quantized, curated = pipeline.run("quantize").artifact, pipeline.run("curate").artifact
    rows = {side: read_split(curated.path, side) for side in ("train", "validation")}
    trainer = Trainer(load_quantized(quantized.path), rows["train"], rows["validation"], config.work_dir / "trials")
    trial = Trial("t000", config.train.model_copy(update={"optimizer": "adamw"}))
    trainer.run([trial], None)
    good = config.work_dir / "good"
    trainer.export(trial, good)
    lineage = {
        "base_revision": "none",
        "quantized_base_digest": quantized.digest,
        "data_digest": json.loads((curated.path / "curation.json").read_text())["digest"],
        "chat_template_origin": "tokenizer",
    }
    write_adapter_card(good, lineage, trial.params.model_dump(mode="json"), "float32", curated.path / "tokenizer")
    return {"config": config, "good": good, "artifacts": (quantized, curated), "lineage": lineage, "trial": trial}


def register(world: dict[str, Any], name: str, folder: Path, champion: str | None) -> RegisteredVersion:
    config: PipelineConfig = world["config"]
    client = connect(config.tracking_uri)
    run_key = f"{name}-{folder.name}"
    add_ref(
        Pipeline(config).job.store.backend,
        "model",
        f"{name}/{run_key}",
        [artifact.manifest.address for artifact in world["artifacts"]],
    )
    tags = {**world["lineage"], "base_model": "tiny", "config_digest": "c" * 64}
    sweep = {"method": "grid", "best": "t000", "trials": []}
    with registry_lock(config.tracking_uri):
        experiment = find_or_create_experiment(client, "tests", config.work_dir)
        run_id = log_sweep(client, experiment, SweepRecord(run_key, "sweep", {}, sweep, "d" * 64, tags))
        version = register_adapter(client, name, folder, run_id=run_id, run_key=run_key, lineage=tags)
    heldout = {"rows": 100, "tokens": 900, "base_loss": 2.0, "adapter_loss": 1.5, "gain": 0.5, "confidence": 0.95}
    heldout |= {"gain_low": 0.4, "gain_high": 0.6}
    evaluation = {"metrics": {"heldout": heldout, "exact_match": None, "judge": None}}
    rival = None if champion is None else {"version": champion, "heldout": heldout, "exact_match": None}
    said = {"verdict": "PROMOTE", "reasons": ["better"]}
    evidence = evidence_for(version, evaluation=evaluation, champion=rival, policy=GateConfig(), decision=said)
    write_evidence(client, version, evidence)
    set_version_tag(client, version, LOAD_CHECK_TAG, PASSED)
    return version


def broken_copy(world: dict[str, Any], name: str, factor: float) -> Path:
    """The same adapter with its B factors turned up, so that it babbles."""
    folder = world["config"].work_dir / name
    folder.mkdir()
    for path in world["good"].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights = load_file(folder / "adapter_model.safetensors")
    for key in weights:
        if "lora_B" in key:
            weights[key] = weights[key] + factor * torch.randn(weights[key].shape, generator=torch.manual_seed(1))
    save_file(weights, folder / "adapter_model.safetensors")
    return folder


def start(world: dict[str, Any], name: str, candidate: Path) -> PipelineConfig:
    config: PipelineConfig = world["config"]
    client = connect(config.tracking_uri)
    champion = register(world, name, world["good"], None)
    set_alias(client, name, CHAMPION, champion.version)
    begin(client, register(world, name, candidate, champion.version), config.gate.shadow.period_s)
    registry = config.registry.model_copy(update={"model_name": name})
    return config.model_copy(update={"registry": registry}).rooted_at(config.folder)


def ask(config: PipelineConfig, *prompts: str) -> None:
    with (config.folder / "asked.jsonl").open("a") as stream:
        stream.writelines(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)


def time_is_over(config: PipelineConfig, name: str) -> None:
    client = connect(config.tracking_uri)
    version = get_version(client, name, "2")
    entry = json.loads(version.tags[SHADOW_TAG])
    set_version_tag(client, version, SHADOW_TAG, json.dumps({**entry, "until": entry["since"]}))


def test_no_candidate_is_nothing_to_do(world: dict[str, Any]) -> None:
    assert shadow_round(world["config"])["version"] is None


def test_each_prompt_is_answered_once_and_a_twin_goes_on_until_its_time_is_over(world: dict[str, Any]) -> None:
    config = start(world, "twin", broken_copy(world, "twin-adapter", 1e-6))
    with pytest.raises(DataError, match=r"gate\.shadow\.prompts"):
        shadow_round(config)
    ask(config, "Question 1: name a thing that is red.", "Question 2: name a thing that is blue.")
    first = shadow_round(config)
    assert (first["state"], first["answered"], first["figures"]["prompts"]) == ("running", 2, 2)
    assert first["figures"]["broken"] == []
    again = shadow_round(config)
    assert (again["answered"], again["figures"]) == (0, first["figures"])
    client = connect(config.tracking_uri)
    assert alias_version(client, "twin", CANDIDATE) == "2"
    # A period that is over with too few prompts: the candidate goes back, and says why.
    time_is_over(config, "twin")
    ended = shadow_round(config)
    assert ended["state"] == "demoted" and "min_prompts is 3" in ended["outcome"]["reasons"][0]
    assert alias_version(client, "twin", CANDIDATE) is None and alias_version(client, "twin", CHAMPION) == "1"


def test_period_that_went_well_promotes(world: dict[str, Any]) -> None:
    config = start(world, "fine", broken_copy(world, "fine-adapter", 1e-6))
    ask(config, "Question 3: name a thing that is green.", "Question 4: name a thing that is black.")
    time_is_over(config, "fine")
    ended = shadow_round(config)
    assert (ended["state"], ended["outcome"]["champion"]) == ("passed", "2"), ended
