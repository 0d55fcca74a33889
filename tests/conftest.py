"""Fixtures every test may use: real data beside the checkout, a tiny base model, a project around it, real servers."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent
ANSWERS = {"red": "apple", "green": "leaf", "blue": "sky", "black": "night", "white": "snow"}
TINY_CONFIG = """\
data: {{sources: [data], max_tokens: 96}}
base: {{model: {base}}}
train: {{lora_rank: 4, max_steps: 6, micro_batch_size: 8, gradient_accumulation_steps: 1, learning_rate: 5e-3}}
sweep: {{space: {{learning_rate: [1e-3, 1e-2]}}}}
evaluate: {{max_prompts: 4, max_new_tokens: 8, resamples: 200, judge: {{kind: offline}}}}
gate: {{min_rows: 5}}
compute: {{workers: 1}}
"""


def pytest_configure() -> None:
    """Keep Prefect's state and every usage report of this test session to itself, before anything is imported."""
    home = tempfile.mkdtemp(prefix="qlora-tests-prefect-")
    os.environ.update(
        PREFECT_HOME=home,
        PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS="180",
        PREFECT_SERVER_ANALYTICS_ENABLED="false",
        PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW="ignore",
        DO_NOT_TRACK="1",
        RAY_USAGE_STATS_ENABLED="0",
        MLFLOW_DISABLE_TELEMETRY="true",
        HF_HUB_OFFLINE="1",
        TOKENIZERS_PARALLELISM="false",
        OMP_NUM_THREADS="1",
    )
    for name in ("OPENAI_API_KEY", "PREFECT_API_URL", "MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL"):
        os.environ.pop(name, None)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the checkout; skips where it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"real data is not here: {folder}")
    return folder


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder of the demo model's shape, hardly pretrained: real files, made in seconds."""
    from qlora_core.demo.base import build_demo_base

    folder = tmp_path_factory.mktemp("base") / "tiny"
    build_demo_base(folder, steps=2)
    return folder


@pytest.fixture(scope="session")
def make_project(tiny_base: Path) -> Callable[[Path], Path]:
    """A function that writes a small job (two short trials, 100 rows) into a folder and returns its config's path."""

    def write(folder: Path) -> Path:
        rows = [
            {"instruction": f"Question {n}: name a thing that is {colour}.", "output": thing}
            for n in range(20)
            for colour, thing in ANSWERS.items()
        ]
        (folder / "data").mkdir(parents=True)
        (folder / "data" / "rows.json").write_text(json.dumps(rows))
        config = folder / "pipeline.yaml"
        config.write_text(TINY_CONFIG.format(base=tiny_base))
        return config

    return write


@pytest.fixture
def tiny_project(tmp_path: Path, make_project: Callable[[Path], Path]) -> Path:
    """The config of a small job of its own."""
    return make_project(tmp_path / "project")


Qlora = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def qlora() -> Qlora:
    """Run the installed `qlora` program: `qlora("run", config, "--json", env=...)`."""

    def run(*arguments: object, env: Mapping[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
        command = [str(BIN / "qlora"), *map(str, arguments)]
        return subprocess.run(command, env={**os.environ, **(env or {})}, capture_output=True, text=True)

    return run


def free_port() -> int:
    """A TCP port on loopback that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(command: list[str], env: dict[str, str], log: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A background process in a group of its own, ended with all its children when the block ends."""
    with log.open("wb") as stream:
        process = subprocess.Popen(command, env=env, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def wait_for_http(url: str, *, timeout_s: float, process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Return once `url` answers 200; fail with the log's end if the process dies or time runs out."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.5)
    pytest.fail(f"{url} did not answer; its log ends:\n{log.read_text()[-3000:]}")


@pytest.fixture(scope="session")
def background() -> Callable[..., contextlib.AbstractContextManager["subprocess.Popen[bytes]"]]:
    """`with background(command, env, log):` keeps a process and its children running for the block."""
    return running


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A real Prefect server on loopback, the session's; yields the environment of its clients."""
    with running_prefect_server(tmp_path_factory.mktemp("prefect-server")) as env:
        yield env


@pytest.fixture(scope="module")
def own_prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A real Prefect server that no other module's pools, deployments and runs are on."""
    with running_prefect_server(tmp_path_factory.mktemp("prefect-server")) as env:
        yield env


@contextlib.contextmanager
def running_prefect_server(folder: Path) -> Iterator[dict[str, str]]:
    """A Prefect server with its state in the folder while the block runs; the environment of its clients."""
    port = free_port()
    env = {**os.environ, "PREFECT_HOME": str(folder), "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "5"}
    log = folder / "server.log"
    command = [str(BIN / "prefect"), "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with running(command, env, log) as process:
        wait_for_http(f"http://127.0.0.1:{port}/api/health", timeout_s=180, process=process, log=log)
        yield {**env, "PREFECT_API_URL": f"http://127.0.0.1:{port}/api", "PREFECT_SERVER_LOG": str(log)}
