"""One local Ray for all tests of the sweep, the toy sweep as a module for its workers to unpickle, tiny real inputs."""

import importlib.util
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import polars
import pytest

from qlora_core.config.quantize import QuantizeConfig
from qlora_core.sweep.ray_connection import ray_connection

TOY = Path(__file__).with_name("toy_sweep.py")
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
