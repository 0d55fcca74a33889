"""One MLflow SQLite registry for all tests here (making its tables takes seconds), and adapters made of a few bytes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient
from safetensors.numpy import save_file

from qlora_core.config.gate import GateConfig
from qlora_core.registry.connection import connect, find_or_create_experiment, registry_lock
from qlora_core.registry.evidence import evidence_for, write_evidence
from qlora_core.registry.gate.decide import decide
from qlora_core.registry.load_check import LOAD_CHECK_TAG, PASSED
from qlora_core.registry.tracking import SweepRecord, log_sweep
from qlora_core.registry.versions import RegisteredVersion, get_version, register_adapter, set_version_tag

LINEAGE = {
    "base_model": "demo",
    "base_revision": "r1",
    "quantized_base_digest": "b" * 64,
    "data_digest": "d" * 64,
    "config_digest": "c" * 64,
}


@pytest.fixture(scope="session")
def work_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("registry")


@pytest.fixture(scope="session")
def tracking_uri(work_dir: Path) -> str:
    return f"sqlite:///{work_dir / 'mlflow.db'}"


@pytest.fixture(scope="session")
def client(tracking_uri: str) -> MlflowClient:
    return connect(tracking_uri)


@pytest.fixture(scope="session")
def experiment_id(client: MlflowClient, work_dir: Path) -> str:
    return find_or_create_experiment(client, "tests", work_dir)


@pytest.fixture
def model_name(request: pytest.FixtureRequest) -> str:
    """A registered model per test, so that tests can share the registry."""
    return request.node.name.replace("[", "-").replace("]", "")


@pytest.fixture
def write_adapter(tmp_path: Path) -> Callable[[int], Path]:
    """Writes a folder that looks like an exported adapter; each seed gives other weights."""

    def write(seed: int) -> Path:
        folder = tmp_path / f"adapter-{seed}"
        folder.mkdir()
        weights = np.random.default_rng(seed).normal(size=(2, 3)).astype(np.float32)
        save_file({"lora_A.weight": weights}, folder / "adapter_model.safetensors")
        save_file({"logits_0": weights[0]}, folder / "golden.safetensors")
        (folder / "golden.json").write_text(json.dumps({"prompts": [[1, 2]]}))
        (folder / "adapter_config.json").write_text(json.dumps({"r": 2}))
        (folder / "qlora.json").write_text(json.dumps({"precision": "float32"}))
        return folder

    return write


@pytest.fixture
def sweep() -> dict[str, Any]:
    curve = [
        {"step": step, "loss": 2.0 - step / 10, "learning_rate": 1e-3, "grad_norm": 0.5, "tokens": 64 * step}
        for step in (1, 2, 3)
    ]
    common = {"params": {"lora_rank": 8, "learning_rate": 0.001}, "seconds": 3.0, "error": None, "rungs": []}
    return {
        "method": "grid",
        "best": "t000",
        "trials": [
            {**common, "id": "t000", "state": "complete", "loss": 1.5, "steps": 3, "curve": curve},
            {**common, "id": "t001", "state": "pruned", "loss": 1.9, "steps": 1, "curve": curve[:1]},
            {**common, "id": "t002", "state": "failed", "loss": None, "steps": 0, "curve": [], "error": "loss is NaN"},
        ],
    }


@pytest.fixture
def register(
    client: MlflowClient,
    tracking_uri: str,
    experiment_id: str,
    model_name: str,
    sweep: dict[str, Any],
    write_adapter: Callable[[int], Path],
) -> Callable[..., RegisteredVersion]:
    """Registers an adapter with evidence, as if its clean-process check had passed; moves no alias."""

    def do(seed: int, evaluation: dict[str, Any], champion: dict[str, Any] | None = None) -> RegisteredVersion:
        run_key = f"{model_name}-{seed}"
        record = SweepRecord(run_key, f"sweep {seed}", {}, sweep, LINEAGE["data_digest"], LINEAGE)
        with registry_lock(tracking_uri):
            run_id = log_sweep(client, experiment_id, record)
            folder = write_adapter(seed)
            version = register_adapter(client, model_name, folder, run_id=run_id, run_key=run_key, lineage=LINEAGE)
        decision = decide(evaluation, champion, GateConfig())
        said = {"verdict": decision.verdict, "reasons": decision.reasons}
        evidence = evidence_for(version, evaluation=evaluation, champion=champion, policy=GateConfig(), decision=said)
        write_evidence(client, version, evidence)
        set_version_tag(client, version, LOAD_CHECK_TAG, PASSED)
        return get_version(client, model_name, version.version)

    return do


@pytest.fixture
def better() -> dict[str, Any]:
    """An evaluation that beats the base clearly."""
    return evaluation_with(gain=0.5, gain_low=0.4, gain_high=0.6)


def evaluation_with(**heldout: Any) -> dict[str, Any]:
    """An evaluation of 100 rows whose held-out figures are replaced by those given."""
    figures = {"rows": 100, "tokens": 900, "base_loss": 2.0, "adapter_loss": 1.5, "gain": 0.5, "confidence": 0.95}
    figures |= {"gain_low": 0.4, "gain_high": 0.6, **heldout}
    return {"metrics": {"heldout": figures, "exact_match": None, "judge": None}}
