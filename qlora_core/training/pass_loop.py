"""One pass over the base for the trials of a pack, in smaller passes where memory does not suffice.

Knows nothing of checkpoints or of when a trial ends.
"""

import logging
import time
from collections.abc import Iterator, Sequence

import torch

from qlora_core.errors import TrainingError
from qlora_core.training.pack.pack import Pack
from qlora_core.training.trial_run import TrialRun

logger = logging.getLogger(__name__)


def train_pass(pack: Pack, runs: Sequence[TrialRun]) -> Iterator[tuple[TrialRun, TrainingError | None]]:
    """Compute the next micro-batch of every run together; yields each run that took a step or cannot take it, and why.

    Out of memory, half as many runs are computed at a time from then on; one alone takes half as many rows at a time,
    which changes its result by rounding only. A run for which memory does not suffice for one row gets an error.
    """
    size = pack.most_together or len(runs)
    for start in range(0, len(runs), size):
        yield from _train_group(pack, runs[start : start + size])


def _train_group(pack: Pack, runs: Sequence[TrialRun]) -> Iterator[tuple[TrialRun, TrainingError | None]]:
    started = time.perf_counter()
    try:
        taken = [run.next_part() for run in runs]
        sums = pack.backward([part for part, _ in taken], [count for _, count in taken])
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        sums = None
    if sums is None:
        # Out of the handler, whose traceback holds the failed pass's tensors
        yield from _ask_for_less(pack, runs)
        return
    seconds = (time.perf_counter() - started) / len(runs)
    for run, loss_sum in zip(runs, sums, strict=True):
        try:
            if run.take(loss_sum, seconds):
                yield run, None
        except TrainingError as error:
            yield run, error


def _ask_for_less(pack: Pack, runs: Sequence[TrialRun]) -> Iterator[tuple[TrialRun, TrainingError | None]]:
    _let_go(pack)
    for run in runs:  # gradients of the failed pass may be half there, so every step in it begins anew
        run.drop_open_step()
    if len(runs) > 1:
        pack.most_together = -(-len(runs) // 2)
        logger.warning("out of memory with %d trials in a pass; now %d at a time", len(runs), pack.most_together)
        return
    (run,) = runs
    if run.halve_micro_batch():
        logger.warning("trial %s is out of memory; now %d rows at a time", run.trial.id, run.micro_batch_size)
        return
    fault = TrainingError(
        f"memory does not suffice for one row of trial {run.trial.id}; lower data.max_tokens or train.lora_rank, or "
        "set train.gradient_checkpointing"
    )
    yield run, fault


def _let_go(pack: Pack) -> None:
    if pack.base.device.type == "cuda":
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch or Python says that memory did not suffice."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
