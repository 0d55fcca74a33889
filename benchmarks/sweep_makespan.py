"""A sweep of 16 configurations, start to end, against a fresh process for each with PEFT and bitsandbytes.

Ours is the command a user types, `qlora sweep`, with halving on two workers, over data and a quantized base from the
store; its imports, Ray's start and the export are in its time. The peer is `benchmarks.sweep_peer`, two processes at a
time, no pruning. Its trials are alike in length, so one round of two is run, the winner and the runner-up of ours, and
its makespan is that round times eight. Same rows, order, masks, effective batch, optimizer, schedule; one thread each.

Also: the CPU from a trial's dispatch to the end of its first step on a warm worker, against a fresh process's.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars

from qlora_core.config.load import load_config
from qlora_core.data.shards import shard_files
from qlora_core.demo.starter import write_starter
from qlora_core.pipeline.pipeline import Pipeline
from qlora_core.sweep.worker import SweepWorker

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
SPACE = {"learning_rate": [1e-4, 3e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2], "lora_rank": [4, 8]}
WORKERS = 2
STEPS = {"demo": 240, "stories": 300}
PRUNING = {"reduction_factor": 4, "min_steps": 15}
TRAIN = {
    "micro_batch_size": 1, "gradient_accumulation_steps": 4, "lora_dropout": 0.0, "optimizer": "adamw",
    "schedule": "wsd", "checkpoint_every_steps": 60,
}  # fmt: skip
CONFIGURATIONS = 16


def measure() -> dict[str, Any]:
    """Makespans and their ratio for the demo and, where the real data is beside the checkout, for a real base."""
    figures: dict[str, Any] = {"configurations": CONFIGURATIONS, "workers": WORKERS, "pruning": PRUNING, "train": TRAIN}
    for name in STEPS:
        if name == "stories" and not SHARED.is_dir():
            figures[name] = f"skipped: {SHARED} is not there"
            continue
        with tempfile.TemporaryDirectory() as folder:
            figures[name] = compare(name, Path(folder))
    return figures


def compare(name: str, folder: Path) -> dict[str, Any]:
    """Both ways over one base and data set."""
    config = write_config(name, folder)
    base, curated, quantized = prepared(config)
    started = time.perf_counter()
    done = run([str(Path(sys.executable).with_name("qlora")), "sweep", str(config), "--json"])
    ours_s = time.perf_counter() - started
    swept = json.loads(done)
    rows = sorted(swept["trials"], key=lambda row: (-row["steps"], row["loss"]))
    best = next(row for row in rows if row["id"] == swept["best"])
    pair = [best, next(row for row in rows if row["id"] != best["id"])]
    started = time.perf_counter()
    peers = peer_round(base, curated, [{**TRAIN, **row["params"]} for row in pair], STEPS[name])
    round_s = time.perf_counter() - started
    warm = warm_start(quantized, curated, {**TRAIN, **best["params"], "max_steps": STEPS[name]}, folder / "warm")
    fresh = min(peer["first_step"]["cpu_s"] for peer in peers)
    return {
        "steps": STEPS[name],
        "ours_s": round(ours_s, 1),
        "ours_steps": sum(row["steps"] for row in rows),
        "peer_round_s": round(round_s, 1),
        "peer_makespan_s": round(round_s * CONFIGURATIONS / WORKERS, 1),
        "makespan_ratio": round(round_s * CONFIGURATIONS / WORKERS / ours_s, 2),
        "winner": {**varied(best), "ours": best["loss"], "peer": peers[0]["loss"]},
        "runner_up": {**varied(pair[1]), "ours_steps": pair[1]["steps"], "peer": peers[1]["loss"]},
        "trials": [{**varied(row), "steps": row["steps"], "loss": row["loss"]} for row in rows],
        "winner_loss_over_best_peer": round(best["loss"] / min(peer["loss"] for peer in peers), 4),
        "first_step_cpu_s": {"warm_worker": round(warm, 4), "fresh_process": round(fresh, 3)},
        "first_step_cpu_ratio": round(fresh / warm, 1),
    }


def varied(row: Mapping[str, Any]) -> dict[str, Any]:
    """What of a trial's settings the sweep searched."""
    return {name: row["params"][name] for name in SPACE}


def write_config(name: str, folder: Path) -> Path:
    """A pipeline config of the sweep, as JSON, which YAML is."""
    config, _ = write_starter(folder)
    data: dict[str, Any] = {"sources": ["data"], "max_tokens": 256, "over_long": "drop"}
    model = "demo"
    if name == "stories":
        data["sources"] = [str(SHARED / "sft" / "dolly_3k.json")]
        data |= {"split": {"validation": 0.02, "test": 0.03}, "tags": {"languages": ["en", "de", "fr", "es", "nl"]}}
        model = str(SHARED / "models" / "stories260K-hf")
    sweep = {"space": SPACE, "pruning": PRUNING}
    train = {**TRAIN, "max_steps": STEPS[name]}
    sections = {"data": data, "base": {"model": model}, "train": train, "sweep": sweep, "compute": {"workers": WORKERS}}
    config.write_text(json.dumps(sections))
    return config


def prepared(config: Path) -> tuple[Path, Path, Path]:
    """The base, curated rows and quantized base: in the store from now on, and their folders."""
    pipeline = Pipeline(load_config(config))
    curated, quantized = (pipeline.run(stage).artifact.path for stage in ("curate", "quantize"))
    external = pipeline.job.external_base
    return (pipeline.run("base").artifact.path if external is None else external.folder), curated, quantized


def peer_round(base: Path, curated: Path, points: list[Mapping[str, Any]], steps: int) -> list[dict[str, Any]]:
    """So many peers at once, each a fresh process; what they print."""
    commands = [
        [sys.executable, "-m", "benchmarks.sweep_peer", str(base), str(curated), json.dumps(dict(point)), str(steps)]
        for point in points
    ]
    running = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for command in commands]
    outputs = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise SystemExit("a peer ended with an error; see above")
    return [json.loads(output) for output in outputs]


def warm_start(quantized: Path, curated: Path, params: Mapping[str, Any], folder: Path) -> float:
    """CPU seconds of a loaded worker from the call with a new trial to the end of its first step; the median of 3.

    The call goes on to a validation, of one row here, and to the trial's checkpoint: both count against us.
    """
    worker = SweepWorker(str(quantized), str(_with_one_row(curated, folder / "rows")), str(folder), "auto")
    worker.load()
    spent = []
    for number in range(4):
        trial = {"id": f"t{number:03d}", "params": params, "rungs": []}
        begun = time.process_time()
        worker.run([trial], [1])
        spent.append(time.process_time() - begun)
        worker.let_go()
    return statistics.median(spent[1:])


def _with_one_row(curated: Path, folder: Path) -> Path:
    """The curated set with a validation split of one row."""
    shutil.copytree(curated, folder)
    first, *others = shard_files(folder, "validation")
    polars.read_parquet(curated / first.name).head(1).write_parquet(first)
    for other in others:
        polars.read_parquet(curated / other.name).clear().write_parquet(other)
    return folder


def run(command: list[str]) -> str:
    """The standard output of a command that ends well."""
    done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout
