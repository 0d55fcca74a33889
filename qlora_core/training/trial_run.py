"""One trial in a slot of a pack: its rows, optimizer and counters, taken forward one micro-batch at a time.

Each step depends on the trial alone: row order and dropout are drawn from (seed, step), so neither the neighbours in
the pack, nor what ran before in the process, nor a resume can change it. Knows nothing of files and of when to stop.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from qlora_core.errors import NumericError, TrainingError
from qlora_core.training.adapter_config import check_loadable
from qlora_core.training.batches import BatchOrder
from qlora_core.training.examples import Examples
from qlora_core.training.guard import check_loss, check_norm
from qlora_core.training.optimizer import TrialOptimizer
from qlora_core.training.pack.factors import SlotWeights
from qlora_core.training.pack.layout import Part
from qlora_core.training.schedule import learning_rate, total_steps
from qlora_core.training.trial import Trial, TrialProgress


@dataclass
class Counters:
    """What a trial has behind it: part of every checkpoint. `recoveries` are the guard's, see `TrialRun.recover`."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    curve: list[dict[str, Any]] = field(default_factory=list)
    scores: dict[int, float] = field(default_factory=dict)
    recoveries: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class _OpenStep:
    """The effective batch that is being summed up: its examples, how many are done, and their loss sums so far.

    `weight` is what the sum of all is divided by.
    """

    places: list[int]
    weight: int
    done: int = 0
    sums: list[torch.Tensor] = field(default_factory=list)


