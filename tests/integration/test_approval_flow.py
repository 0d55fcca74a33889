"""A deployed run waits for a person: woken by the command line, by the door of the UI, or by the clock; and alerts."""

import contextlib
import http.server
import json
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]
ROOT = Path(__file__).resolve().parents[2]
PREFECT = str(Path(sys.executable).parent / "prefect")
Background = Callable[..., contextlib.AbstractContextManager["subprocess.Popen[bytes]"]]
Qlora = Callable[..., "subprocess.CompletedProcess[str]"]


def prefect(env: dict[str, str], *arguments: str) -> str:
    done = subprocess.run([PREFECT, "--no-prompt", *arguments], env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def call(env: dict[str, str], path: str, body: Any = None, method: str | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        env["PREFECT_API_URL"] + path, data=data, headers={"Content-Type": "application/json"}, method=method
    )
    deadline = time.monotonic() + 60
    while True:  # a server on SQLite answers 503 while another writer holds it; Prefect's own client asks again too
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            if error.code != 503 or time.monotonic() > deadline:
                raise
            time.sleep(0.5)
        else:
            return json.loads(text) if text else None


def start(env: dict[str, str], deployment: str, **parameters: Any) -> str:
    found = call(env, f"/deployments/name/{deployment}")
    return call(env, f"/deployments/{found['id']}/create_flow_run", {"parameters": parameters})["id"]


def wait_for(env: dict[str, str], run: str, *names: str, timeout_s: float = 240) -> dict[str, Any]:
    deadline = time.monotonic() + timeout_s
    found: dict[str, Any] = {"state": {"name": "unknown"}}
    while time.monotonic() < deadline:
        found = call(env, f"/flow_runs/{run}")
        if found["state"]["name"] in names:
            return found
        assert found["state"]["type"] not in ("FAILED", "CRASHED"), found["state"]["message"]
        time.sleep(0.5)
    pytest.fail(f"run {run} is {found['state']['name']}, not {names}")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, make_project: Callable[[Path], Path]) -> Path:
    config = make_project(tmp_path_factory.mktemp("approval") / "project")
    config.write_text(config.read_text().replace("gate: {min_rows: 5}", "gate: {min_rows: 5, approve: manual}"))
    return config


@pytest.fixture(scope="module")
def deployed(
    own_prefect_server: dict[str, str], background: Background, project: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, str]]:
    env = {**own_prefect_server, "QLORA_CONFIG": str(project), "QLORA_POOL": "local"}
    prefect(env, "work-pool", "create", "local", "--type", "process")
    prefect(env, "deploy", "--all", "--prefect-file", "deployments/prefect.yaml")
    log = tmp_path_factory.mktemp("worker") / "worker.log"
    with background([PREFECT, "worker", "start", "--pool", "local"], env, log):
        yield env


@pytest.fixture(scope="module")
def suspended(deployed: dict[str, str]) -> str:
    run = start(deployed, "retrain/nightly")
    wait_for(deployed, run, "Suspended", timeout_s=400)
    return run


def test_run_suspends_and_command_line_wakes_it(
    deployed: dict[str, str], suspended: str, project: Path, qlora: Qlora
) -> None:
    held = qlora("promote", project, "--version", "1", "--json", env=deployed)
    assert (held.returncode, json.loads(held.stdout)["verdict"]) == (3, "HOLD")
    nameless = qlora("promote", project, "--approve", env=deployed)
    assert nameless.returncode == 2 and "--by WHO" in nameless.stderr
    done = qlora("promote", project, "--approve", "--by", "ada", "--reason", "read it all", "--json", env=deployed)
    outcome = json.loads(done.stdout)
    assert (done.returncode, outcome["champion"], outcome["approval"]) == (0, "1", "approved"), done.stderr
    # The resumed run begins at the top again: it must find its own question there, and not "no new data".
    assert wait_for(deployed, suspended, "Completed")["state"]["message"] != "no new data, no GPU"
    history = json.loads(qlora("history", project, "--json", env=deployed).stdout)
    (move,) = history["moves"]
    assert (move["by"], move["reason"], move["version"]) == ("ada", "read it all", "1")


