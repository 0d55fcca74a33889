"""One trial in place on the base: adapter, optimizer, data order and counters, taken step by step.

Each step depends on the trial alone: row order and dropout are drawn from (seed, step), so neither what ran before in
the process nor a resume can change it. Knows nothing of files and of when to stop.
"""

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from qlora_core.data.dataset import TokenRow
from qlora_core.errors import TrainingError
from qlora_core.training.batches import BatchOrder, MicroBatch, collate
from qlora_core.training.lora import AttachedAdapter
from qlora_core.training.loss import accumulate_gradients
from qlora_core.training.optimizer import TrialOptimizer
from qlora_core.training.schedule import learning_rate, total_steps
from qlora_core.training.trial import Trial, TrialProgress


@dataclass
class Counters:
    """What a trial has behind it: part of every checkpoint."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    curve: list[dict[str, Any]] = field(default_factory=list)
    scores: dict[int, float] = field(default_factory=dict)


class TrialRun:
    """A trial that can take steps."""

    def __init__(self, trial: Trial, adapter: AttachedAdapter, rows: Sequence[TokenRow]) -> None:
        self.trial = trial
        self.adapter = adapter
        self.optimizer = TrialOptimizer(adapter.parameters, trial.params)
        self.counters = Counters(scores=dict(trial.scores))
        self.total_steps = total_steps(trial.params, len(rows))
        self._rows = rows
        self._order = BatchOrder(
            [len(row.input_ids) for row in rows],
            trial.params.micro_batch_size * trial.params.gradient_accumulation_steps,
            seed=trial.params.seed,
            group_by_length=trial.params.group_by_length,
        )

    def train_step(self) -> None:
        """Take the next optimizer step and add it to the curve.

        The caller owns the random generators (see `own_generators`) and has put the adapter into train mode.

        Raises:
            TrainingError: loss or gradient norm is not finite. No weight has changed in this step then.
        """
        started = time.perf_counter()
        params, step = self.trial.params, self.counters.step
        rate = learning_rate(params, step, self.total_steps)
        batches = self._micro_batches(step)
        tokens = sum(batch.trained_tokens for batch in batches)
        torch.manual_seed(_dropout_seed(params.seed, step))
        sums = accumulate_gradients(self.adapter.base, batches, tokens)
        _check_losses(sums, batches, step + 1)
        norm = torch.nn.utils.clip_grad_norm_(self.adapter.parameters.values(), params.max_grad_norm).item()
        _check_norm(norm, batches, step + 1, rate)
        self.optimizer.step(rate)
        self.counters.step += 1
        self.counters.tokens += tokens
        self.counters.seconds += time.perf_counter() - started
        self.counters.curve.append(
            {
                "step": self.counters.step,
                "loss": math.fsum(sums) / tokens,
                "learning_rate": rate,
                "grad_norm": norm,
                "tokens": tokens,
            }
        )

    def state(self) -> dict[str, Any]:
        """The counters as JSON data."""
        counters = self.counters
        return {
            "step": counters.step,
            "tokens": counters.tokens,
            "seconds": counters.seconds,
            "curve": counters.curve,
            "scores": [{"step": step, "loss": loss} for step, loss in sorted(counters.scores.items())],
            "optimizer": self.optimizer.description,
        }

    def restore(
        self, state: Mapping[str, Any], adapter: Mapping[str, torch.Tensor], optimizer: Mapping[str, torch.Tensor]
    ) -> None:
        """Continue from what `state`, the adapter's tensors and the optimizer's tensors were at a checkpoint.

        Raises:
            TrainingError: tensors that do not fit this trial.
        """
        self.adapter.load(adapter)
        self.optimizer.load_state_tensors(optimizer)
        scores = {score["step"]: score["loss"] for score in state.get("scores", ())} | dict(self.trial.scores)
        self.counters = Counters(state["step"], state["tokens"], state["seconds"], list(state["curve"]), scores)

    def progress(self, validation_loss: float | None) -> TrialProgress:
        """Where the trial stands; without a validation loss it counts as interrupted."""
        counters = self.counters
        return TrialProgress(
            id=self.trial.id,
            step=counters.step,
            total_steps=self.total_steps,
            curve=list(counters.curve),
            validation_loss=validation_loss,
            tokens=counters.tokens,
            seconds=counters.seconds,
            optimizer=self.optimizer.description,
            interrupted=validation_loss is None,
        )

    def progress_at(self, step: int) -> TrialProgress | None:
        """Where the trial stood after an earlier `step`; None where its validation loss there is not known."""
        if step >= self.counters.step or step not in self.counters.scores:
            return None
        curve = [entry for entry in self.counters.curve if entry["step"] <= step]
        tokens = sum(entry["tokens"] for entry in curve)
        return replace(self.progress(self.counters.scores[step]), step=step, curve=curve, tokens=tokens)

    def _micro_batches(self, step: int) -> list[MicroBatch]:
        rows = [self._rows[index] for index in self._order.batch(step)]
        size = self.trial.params.micro_batch_size
        device = self.adapter.base.device
        return [collate(rows[start : start + size], device) for start in range(0, len(rows), size)]


def _dropout_seed(seed: int, step: int) -> int:
    """63 bits from (trial seed, step): dropout draws the same masks for a step however the run got there."""
    return int.from_bytes(hashlib.sha256(f"dropout/{seed}/{step}".encode()).digest()[:8]) >> 1


def _check_losses(sums: Sequence[float], batches: Sequence[MicroBatch], step: int) -> None:
    for loss, batch in zip(sums, batches, strict=True):
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss of step {step} is {loss} on rows {list(batch.row_ids)}; the step was not taken. Look at "
                "these rows, lower train.learning_rate, or use train.precision: float32"
            )


def _check_norm(norm: float, batches: Sequence[MicroBatch], step: int, rate: float) -> None:
    if not math.isfinite(norm):
        rows = [row for batch in batches for row in batch.row_ids]
        raise TrainingError(
            f"the gradient norm of step {step} is {norm} at learning rate {rate:g} on rows {rows}; the step was not "
            "taken. Look at these rows, lower train.learning_rate, or use train.precision: float32"
        )
