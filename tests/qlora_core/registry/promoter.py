"""Promoters in a process of their own, for the tests of races and of death halfway: `race` and `die`.

race URI MODEL START VERSION...   one thread per version; "ready", begins with the file START, a JSON answer per line
die URI MODEL                     per line "VERSION POINT" on standard input: a forked promoter that is killed at its
                                  POINT-th moment, before (even) or after (odd) one of its writes; prints its fate
"""

import json
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlflow.artifacts  # noqa: F401  loaded before the fork: it takes seconds
from mlflow import MlflowClient

from qlora_core.registry.promotion import promote

WRITES = (
    "set_registered_model_tag",
    "set_registered_model_alias",
    "delete_registered_model_alias",
    "set_model_version_tag",
)


def race(uri: str, model: str, start: Path, versions: list[str]) -> list[dict[str, Any]]:
    sys.stdout.write("ready\n")
    sys.stdout.flush()

    def run(version: str) -> dict[str, Any]:
        while not start.exists():
            time.sleep(0.01)
        return promote(uri, model, version=version)

    with ThreadPoolExecutor(len(versions)) as pool:
        return list(pool.map(run, versions))


def die_at(point: int) -> None:
    """Let this process be killed at its `point`-th moment."""
    moment = iter(range(10_000))

    def die_if_due() -> None:
        if next(moment) == point:
            os.kill(os.getpid(), signal.SIGKILL)

    def guarded(write: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            die_if_due()
            result = write(*arguments, **named)
            die_if_due()
            return result

        return call

    for name in WRITES:
        setattr(MlflowClient, name, guarded(getattr(MlflowClient, name)))


def serve_deaths(uri: str, model: str) -> None:
    for line in sys.stdin:
        version, point = line.split()
        child = os.fork()
        if child == 0:
            die_at(int(point))
            promote(uri, model, version=version)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        sys.stdout.write(("killed" if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}") + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    if sys.argv[1] == "race":
        for answer in race(sys.argv[2], sys.argv[3], Path(sys.argv[4]), sys.argv[5:]):
            sys.stdout.write(json.dumps(answer) + "\n")
    else:
        serve_deaths(sys.argv[2], sys.argv[3])
