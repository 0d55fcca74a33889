"""Which layers are dense, by memory, settings and patterns."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from qlora_core.available_memory import available_memory_bytes
from qlora_core.errors import ConfigError, ModelError
from qlora_core.model.base import load_quantized
from qlora_core.model.residency.layers import ResidentLinear4bit
from qlora_core.model.residency.plan import memory_for_weights, plan_residency

# The tiny Llama's 4-bit layers in each of its two decoder layers, in bytes of float32
MLP = 64 * 96 * 4  # gate, up, down: 3
SQUARE = 64 * 64 * 4  # q, o: 2
NARROW = 64 * 32 * 4  # k, v: 2
ALL = 2 * (3 * MLP + 2 * SQUARE + 2 * NARROW)


def counts(plan: Mapping[str, str]) -> dict[str, int]:
    return {way: list(plan.values()).count(way) for way in sorted(set(plan.values()))}


def dense(plan: Mapping[str, str]) -> set[str]:
    return {name.rpartition(".")[2] for name, way in plan.items() if way == "dense"}


@pytest.mark.parametrize(
    ("available", "expected"),
    [
        (ALL, {"dense": 14}),
        (ALL - 1, {"dense": 12, "scratch": 2}),  # one buffer serves both
        (6 * MLP + SQUARE, {"dense": 6, "scratch": 8}),
        (6 * MLP + SQUARE - 1, {"dense": 6, "scratch": 8}),
        (2 * MLP - 1, {"dense": 1, "scratch": 13}),  # a smaller one beside the scratch of the largest
        (MLP, {"scratch": 14}),
        (MLP - 1, {"bitsandbytes": 6, "scratch": 8}),
        (0, {"bitsandbytes": 14}),
        (None, {"scratch": 14}),
    ],
)
def test_auto_fills_the_memory_there_is(
    shared_model: PreTrainedModel, available: int | None, expected: dict[str, int]
) -> None:
    plan = plan_residency(shared_model, available)
    assert len(plan) == 14
    if available is not None:
        sizes = {name: layer_bytes(shared_model, name) for name in plan}
        taken = sum(sizes[name] for name, way in plan.items() if way == "dense")
        scratch = max((sizes[name] for name, way in plan.items() if way == "scratch"), default=0)
        assert taken + scratch <= available
    assert counts(plan) == {way: count for way, count in expected.items() if count}


def layer_bytes(model: PreTrainedModel, name: str) -> int:
    layer: torch.nn.Module = model.get_submodule(name)
    assert isinstance(layer, ResidentLinear4bit)
    return layer.in_features * layer.out_features * 4


def test_the_largest_layers_are_dense_first(shared_model: PreTrainedModel) -> None:
    assert dense(plan_residency(shared_model, 6 * MLP + SQUARE)) == {"gate_proj", "up_proj", "down_proj"}
    assert dense(plan_residency(shared_model, 6 * MLP + 4 * SQUARE + NARROW)) == {
        "gate_proj", "up_proj", "down_proj", "q_proj", "o_proj",
    }  # fmt: skip


def test_a_wish_goes_before_memory_and_a_pattern_before_the_wish(shared_model: PreTrainedModel) -> None:
    assert counts(plan_residency(shared_model, ALL, "scratch")) == {"scratch": 14}
    assert counts(plan_residency(shared_model, ALL, "bitsandbytes")) == {"bitsandbytes": 14}
    patterns = {"model.layers.0.*": "bitsandbytes", "*.q_proj": "dense"}
    plan = plan_residency(shared_model, ALL, "scratch", patterns)
    assert plan["model.layers.0.self_attn.q_proj"] == "bitsandbytes", "the first pattern that matches counts"
    assert plan["model.layers.1.self_attn.q_proj"] == "dense"
    assert plan["model.layers.1.self_attn.k_proj"] == "scratch"
    # What a pattern makes dense is taken from what auto may spend
    plan = plan_residency(shared_model, 2 * NARROW + MLP + 1, "auto", {"*.k_proj": "dense"})
    assert dense(plan) == {"k_proj"}


def test_a_model_without_4_bit_layers_has_an_empty_plan() -> None:
    assert plan_residency(torch.nn.Linear(2, 2), 0) == {}


def test_what_cannot_be_is_refused(shared_model: PreTrainedModel, nf4_folder: Path) -> None:
    with pytest.raises(ConfigError, match="residency 'sparse' is unknown; choose auto, dense, scratch, bits"):
        load_quantized(nf4_folder, device="cpu", residency="sparse")
    with pytest.raises(ConfigError, match="residency 'auto' is unknown; choose dense, scratch, bitsandbytes"):
        plan_residency(shared_model, 0, "auto", {"*": "auto"})
    with pytest.raises(ConfigError, match=r"'\*\.query' matches none of the 14 4-bit layers .*q_proj"):
        plan_residency(shared_model, 0, "auto", {"*.query": "dense"})
    with pytest.raises(ModelError, match=f"14 of 14 layers are to be dense, which takes {ALL} bytes, and {ALL - 1} a"):
        plan_residency(shared_model, ALL - 1, "dense")


def test_loading_follows_the_plan(nf4_folder: Path) -> None:
    model = load_quantized(nf4_folder, device="cpu", residency="scratch", layer_residency={"*.down_proj": "dense"})
    ways = {name: module.residency for name, module in model.named_modules() if isinstance(module, ResidentLinear4bit)}
    assert dense(ways) == {"down_proj"}
    assert counts(ways) == {"dense": 2, "scratch": 12}
    half = load_quantized(nf4_folder, precision="bfloat16", device="cpu", residency="dense")
    assert {buffer.dtype for name, buffer in half.named_buffers() if "dense" in name} == {torch.bfloat16}


# What a machine says of its memory


def test_auto_takes_half_and_sharers_divide_it() -> None:
    whole = memory_for_weights("cpu", "dense")
    half = memory_for_weights("cpu", "auto", sharers=2)
    assert whole is not None and half is not None
    assert 0.2 < half / whole < 0.3


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A made-up /proc and /sys/fs/cgroup of 1000 KiB available."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal:  4000 kB\nMemFree:  10 kB\nMemAvailable:  1000 kB\n")
    (tmp_path / "proc/self/cgroup").write_text("")
    return tmp_path


def available(machine: Path) -> int | None:
    return available_memory_bytes("cpu", proc=machine / "proc", cgroups=machine / "cgroup")


def write_group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / f"memory.{name}").write_text(text)


def test_without_limits_the_kernel_is_believed(machine: Path) -> None:
    assert available(machine) == 1000 * 1024
    (machine / "proc/self/cgroup").write_text("0::/job\n")
    write_group(machine / "cgroup/job", max="max\n", current="5\n")
    assert available(machine) == 1000 * 1024


def test_the_tightest_limit_above_the_process_counts(machine: Path) -> None:
    (machine / "proc/self/cgroup").write_text("0::/outer/inner\n")
    write_group(machine / "cgroup/outer", max="9000\n", current="5000\n", stat="anon 1\ninactive_file 200\n")
    write_group(machine / "cgroup/outer/inner", max="max\n", current="4000\n")
    assert available(machine) == 9000 - 5000 + 200


def test_version_1_groups_and_the_container_s_own_root_count(machine: Path) -> None:
    (machine / "proc/self/cgroup").write_text("4:cpu:/x\n3:memory,pids:/docker/abc\n")
    statistics = "inactive_file 1\ntotal_inactive_file 50\n"
    write_group(machine / "cgroup/memory", limit_in_bytes="8000\n", usage_in_bytes="7000\n", stat=statistics)
    assert available(machine) == 8000 - 7000 + 50


def test_a_group_over_its_limit_has_nothing_left(machine: Path) -> None:
    (machine / "proc/self/cgroup").write_text("0::/\n")
    write_group(machine / "cgroup", max="100\n", current="300\n")
    assert available(machine) == 0


def test_a_system_that_does_not_say_is_not_guessed(tmp_path: Path) -> None:
    assert available(tmp_path) is None
