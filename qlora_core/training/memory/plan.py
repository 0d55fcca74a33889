"""Chooses how a trial runs so that it fits the memory there is, and says so where it cannot; nothing is loaded.

What is chosen changes no result beyond rounding: how stored layers execute, whether activations are computed again, and
how an effective batch is cut into micro-batches. Knows nothing of sweeps, folders or machines.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from qlora_core.errors import TrainingError
from qlora_core.training.memory.parts import (
    MemoryParts,
    Workload,
    adapter_sizes,
    state_bytes,
    training_parts,
    validation_parts,
)
from qlora_core.training.memory.shapes import CALIBRATED, ModelShapes

IMPORT_FLOOR_BYTES = {"cpu": 650 << 20, "cuda": 600 << 20}
"""What a process holds before any model: its libraries on a CPU (measured), a CUDA context on a GPU (assumed)."""

_SMALLEST_PAGED = 100_000  # elements; bitsandbytes keeps smaller buffers where they are
_RESIDENCIES = ("dense", "scratch")
_TIGHT = 0.9
_FEWEST_TOKENS = 64


@dataclass(frozen=True)
class MemoryPlan:
    """How a trial is to run, and what it takes.

    `training` and `validation` are the parts at the worst moment of each. `peak_bytes` is the larger sum, without the
    `import_floor_bytes` of the process. `paged_bytes` of it, the optimizer's state, can leave a GPU for the host.
    `available_bytes` None: not known, and then everything fits. `reasons` are sentences.
    """

    device: str
    residency: str
    gradient_checkpointing: bool
    micro_batch_size: int
    gradient_accumulation_steps: int
    pack_size: int
    training: MemoryParts
    validation: MemoryParts
    paged_bytes: int
    import_floor_bytes: int
    available_bytes: int | None
    reasons: tuple[str, ...]

    @property
    def peak_bytes(self) -> int:
        """The most that is held at once, training or validating."""
        return max(self.training.total_bytes, self.validation.total_bytes)

    @property
    def needed_bytes(self) -> int:
        """What must be free for a process: the peak and the libraries, without what can be paged out."""
        return self.peak_bytes + self.import_floor_bytes - self.paged_bytes

    @property
    def fits(self) -> bool:
        """Whether that is available."""
        return self.available_bytes is None or self.needed_bytes <= self.available_bytes


def plan_memory(
    shapes: ModelShapes,
    work: Workload,
    available_bytes: int | None,
    device: str,
    *,
    residency: str = "auto",
    fixed: bool = False,
) -> MemoryPlan:
    """The first way of running the trial that fits; where none does, the last one tried, with `fits` False.

    Dense and without gradient checkpointing comes first, then the scratch, then checkpointing, then smaller
    micro-batches with as many more of them, so that the effective batch stays the same. A residency other than "auto"
    is kept, and checkpointing is never switched off. `fixed` keeps micro-batch and checkpointing too: for a trainer
    that takes them as they are configured.
    """
    plan = _measure(shapes, work, "dense", available_bytes, device)
    for way in _ways(work.train.micro_batch_size, residency, work.train.gradient_checkpointing, fixed=fixed):
        plan = _measure(shapes, _run_in(work, way), way.residency, available_bytes, device)
        if plan.fits:
            break
    return replace(plan, reasons=tuple(_reasons(plan, shapes, work, residency)))


def refuse_unfit(plan: MemoryPlan, shapes: ModelShapes, work: Workload, *, residency: str, fixed: bool = False) -> None:
    """Nothing where the plan fits.

    Raises:
        TrainingError: it does not; with the bytes needed and available, and the first single setting that would do.
    """
    if plan.fits:
        return
    remedy = find_remedy(plan, shapes, work, residency=residency, fixed=fixed)
    way_out = f"set {remedy}" if remedy else "no single setting would do: use a smaller base or more memory"
    raise TrainingError(
        f"a trial needs {plan.needed_bytes} bytes ({_gib(plan.needed_bytes)}) of {plan.device} memory at its peak, and "
        f"{plan.available_bytes} ({_gib(plan.available_bytes or 0)}) are available; {way_out}"
    )


def find_remedy(
    plan: MemoryPlan, shapes: ModelShapes, work: Workload, *, residency: str, fixed: bool = False
) -> str | None:
    """The first single setting with which the trial would fit, as `section.field: value`; None where none does."""
    for setting, changed, way in _remedies(work, residency):
        tried = plan_memory(shapes, changed, plan.available_bytes, plan.device, residency=way, fixed=fixed)
        if tried.fits:
            return setting
    return None


@dataclass(frozen=True)
class _Way:
    residency: str
    gradient_checkpointing: bool
    micro_batch_size: int


def _ways(micro_batch_size: int, residency: str, checkpointing: bool, *, fixed: bool) -> Iterator[_Way]:
    residencies = _RESIDENCIES if residency == "auto" else (residency,)
    sizes = [micro_batch_size] if fixed else _divisors(micro_batch_size)
    choices = (checkpointing,) if fixed or checkpointing else (False, True)
    for size in sizes:
        for recomputed in choices:
            for chosen in residencies:
                yield _Way(chosen, recomputed, size)


def _divisors(number: int) -> list[int]:
    """From the number itself down to 1."""
    small = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return sorted({*small, *(number // size for size in small)}, reverse=True)


def _run_in(work: Workload, way: _Way) -> Workload:
    train = work.train
    update: dict[str, Any] = {
        "gradient_checkpointing": way.gradient_checkpointing,
        "micro_batch_size": way.micro_batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation_steps
        * (train.micro_batch_size // way.micro_batch_size),
    }
    return replace(work, train=train.model_copy(update=update))


def _measure(
    shapes: ModelShapes, work: Workload, residency: str, available_bytes: int | None, device: str
) -> MemoryPlan:
    compute_bytes = bytes_of_precision(work.train.precision, device)
    paged = device == "cuda" and work.train.optimizer.startswith("paged")
    train = work.train
    states = [
        state_bytes(n, train.optimizer) for n in adapter_sizes(shapes, work.lora).values() if n >= _SMALLEST_PAGED
    ]
    return MemoryPlan(
        device=device,
        residency=residency,
        gradient_checkpointing=train.gradient_checkpointing,
        micro_batch_size=train.micro_batch_size,
        gradient_accumulation_steps=train.gradient_accumulation_steps,
        pack_size=work.pack_size,
        training=training_parts(shapes, work, residency, compute_bytes, device),
        validation=validation_parts(shapes, work, residency, compute_bytes, device),
        paged_bytes=work.pack_size * sum(states) if paged else 0,
        import_floor_bytes=IMPORT_FLOOR_BYTES[device],
        available_bytes=available_bytes,
        reasons=(),
    )


def bytes_of_precision(precision: str, device: str) -> int:
    """Bytes of a number of the compute dtype; `auto` is bfloat16 on a GPU and float32 on a CPU."""
    if precision == "auto":
        return 2 if device == "cuda" else 4
    return {"float32": 4, "bfloat16": 2}[precision]


def _remedies(work: Workload, residency: str) -> Iterator[tuple[str, Workload, str]]:
    train = work.train
    if residency in ("dense", "bitsandbytes"):
        yield "compute.residency: scratch", work, "scratch"
    if not train.gradient_checkpointing:
        yield "train.gradient_checkpointing: true", _with(work, gradient_checkpointing=True), residency
    for size in _divisors(train.micro_batch_size)[1:]:
        steps = train.gradient_accumulation_steps * (train.micro_batch_size // size)
        changed = _with(work, micro_batch_size=size, gradient_accumulation_steps=steps)
        yield f"train.micro_batch_size: {size} with train.gradient_accumulation_steps: {steps}", changed, residency
    rank = train.lora_rank
    while (rank := rank // 2) >= 1:
        yield f"train.lora_rank: {rank}", _with(work, lora_rank=rank), residency
    tokens = max(work.sequence_tokens, work.validation_tokens)
    while (tokens := tokens // 2) >= _FEWEST_TOKENS:
        shorter = replace(
            work,
            sequence_tokens=min(tokens, work.sequence_tokens),
            validation_tokens=min(tokens, work.validation_tokens),
        )
        yield f"data.max_tokens: {tokens}", shorter, residency
    if train.optimizer != "paged_adamw_8bit":
        yield "train.optimizer: paged_adamw_8bit", _with(work, optimizer="paged_adamw_8bit"), residency


def _with(work: Workload, **settings: Any) -> Workload:
    return replace(work, train=work.train.model_copy(update=settings))


def _reasons(plan: MemoryPlan, shapes: ModelShapes, work: Workload, residency: str) -> Iterator[str]:
    if plan.available_bytes is None:
        yield "The system does not say how much memory is available, so the plan was not checked against it."
    elif not plan.fits:
        yield f"Nothing that keeps the results fits: {_gib(plan.needed_bytes)} are needed at least."
    if residency == "auto":
        fit = plan.fits and plan.available_bytes is not None
        if plan.residency == "dense":
            yield "The dequantized weights fit, so every layer is dense." if fit else "Every layer is taken as dense."
        else:
            yield "The dequantized weights do not fit, so layers share one scratch buffer."
    else:
        yield f"compute.residency asks for {residency}."
    if plan.gradient_checkpointing and not work.train.gradient_checkpointing:
        yield "The activations do not fit, so they are computed again in the backward pass; results stay the same."
    if plan.micro_batch_size < work.train.micro_batch_size:
        yield (
            f"A micro-batch of {work.train.micro_batch_size} does not fit; micro-batches of {plan.micro_batch_size}, "
            f"{plan.gradient_accumulation_steps} times a step, differ by rounding only."
        )
    if plan.validation.total_bytes > plan.training.total_bytes:
        yield "The peak is in the validation, whose batches do not follow train.micro_batch_size."
    yield from _optimizer_reasons(plan, work)
    if not shapes.calibrated:
        yield (
            f"Activations of {shapes.model_type} were never compared with what autograd keeps; the figures were for "
            f"{', '.join(CALIBRATED)}."
        )


def _optimizer_reasons(plan: MemoryPlan, work: Workload) -> Iterator[str]:
    optimizer = work.train.optimizer
    if plan.device == "cpu":
        if optimizer.startswith("paged"):
            yield f"{optimizer} has nothing to page to on a CPU; its state stays where it is."
        return
    available = plan.available_bytes
    if available is None:
        return
    if plan.paged_bytes and plan.needed_bytes <= available < plan.needed_bytes + plan.paged_bytes:
        yield f"Memory will spike: {_gib(plan.paged_bytes)} of optimizer state leave the GPU for the host at the peak."
    elif optimizer == "adamw" and plan.needed_bytes > _TIGHT * available:
        yield "Memory will spike near the limit; train.optimizer: paged_adamw_32bit lets the optimizer's state leave."


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
