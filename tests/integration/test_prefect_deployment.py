"""A real Prefect server and process worker: deploy, run by name with parameters, see a scheduled run appear."""

import contextlib
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]
ROOT = Path(__file__).resolve().parents[2]
PREFECT = str(Path(sys.executable).parent / "prefect")
Background = Callable[..., contextlib.AbstractContextManager["subprocess.Popen[bytes]"]]


def prefect(env: dict[str, str], *arguments: str) -> str:
    done = subprocess.run([PREFECT, "--no-prompt", *arguments], env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def runs(env: dict[str, str], **filters: Any) -> list[dict[str, Any]]:
    request = urllib.request.Request(
        env["PREFECT_API_URL"] + "/flow_runs/filter",
        data=json.dumps(filters).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, make_project: Callable[[Path], Path]) -> Path:
    return make_project(tmp_path_factory.mktemp("deployed") / "project")


@pytest.fixture(scope="module")
def deployed(
    prefect_server: dict[str, str], background: Background, project: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, str]]:
    env = {**prefect_server, "QLORA_CONFIG": str(project), "QLORA_POOL": "local"}
    prefect(env, "work-pool", "create", "local", "--type", "process")
    prefect(env, "deploy", "--all", "--prefect-file", "deployments/prefect.yaml")
    log = tmp_path_factory.mktemp("worker") / "worker.log"
    with background([PREFECT, "worker", "start", "--pool", "local"], env, log):
        yield env


def test_deployment_run_by_name_registers_an_adapter(deployed: dict[str, str], project: Path) -> None:
    overrides = json.dumps(["train.max_steps=4"])
    prefect(deployed, "deployment", "run", "retrain/nightly", "-p", f"overrides={overrides}", "--watch")
    completed = {"state": {"type": {"any_": ["COMPLETED"]}}}
    (finished,) = runs(deployed, flow_runs=completed, deployments={"name": {"any_": ["nightly"]}})
    assert finished["parameters"]["overrides"] == ["train.max_steps=4"]
    (summary,) = (json.loads(path.read_text()) for path in project.parent.glob(".qlora/runs/*/summary.json"))
    assert summary["model_version"] == "1"
    assert {trial["steps"] for trial in summary["trials"] if trial["state"] == "complete"} == {4}


def test_second_run_without_new_data_does_nothing_in_under_ten_seconds(deployed: dict[str, str], project: Path) -> None:
    overrides = json.dumps(["train.max_steps=4"])
    prefect(deployed, "deployment", "run", "retrain/nightly", "-p", f"overrides={overrides}", "--watch")
    completed = {"state": {"type": {"any_": ["COMPLETED"]}}}
    finished = runs(deployed, flow_runs=completed, deployments={"name": {"any_": ["nightly"]}})
    (idle,) = (run for run in finished if run["state"]["message"] == "no new data, no GPU")
    assert idle["total_run_time"] < 10
    assert len(list(project.parent.glob(".qlora/runs/*/summary.json"))) == 1


def test_deployment_run_leaves_its_tables_and_verdict_in_the_ui(deployed: dict[str, str]) -> None:
    request = urllib.request.Request(
        deployed["PREFECT_API_URL"] + "/artifacts/latest/filter",
        data=b"{}",
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        keys = {artifact["key"] for artifact in json.load(answer)}
    assert keys >= {"curation-funnel", "quantization", "sweep-trials", "evaluation", "verdict", "registered-version"}


def test_scheduled_run_of_a_deployment_appears(deployed: dict[str, str]) -> None:
    # With SQLAlchemy 2.1 everything looks healthy and no scheduled run is ever made.
    deadline = time.monotonic() + 90
    scheduled: list[dict[str, Any]] = []
    while not scheduled and time.monotonic() < deadline:
        time.sleep(1)
        scheduled = runs(
            deployed, flow_runs={"state": {"type": {"any_": ["SCHEDULED"]}}, "tags": {"all_": ["scheduled"]}}
        )
    assert any(run["auto_scheduled"] for run in scheduled)
    assert "InvalidRequestError" not in Path(deployed["PREFECT_SERVER_LOG"]).read_text()


def test_unknown_parameter_is_refused_before_a_run_exists(deployed: dict[str, str]) -> None:
    before = len(runs(deployed))
    command = [PREFECT, "--no-prompt", "deployment", "run", "retrain/nightly", "-p", "learning_rate=1"]
    done = subprocess.run(command, env=deployed, capture_output=True, text=True)
    assert done.returncode != 0
    assert "overrides" in done.stdout + done.stderr
    assert len(runs(deployed)) == before


def test_weaker_candidate_is_held_against_the_champion_and_not_promoted(
    deployed: dict[str, str], project: Path, qlora: Callable[..., "subprocess.CompletedProcess[str]"]
) -> None:
    # The deployment's run above made version 1 champion; this one trains a single step.
    done = qlora("run", project, "--set", "train.max_steps=1", "--json", env=deployed)
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads(done.stdout)
    assert summary["model_version"] == "2"
    assert summary["verdict"] in ("REJECT", "HOLD")
    assert "champion version 1" in " ".join(summary["reasons"])

    promoted = qlora("promote", project, "--version", "2", "--json", env=deployed)
    assert promoted.returncode == 3, promoted.stderr
    assert json.loads(promoted.stdout)["champion"] == "1"

    undone = qlora("rollback", project, "--json", env=deployed)
    assert undone.returncode == 1
    assert "first champion" in json.loads(undone.stdout)["error"]["message"]