class TrialRun:
    """A trial that can take steps on its `examples`. `slot` is its place in the pack, `weights` the adapter there.

    `most_rows`: micro-batches have no more examples than that, whatever the settings; their sums stay the same.
    """

    def __init__(
        self,
        trial: Trial,
        slot: int,
        weights: SlotWeights,
        examples: Examples,
        *,
        most_rows: int | None = None,
    ) -> None:
        self.trial = trial
        self.slot = slot
        self.weights = weights
        self.optimizer = TrialOptimizer(weights.flat(), trial.params)
        self.counters = Counters(scores=dict(trial.scores))
        self.total_steps = total_steps(trial.params, len(examples.lengths))
        self.micro_batch_size = min(trial.params.micro_batch_size, most_rows or trial.params.micro_batch_size)
        self._examples = examples
        self._open: _OpenStep | None = None
        self._order = BatchOrder(
            examples.lengths,
            trial.params.micro_batch_size * trial.params.gradient_accumulation_steps,
            seed=trial.params.seed,
            group_by_length=trial.params.group_by_length,
        )

    @property
    def between_steps(self) -> bool:
        """Whether the next micro-batch begins an effective batch."""
        return self._open is None

    @property
    def memory_bytes(self) -> int:
        """Bytes of what belongs to the trial alone: adapter, gradients and optimizer state."""
        held = (tensor for value in self.weights.flat().values() for tensor in (value, value.grad))
        return self.optimizer.state_bytes + sum(tensor.nbytes for tensor in held if tensor is not None)

    def next_part(self) -> tuple[Part, int]:
        """The next micro-batch, and what the loss sum of the whole effective batch it belongs to is divided by."""
        if self._open is None:
            skipped = sum(recovery["skipped_batches"] for recovery in self.counters.recoveries)
            places = self._order.batch(self.counters.step + skipped)
            self._open = _OpenStep(places, self._examples.weight(places))
        begun = self._open
        places = begun.places[begun.done : begun.done + self.micro_batch_size]
        part = self._examples.part(places, self.slot, begun.done, self.counters.step, self.trial.params)
        return part, begun.weight

    def take(self, loss_sum: torch.Tensor, seconds: float) -> bool:
        """Add the loss sum (nats) of the last part, whose gradients are in the slot; True once a step was taken by it.

        `seconds` is the share of time the part took.

        Raises:
            NumericError: loss or gradient norm is not finite, or the loss jumped. No weight has changed in this step.
        """
        begun = self._open
        if begun is None:
            raise TrainingError(f"trial {self.trial.id} was handed a loss without a micro-batch")
        begun.sums.append(loss_sum)
        begun.done += self.micro_batch_size
        self.counters.seconds += seconds
        if begun.done < len(begun.places):
            return False
        self._finish(begun)
        return True

    def drop_open_step(self) -> None:
        """Forget the effective batch that is being summed up; the next part begins it anew."""
        self._open = None
        self.optimizer.drop_gradients()

    def halve_micro_batch(self) -> bool:
        """Take half as many rows at a time from here on, which changes rounding only; False at one row."""
        self.drop_open_step()
        if self.micro_batch_size == 1:
            return False
        self.micro_batch_size = -(-self.micro_batch_size // 2)
        return True

    def _finish(self, begun: _OpenStep) -> None:
        started = time.perf_counter()
        params, step = self.trial.params, self.counters.step
        rate = learning_rate(params, step, self.total_steps) * self.rate_factor
        # Read once a step: every read waits for a GPU
        sums = torch.stack(begun.sums).double().tolist()
        loss = math.fsum(sums) / begun.weight
        ids, tokens = self._examples.ids(begun.places), self._examples.tokens(begun.places)
        check_loss(loss, [entry["loss"] for entry in self.counters.curve], params, step + 1, ids)
        norm = torch.nn.utils.clip_grad_norm_(self.weights.flat().values(), params.max_grad_norm).item()
        check_norm(norm, step + 1, rate, ids)
        self.optimizer.step(rate)
        self._open = None
        self.counters.step += 1
        self.counters.tokens += tokens
        self.counters.seconds += time.perf_counter() - started
        entry = {"step": step + 1, "loss": loss, "learning_rate": rate, "grad_norm": norm, "tokens": tokens}
        self.counters.curve.append(entry)

    @property
    def rate_factor(self) -> float:
        """What the schedule's rate is multiplied by: halved at every recovery."""
        return 0.5 ** len(self.counters.recoveries)

    def recover(self, fault: NumericError, back_at: Counters) -> None:
        """Go on after a roll-back to `back_at`: at half the rate, past the batches that led to the fault."""
        reached = self.counters.step
        skipped = reached - back_at.step + 1
        recovery = {"step": reached + 1, "back_to": back_at.step, "skipped_batches": skipped, "cause": str(fault)}
        self.counters = replace(back_at, seconds=self.counters.seconds, recoveries=[*back_at.recoveries, recovery])

    def state(self) -> dict[str, Any]:
        """The counters as JSON data."""
        counters = self.counters
        return {
            "step": counters.step,
            "tokens": counters.tokens,
            "seconds": counters.seconds,
            "curve": counters.curve,
            "scores": [{"step": step, "loss": loss} for step, loss in sorted(counters.scores.items())],
            "recoveries": counters.recoveries,
            "optimizer": self.optimizer.description,
        }

    @torch.no_grad()
    def restore(
        self, state: Mapping[str, Any], adapter: Mapping[str, torch.Tensor], optimizer: Mapping[str, torch.Tensor]
    ) -> None:
        """Continue from what `state`, the adapter's tensors and the optimizer's tensors were at a checkpoint.

        Raises:
            TrainingError: tensors that do not fit this trial.
        """
        parameters = dict(self.weights.named())
        check_loadable(adapter, parameters)
        for name, parameter in parameters.items():
            parameter.copy_(adapter[name])
        self.optimizer.load_state_tensors(optimizer)
        self.drop_open_step()
        scores = {score["step"]: score["loss"] for score in state.get("scores", ())} | dict(self.trial.scores)
        self.counters = Counters(
            state["step"],
            state["tokens"],
            state["seconds"],
            list(state["curve"]),
            scores,
            list(state.get("recoveries", ())),
        )

    def progress(
        self, validation_loss: float | None, error: str | None = None, reward_accuracy: float | None = None
    ) -> TrialProgress:
        """Where the trial stands; without a validation loss or an error it counts as interrupted."""
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
            interrupted=validation_loss is None and error is None,
            error=error,
            micro_batch_size=self.micro_batch_size,
            recoveries=list(counters.recoveries),
            reward_accuracy=reward_accuracy,
        )

    def progress_at(self, step: int) -> TrialProgress | None:
        """Where the trial stood after an earlier `step`; None where its validation loss there is not known."""
        if step >= self.counters.step or step not in self.counters.scores:
            return None
        curve = [entry for entry in self.counters.curve if entry["step"] <= step]
        tokens = sum(entry["tokens"] for entry in curve)
        return replace(self.progress(self.counters.scores[step]), step=step, curve=curve, tokens=tokens)