def test_form_of_the_ui_is_typed_and_its_decision_is_recorded(
    deployed: dict[str, str], suspended: str, project: Path, qlora: Qlora
) -> None:
    other = ["registry.model_name=second"]
    run = start(deployed, "retrain/nightly", overrides=other)
    wait_for(deployed, run, "Suspended")
    for wrong in ({"decision": "maybe", "by": "bob", "why": "x"}, {"decision": "approve", "by": "bob"}):
        refused = call(deployed, f"/flow_runs/{run}/resume", {"run_input": wrong})
        assert refused["status"] == "REJECT"
    assert call(deployed, f"/flow_runs/{run}")["state"]["name"] == "Suspended"
    given = {"decision": "decline", "by": "bob", "why": "rude in French"}
    assert call(deployed, f"/flow_runs/{run}/resume", {"run_input": given})["status"] == "ACCEPT"
    wait_for(deployed, run, "Completed")
    history = json.loads(qlora("history", project, "--set", other[0], "--json", env=deployed).stdout)
    assert history["champion"] is None
    (move,) = history["moves"]
    assert (move["action"], move["by"], move["reason"]) == ("decline", "bob", "rude in French")


def test_run_that_nobody_answers_ends_in_hold(deployed: dict[str, str], project: Path, qlora: Qlora) -> None:
    overrides = ["registry.model_name=third", "gate.approve_timeout_s=1"]
    run = start(deployed, "retrain/nightly", overrides=overrides)
    wait_for(deployed, run, "Suspended")
    time.sleep(1.5)
    wait_for(deployed, start(deployed, "tidy/hourly"), "Completed")
    wait_for(deployed, run, "Completed")
    history = json.loads(qlora("history", project, "--set", overrides[0], "--json", env=deployed).stdout)
    assert history["champion"] is None
    assert "No decision by" in history["moves"][-1]["reason"]
    assert history["moves"][-1]["by"] is None


@pytest.fixture
def receiver() -> Iterator[tuple[str, list[str]]]:
    """A web hook on loopback, and what it was told."""
    told: list[str] = []

    class Hook(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            told.append(self.rfile.read(int(self.headers["Content-Length"])).decode())
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            return

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hook) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/alert", told
        server.shutdown()
        thread.join()


def heartbeat(env: dict[str, str], run: str) -> None:
    event = {
        "occurred": datetime.now(UTC).isoformat(),
        "event": "prefect.flow-run.heartbeat",
        "resource": {"prefect.resource.id": f"prefect.flow-run.{run}"},
        "related": [{"prefect.resource.id": "prefect.tag.qlora", "prefect.resource.role": "tag"}],
        "id": str(uuid4()),
    }
    call(env, "/events", [event])


def test_silent_run_is_crashed_and_failures_are_told(deployed: dict[str, str], receiver: tuple[str, list[str]]) -> None:
    url, told = receiver
    make_block = (
        "import sys; from prefect.blocks.notifications import CustomWebhookNotificationBlock as Hook\n"
        "Hook(name='on-call', url=sys.argv[1], method='POST', json_data={'text': '{{subject}} {{body}}'})"
        ".save('on-call')"
    )
    subprocess.run([sys.executable, "-c", make_block, url], env=deployed, check=True, capture_output=True)
    for _ in range(2):  # kept, not doubled
        parameters = {"alert_block": "custom-webhook/on-call", "stuck_after_s": 10}
        wait_for(deployed, start(deployed, "tidy/hourly", **parameters), "Completed")
    automations = call(deployed, "/automations/filter", {})
    assert sorted(one["name"] for one in automations) == ["qlora: failures alert", "qlora: stuck runs crash"]
    run = orphan(deployed)
    heartbeat(deployed, run)
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and not told:
        time.sleep(0.5)
    assert call(deployed, f"/flow_runs/{run}")["state"]["type"] == "CRASHED"
    assert any("no sign of life" in text for text in told), told


def orphan(env: dict[str, str]) -> str:
    """A run of ours that says Running and has no process."""
    flow = call(env, "/flows/name/retrain")
    run = call(env, "/flow_runs/", {"flow_id": flow["id"], "name": "orphan", "tags": ["qlora"]})["id"]
    for state in ("PENDING", "RUNNING"):
        call(env, f"/flow_runs/{run}/set_state", {"state": {"type": state}, "force": True})
    return run
