"""The memory plan as lines of text. Knows the keys of `estimate_memory`, and not how they came about."""

from collections.abc import Iterator, Mapping
from typing import Any


def memory_lines(memory: Mapping[str, Any]) -> Iterator[str]:
    """A table of the parts while training and validating, the choice, and its reasons; a note stands for itself."""
    if "note" in memory:
        yield f"memory: {memory['note']}"
        return
    yield f"{'memory of a worker, MiB':<26}{'training':>12}{'validation':>12}"
    training, validation = memory["training"], memory["validation"]
    for name, size in training.items():
        yield f"  {name.removesuffix('_bytes').replace('_', ' '):<24}{_mib(size)}{_mib(validation[name])}"
    yield f"  {'sum':<24}{_mib(sum(training.values()))}{_mib(sum(validation.values()))}"
    yield f"  {'libraries, besides':<24}{_mib(memory['import_floor_bytes'])}{_mib(memory['import_floor_bytes'])}"
    available = memory["available_bytes"]
    room = f"{'unknown':>12}" if available is None else _mib(available)
    yield f"  {'available on the ' + memory['device']:<24}{room}"
    runs = "runs" if memory["fits"] else "could run"
    recomputed = "with" if memory["gradient_checkpointing"] else "without"
    batches = f"{memory['micro_batch_size']} x {memory['gradient_accumulation_steps']}"
    yield f"{runs} {memory['residency']}, {recomputed} gradient checkpointing, micro-batches of {batches}"
    yield from memory["reasons"]
    if not memory["fits"]:
        remedy = memory["remedy"]
        yield f"does not fit as configured: {'set ' + remedy if remedy else 'no single setting would do'}"


def _mib(size: int) -> str:
    return f"{size / 2**20:>12,.1f}"
