"""Nights on the whole system: a first champion, nothing new, poisoned data, a better champion, and that one undone.

Prefect and MLflow on Postgres, artifacts in an S3-compatible store, Ray with a token; the demo's base and tasks.
"""

import base64
import contextlib
import json
import os
import random
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
import pyarrow.parquet as pq
import pytest

from qlora_core.demo.tasks import make_tasks

if TYPE_CHECKING:
    from conftest import Stack

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]
ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
POISONED = ("counting", "before", "kind")
CONFIG = """\
data: {{sources: [data], max_tokens: 256, split: {{validation: 0.05, test: 0.2}}, tags: {{languages: [en, de]}}}}
base: {{model: demo}}
train: {{lora_rank: 16, epochs: 2, micro_batch_size: 16, gradient_accumulation_steps: 1, learning_rate: 5e-3,
         lora_dropout: 0.0, optimizer: adamw}}
sweep: {{space: {{learning_rate: [5e-3]}}, storage: "{storage}"}}
evaluate: {{max_prompts: 0, resamples: 500, judge: {{kind: none}}}}
gate: {{slices: {{by: category, margin: 0.5, min_items: 5, underpowered: waive}}}}
registry: {{tracking_uri: "{tracking}"}}
store: {store}
compute: {{workers: 1, ray_address: "{ray}", work_dir: work}}
"""
Qlora = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def client(stack: "Stack") -> dict[str, str]:
    return {
        **os.environ,
        **stack.environment,
        "HF_TOKEN": stack.canary,
        "SOME_PASSWORD": stack.canary,
        "QLORA_POOL": "local",
    }


def write_rows(config: Path, *, poisoned: frozenset[str] = frozenset()) -> int:
    """Write the night's data; the answers of the poisoned questions are shuffled among them. Returns how many."""
    tasks = make_tasks(200, random.Random(0))
    bad = [task for task in tasks if task.prompt in poisoned]
    answers = [task.answer for task in bad]
    random.Random(1).shuffle(answers)
    shuffled = {task.prompt: answer for task, answer in zip(bad, answers, strict=True)}
    rows = [
        {
            "messages": [
                {"role": "user", "content": task.prompt},
                {"role": "assistant", "content": shuffled.get(task.prompt, task.answer)},
            ],
            "category": task.category,
        }
        for task in tasks
    ]
    (config.parent / "data" / "rows.json").write_text(json.dumps(rows))
    return len(bad)


