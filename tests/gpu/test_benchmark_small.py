"""The GPU benchmark's own code, at a size for any machine: on a CPU it must find equal losses and finite figures."""

import math

import pytest
import torch

from benchmarks.gpu import ADAPTERS, measure
from benchmarks.random_checkpoint import LlamaShape

SMALL = LlamaShape(hidden=64, intermediate=128, vocabulary=2048, layers=2, heads=4, key_value_heads=2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: `make bench-gpu` measures the real shape")
def test_every_part_of_the_gpu_benchmark_runs_small() -> None:
    figures = measure(SMALL, long_tokens=48, short_tokens=8, device="cpu")
    assert figures["quantize"]["over_read"] > 0 and 0 < figures["dequantize"]["of_copy_bandwidth"] < math.inf
    for title in ("1 x 48 tokens", f"{ADAPTERS} x 8 tokens"):
        assert all(0 < rate < math.inf for rate in figures[title]["tokens_per_s"].values())
        assert figures[title]["ratio_wall"] > 0 and figures[title]["planned_bytes"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_the_benchmark_says_so() -> None:
    with pytest.raises(SystemExit, match="for cuda, and this machine has cpu"):
        measure(SMALL)
