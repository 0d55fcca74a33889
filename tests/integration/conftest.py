"""The whole system on loopback, as `python -m infra.loopback` starts it, for tests of its nights and of its doors."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
CANARY = "canary-that-must-not-sing-5b1f"
"""Stands in the environment of all that is started, under names that hold secrets."""


@dataclass(frozen=True)
class Stack:
    """The system that runs, as `python -m infra.loopback` describes it."""

    process: "subprocess.Popen[str]"
    folder: Path
    ports: dict[str, int]
    settings: dict[str, str]
    environment: dict[str, str]
    canary: str = CANARY

    def processes(self) -> list[psutil.Process]:
        return [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]


def read_environment(path: Path) -> dict[str, str]:
    shown = subprocess.run(["sh", "-c", f". {path} && env -0"], env={}, capture_output=True, text=True, check=True)
    return dict(line.split("=", 1) for line in shown.stdout.split("\0") if line)


def start_stack(folder: Path, error: Path) -> Stack:
    with error.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "infra.loopback", "--dir", str(folder)],
            cwd=ROOT,
            env={**os.environ, "OPENAI_API_KEY": CANARY, "HF_TOKEN": CANARY, "SOME_PASSWORD": CANARY},
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, error.read_text()[-3000:]
    said = json.loads(line)
    return Stack(process, folder, said["ports"], said["settings"], read_environment(Path(said["env"])))


def stop_stack(stack: Stack) -> None:
    stack.process.send_signal(signal.SIGINT)
    try:
        stack.process.wait(timeout=90)
    finally:
        stack.process.kill()


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    if not (shutil.which("initdb") or list(Path("/usr/lib/postgresql").glob("*/bin/initdb"))):
        pytest.skip("Postgres is not installed here (Debian: apt-get install postgresql)")
    # Not pytest's folder: Postgres runs as another user where this is root's, and may not pass through that one.
    folder = Path(tempfile.mkdtemp(prefix="qlora-stack-", dir="/tmp"))
    stack = start_stack(folder, tmp_path_factory.mktemp("stack") / "stderr")
    try:
        yield stack
    finally:
        if stack.process.poll() is None:
            stop_stack(stack)
        shutil.rmtree(folder, ignore_errors=True)