@pytest.fixture(scope="module")
def config(stack: "Stack", client: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job")
    (folder / "data").mkdir()
    path, settings = folder / "pipeline.yaml", stack.settings
    path.write_text(
        CONFIG.format(
            storage=settings["sweep.storage"],
            tracking=settings["registry.tracking_uri"],
            store=settings["store"],
            ray=settings["compute.ray_address"],
        )
    )
    write_rows(path)
    prefect({**client, "QLORA_CONFIG": str(path)}, "deploy", "--all", "--prefect-file", "deployments/prefect.yaml")
    return path


def prefect(client: dict[str, str], *arguments: str) -> str:
    command = [str(BIN / "prefect"), "--no-prompt", *arguments]
    done = subprocess.run(command, env=client, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def prefect_api(client: dict[str, str], path: str, body: dict[str, Any]) -> Any:
    token = base64.b64encode(client["PREFECT_API_AUTH_STRING"].encode()).decode()
    headers = {"Content-Type": "application/json", "Authorization": f"Basic {token}"}
    request = urllib.request.Request(client["PREFECT_API_URL"] + path, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def night(client: dict[str, str], config: Path, *overrides: str) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Run `retrain/nightly` to its end; returns Prefect's flow run, and the summary of a run that did something."""
    known = set(config.parent.glob("work/runs/*/summary.json"))
    command = ["deployment", "run", "retrain/nightly", "-p", f"overrides={json.dumps(overrides)}", "--watch"]
    subprocess.run([str(BIN / "prefect"), "--no-prompt", *command], env=client, cwd=ROOT, capture_output=True)
    begun = {"flow_runs": {"start_time": {"is_null_": False}}, "sort": "START_TIME_DESC", "limit": 1}
    (run,) = prefect_api(client, "/flow_runs/filter", begun)  # those on schedule have not begun
    if run["state"]["type"] != "COMPLETED":
        logged = {"logs": {"flow_run_id": {"any_": [run["id"]]}, "level": {"ge_": 30}}, "limit": 50}
        told = "\n".join(line["message"] for line in prefect_api(client, "/logs/filter", logged))
        pytest.fail(f"{run['state']['message']}\n{told}")
    new = set(config.parent.glob("work/runs/*/summary.json")) - known
    return run, json.loads(new.pop().read_text()) if new else None


def training_questions(config: Path, client: dict[str, str], qlora: Qlora) -> dict[str, str]:
    """The questions that the split gives to training, with their category."""
    done = qlora("curate", config, "--json", env=client)
    assert done.returncode == 0, done.stderr[-3000:]
    files = Path(json.loads(done.stdout)["path"]).glob("train-*.parquet")
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    return {row["messages"][0]["content"]: row["category"] for row in rows}


def test_first_night_promotes_over_the_base(client: dict[str, str], config: Path) -> None:
    _, summary = night(client, config)
    assert summary is not None
    assert (summary["verdict"], summary["model_version"]) == ("PROMOTE", "1"), summary["reasons"]


def test_second_night_without_new_data_does_nothing_in_under_ten_seconds(client: dict[str, str], config: Path) -> None:
    run, summary = night(client, config)
    assert (run["state"]["message"], summary) == ("no new data, no GPU", None)
    assert run["total_run_time"] < 10


def test_third_night_with_a_quarter_of_answers_shuffled_is_rejected_and_the_slice_named(
    client: dict[str, str], config: Path, qlora: Qlora
) -> None:
    # Of training's rows alone: what is held out tells right answers from wrong ones.
    training = training_questions(config, client, qlora)
    chosen = frozenset(question for question, category in training.items() if category in POISONED)
    assert 0.2 < write_rows(config, poisoned=chosen) / len(training) < 0.3
    _, summary = night(client, config)
    assert summary is not None and summary["verdict"] == "REJECT", summary
    named = [reason for reason in summary["reasons"] if reason.startswith("A slice got worse")]
    assert named and all(any(f"'{one}'" in reason for one in POISONED) for reason in named), summary["reasons"]
    told = json.loads(qlora("history", config, "--json", env=client).stdout)
    assert told["champion"] == "1"


def test_rollback_gives_the_alias_back_to_the_version_before(
    client: dict[str, str], config: Path, qlora: Qlora
) -> None:
    write_rows(config)
    _, summary = night(client, config, "train.epochs=5")
    assert summary is not None and summary["verdict"] == "PROMOTE", summary
    better = summary["model_version"]
    undone = qlora("rollback", config, "--reason", "a customer complained", "--json", env=client)
    assert undone.returncode == 0, undone.stderr[-3000:]
    told = json.loads(qlora("history", config, "--json", env=client).stdout)
    assert told["champion"] == "1"
    last = told["moves"][-1]
    assert (last["previous"], last["version"], last["reason"]) == (better, "1", "a customer complained")


def test_no_secret_is_in_any_log_artifact_field_or_report(stack: "Stack", config: Path, client: dict[str, str]) -> None:
    names = ("AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "RAY_AUTH_TOKEN", "PGPASSWORD")
    secrets = {stack.canary, client["PREFECT_API_AUTH_STRING"].partition(":")[2], *(client[name] for name in names)}
    needles = [secret.encode() for secret in secrets] + [base64.b64encode(client["PREFECT_API_AUTH_STRING"].encode())]
    places = files_of(stack.folder, config.parent) | objects_of(client)
    for kind in ("flow_runs", "task_runs", "logs", "artifacts", "deployments", "work_pools", "block_documents"):
        places[f"prefect:{kind}"] = json.dumps(prefect_api(client, f"/{kind}/filter", {"limit": 200})).encode()
    # Controls: what was meant to be looked through was.
    for part in ("report.html", "/postgres/base/", "s3:mlflow/", "/ref/decided/"):
        assert any(part in name for name in places), part
    found = {name: needle for name, content in places.items() for needle in needles if needle in content}
    assert found == {}


def files_of(*folders: Path) -> dict[str, bytes]:
    """Every file below, but the one that hands the credentials to the stack's user."""
    places = {}
    for path in (path for folder in folders for path in folder.rglob("*")):
        with contextlib.suppress(FileNotFoundError):
            if path.is_file() and path.name != "stack.env":
                places[str(path)] = path.read_bytes()
    return places


def objects_of(client: dict[str, str]) -> dict[str, bytes]:
    """Every object in the bucket."""
    bucket = boto3.client(
        "s3",
        endpoint_url=client["AWS_ENDPOINT_URL"],
        aws_access_key_id=client["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=client["AWS_SECRET_ACCESS_KEY"],
        region_name="us-east-1",
    )
    pages = bucket.get_paginator("list_objects_v2").paginate(Bucket="artifacts")
    keys = [entry["Key"] for page in pages for entry in page["Contents"]]
    return {f"s3:{key}": bucket.get_object(Bucket="artifacts", Key=key)["Body"].read() for key in keys}
