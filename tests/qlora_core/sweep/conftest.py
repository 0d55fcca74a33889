"""Ray for the tests of the sweep, local and as a cluster of several nodes on loopback; the toy sweep as a module for
its workers to unpickle, and as a program; tiny real inputs.
"""

import contextlib
import importlib.util
import json
import os
import random
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import polars
import pytest

from qlora_core.config.quantize import QuantizeConfig
from qlora_core.sweep.ray_connection import ray_connection

TOY = Path(__file__).with_name("toy_sweep.py")
CLUSTER = Path(__file__).with_name("loopback_cluster.py")
VOCABULARY = 64


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    with ray_connection(None, 2):
        yield


@pytest.fixture(scope="session")
def toy(local_ray: None) -> Iterator[ModuleType]:
    import ray.cloudpickle

    spec = importlib.util.spec_from_file_location("toy_sweep", TOY)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot load {TOY}")
    module = importlib.util.module_from_spec(spec)
    sys.modules["toy_sweep"] = module
    spec.loader.exec_module(module)
    # Worker processes do not have tests on their path: the class travels with the call.
    ray.cloudpickle.register_pickle_by_value(module)
    yield module
    del sys.modules["toy_sweep"]


class LoopbackCluster:
    """A real cluster of `nodes` nodes with a slot each, in processes of their own, that asks for a token.

    `settings` are Ray's own, as variables of the environment of the cluster and of its drivers.
    """

    def __init__(self, nodes: int, log: Path, settings: Mapping[str, str] | None = None) -> None:
        token = secrets.token_hex(32)
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": token,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
            **(settings or {}),
        }
        self.log = log
        with log.open("ab") as stream:
            self.process = subprocess.Popen(
                [sys.executable, str(CLUSTER), str(nodes)],
                env=self.environment,
                start_new_session=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                text=True,
            )
        self.address: str = self._answer()["address"]

    def tell(self, command: str) -> dict[str, Any]:
        """`kill PID`, the node of that worker, or `add` one; returns once that is done."""
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self._answer()

    def drive(self, work_dir: Path, step_seconds: float, settings: Mapping[str, Any]) -> subprocess.Popen[bytes]:
        """The toy sweep as a driver process of its own on this cluster; its log is `driver.log` in `work_dir`."""
        work_dir.mkdir(parents=True, exist_ok=True)
        arguments = [str(work_dir), str(step_seconds), json.dumps({**settings, "address": self.address})]
        with (work_dir / "driver.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, str(TOY), *arguments],
                env=self.environment,
                start_new_session=True,
                stdout=log,
                stderr=log,
            )

    def end(self) -> None:
        """Shut it down; returns when its processes have been told to end."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"the cluster ended: {self.log.read_text()[-2000:]}")


@pytest.fixture(scope="module")
def make_loopback(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[..., LoopbackCluster]]:
    """A function that starts a cluster of so many nodes of one slot, and a head without, with settings of Ray's."""
    with contextlib.ExitStack() as running:

        def start(nodes: int, settings: Mapping[str, str] | None = None) -> LoopbackCluster:
            log = tmp_path_factory.mktemp("cluster") / "cluster.log"
            try:
                cluster = LoopbackCluster(nodes, log, settings)
            except RuntimeError:
                # Ray gives a node 30 s to come up, which a machine busy with other work may miss.
                cluster = LoopbackCluster(nodes, log, settings)
            running.callback(cluster.end)
            return cluster

        yield start


@pytest.fixture(scope="module")
def loopback(make_loopback: Callable[..., LoopbackCluster]) -> LoopbackCluster:
    """Three nodes of one slot and a head without."""
    return make_loopback(3)


@pytest.fixture(scope="session")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of one layer as a stored NF4 checkpoint."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from qlora_core.quantization.quantize import quantize_checkpoint

    folder = tmp_path_factory.mktemp("base")
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=32, tie_word_embeddings=False, **sizes)
        LlamaForCausalLM(config).save_pretrained(folder / "plain")
    (folder / "plain" / "tokenizer.json").write_text("{}")
    quantize_checkpoint(folder / "plain", folder / "nf4", QuantizeConfig())
    return folder / "nf4"


@pytest.fixture(scope="session")
def curated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows that count upwards: easy to learn at a good rate, and not at all at a tiny one."""
    folder = tmp_path_factory.mktemp("curated")
    generator = random.Random(0)
    for split, count in (("train", 24), ("validation", 6)):
        starts = [generator.randrange(VOCABULARY) for _ in range(count)]
        rows = {
            "id": [f"{split}-{place}" for place in range(count)],
            "input_ids": [[(start + offset) % VOCABULARY for offset in range(10)] for start in starts],
            "loss_mask": [[False] * 2 + [True] * 8] * count,
        }
        polars.DataFrame(rows).write_parquet(folder / f"{split}-00000-of-00001.parquet")
    (folder / "tokenizer").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / "tokenizer" / name).write_text(f"the {name}")
    return folder
