"""A part of the job with its artifacts in a real S3-compatible server on loopback."""

import json
import logging
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]
Qlora = Callable[..., "subprocess.CompletedProcess[str]"]
BUCKET = "artifacts"


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, str]]:
    """The environment of a client of the server, with a bucket made."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    env = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "canary-never-shown",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    client = boto3.client(
        "s3",
        endpoint_url=env["AWS_ENDPOINT_URL"],
        aws_access_key_id="test",
        aws_secret_access_key="test",
        region_name="us-east-1",
    )
    client.create_bucket(Bucket=BUCKET)
    yield env
    server.stop()


def test_second_machine_takes_the_stage_from_s3(tiny_project: Path, qlora: Qlora, s3: dict[str, str]) -> None:
    store = ["--set", f"store=s3://{BUCKET}/team"]
    first = qlora("curate", tiny_project, "--json", *store, env=s3)
    assert first.returncode == 0, first.stderr
    elsewhere = [*store, "--set", "compute.work_dir=other-machine"]
    second = qlora("plan", tiny_project, "--json", *elsewhere, env=s3)
    assert {stage["name"]: stage["cached"] for stage in json.loads(second.stdout)["stages"]}["curate"] is True
    third = qlora("curate", tiny_project, "--json", *elsewhere, env=s3)
    assert json.loads(third.stdout)["digest"] == json.loads(first.stdout)["digest"]
    assert "curate: started" not in third.stderr
    assert str(tiny_project.parent / "other-machine") in json.loads(third.stdout)["path"]
    assert "canary" not in first.stdout + first.stderr + third.stdout + third.stderr


def test_missing_bucket_is_refused_before_any_work(tiny_project: Path, qlora: Qlora, s3: dict[str, str]) -> None:
    done = qlora("curate", tiny_project, "--set", "store=s3://absent/x", env=s3)
    assert done.returncode == 1
    assert "absent" in done.stderr
    assert "curate: started" not in done.stderr


def test_endpoint_that_is_away_is_refused_before_any_work(tiny_project: Path, qlora: Qlora, s3: dict[str, str]) -> None:
    away = {**s3, "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}
    done = qlora("curate", tiny_project, "--set", f"store=s3://{BUCKET}/x", env=away)
    assert done.returncode == 1
    assert "127.0.0.1:9" in done.stderr


class Requests(logging.Handler):
    """What the server was asked, line by line."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def test_second_run_asks_little_of_the_bucket_and_loads_nothing_heavy(
    tiny_project: Path, qlora: Qlora, s3: dict[str, str]
) -> None:
    command = ("run", tiny_project, "--json", "--set", f"store=s3://{BUCKET}/whole")
    first = qlora(*command, env=s3)
    assert first.returncode == 0, first.stderr
    requests = Requests()
    logging.getLogger("werkzeug").addHandler(requests)
    started = time.monotonic()
    second = qlora(*command, env={**s3, "PYTHONPROFILEIMPORTTIME": "1"})
    seconds = time.monotonic() - started
    logging.getLogger("werkzeug").removeHandler(requests)

    assert second.returncode == 0, second.stderr
    stages = json.loads(second.stdout)["stages"]
    assert [stage["name"] for stage in stages if not stage["cached"]] == []
    assert 0 < len(requests.lines) <= 3 * len(stages), requests.lines
    assert all('"GET' in line for line in requests.lines), requests.lines
    loaded = {line.rpartition("|")[2].strip() for line in second.stderr.splitlines() if line.startswith("import time:")}
    assert "boto3" in loaded
    assert loaded.isdisjoint({"torch", "ray", "prefect", "mlflow", "transformers"})
    # A generous bound, so that a busy machine does not fail it; what it takes on a quiet one is in the measurements.
    assert seconds < 20
