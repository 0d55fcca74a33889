"""Every config and deployment file in the repository is valid, and the lists of them are whole."""

import importlib
import inspect
from pathlib import Path

import pytest
import yaml

from qlora_core.config.load import load_config
from qlora_core.demo.starter import write_starter

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "deployments" / "configs").glob("*.y*ml"))
DEPLOYMENTS = yaml.safe_load((ROOT / "deployments" / "prefect.yaml").read_text())["deployments"]


def test_every_yaml_under_deployments_is_checked_here() -> None:
    found = set((ROOT / "deployments").rglob("*.y*ml"))
    assert found == {*CONFIGS, ROOT / "deployments" / "prefect.yaml"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_config_on_disk_loads(path: Path) -> None:
    assert load_config(path).data.sources


def test_config_that_init_writes_loads(tmp_path: Path) -> None:
    config, written = write_starter(tmp_path / "demo")
    assert written
    assert load_config(config).base.model == "demo"


def test_promised_deployments_are_there() -> None:
    flows = {f"{_flow(deployment).name}/{deployment['name']}" for deployment in DEPLOYMENTS}
    assert flows == {
        "retrain/nightly",
        "sweep/fleet",
        "evaluate/adhoc",
        "promote/manual",
        "tidy/hourly",
        "shadow/rounds",
    }


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda deployment: deployment["name"])
def test_deployment_entrypoint_is_dotted_and_takes_its_parameters(deployment: dict) -> None:
    assert ":" not in deployment["entrypoint"], "a path entrypoint puts flows/ first on sys.path"
    taken = inspect.signature(_flow(deployment).fn).parameters
    assert set(deployment["parameters"]) <= set(taken)


def _flow(deployment: dict):  # noqa: ANN202 - Prefect's Flow, generic over its function
    module, _, name = deployment["entrypoint"].rpartition(".")
    return getattr(importlib.import_module(module), name)
