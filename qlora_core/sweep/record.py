"""What is known of one trial of a sweep, as JSON data. Knows nothing of Optuna, workers or how trials are chosen."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

STORED = (
    "loss", "steps", "total_steps", "seconds", "tokens", "optimizer", "error", "curve", "rungs", "deaths", "recoveries",
    "micro_batch_size", "preemptions", "alone", "adapter_parameters",
    "reward_accuracy",
)  # fmt: skip
"""Fields kept in the study beside a trial's parameters and state."""

_DISPATCHED = ("worker", "reached")
_NOT_SHOWN = (*_DISPATCHED, "alone")
"""How it came about, on one fleet or another, is no part of a result."""


@dataclass
class TrialRecord:
    """One trial. `loss` is the validation loss (nats per trained token) at `steps`, None before the first rung.

    `state`: waiting | complete | pruned | failed. `rungs` has one {"step", "loss"} per comparison, `curve` one entry
    per optimizer step. `seconds` is what workers spent on it, repeated work included. `deaths` counts workers that
    died while training it and `preemptions` those whose node went away, `recoveries` are its roll-backs and
    `micro_batch_size` the rows computed at a time (see TrialProgress). `adapter_parameters`: trained numbers of it.
    `reward_accuracy` belongs to `loss` and is there for preference pairs only, as in their rungs.

    `worker` has it, or had it last; `reached` is the number of the deepest rung it was let go on to. `alone`: no
    neighbour is to share its fate. `role`: trial, or a finalist's extra run "seed" or "check" of the trial `of`.
    """

    id: str
    params: dict[str, Any]
    state: str = "waiting"
    loss: float | None = None
    steps: int = 0
    total_steps: int | None = None
    seconds: float = 0.0
    tokens: int = 0
    optimizer: str | None = None
    error: str | None = None
    curve: list[dict[str, Any]] = field(default_factory=list)
    rungs: list[dict[str, Any]] = field(default_factory=list)
    deaths: int = 0
    recoveries: list[dict[str, Any]] = field(default_factory=list)
    micro_batch_size: int | None = None
    preemptions: int = 0
    alone: bool = False
    adapter_parameters: int | None = None
    reward_accuracy: float | None = None
    worker: str | None = None
    reached: int = 0
    role: str = "trial"
    of: str | None = None

    @property
    def number(self) -> int:
        """Optuna's number of the trial."""
        return int(self.id[1:])

    def values(self, objectives: Sequence[str]) -> list[float] | None:
        """What the objectives are, in their order; None where one of them is not known."""
        known = {"loss": self.loss, "adapter_size": self.adapter_parameters, "tokens": self.tokens}
        found = [known[name] for name in objectives]
        return None if any(value is None for value in found) else [float(value) for value in found if value is not None]

    @property
    def rung_losses(self) -> dict[int, float]:
        """Loss by step, over the rungs reached."""
        return {rung["step"]: rung["loss"] for rung in self.rungs}

    def add_progress(self, progress: Mapping[str, Any]) -> None:
        """Take in a worker's report at a segment's end: the fields of TrialProgress, `seconds` of this segment only.

        Curve entries of steps that were trained twice (after a worker died) are replaced, not repeated.
        """
        by_step = {entry["step"]: entry for entry in [*self.curve, *progress["curve"]]}
        self.curve = [_finite(by_step[step]) for step in sorted(by_step)]
        self.steps = max(self.steps, progress["step"])
        self.total_steps = progress["total_steps"]
        self.tokens = progress["tokens"]
        self.optimizer = progress["optimizer"]
        self.recoveries = progress["recoveries"]
        self.micro_batch_size = progress["micro_batch_size"]
        self.seconds = round(self.seconds + progress["seconds"], 3)
        loss = progress["validation_loss"]
        if loss is not None and math.isfinite(loss):
            self.loss = loss
            self.reward_accuracy = accuracy = progress.get("reward_accuracy")
            known = {} if accuracy is None else {"reward_accuracy": accuracy}
            self.rungs.append({"step": progress["step"], "loss": loss, **known})

    def stored(self) -> dict[str, Any]:
        """The fields the study keeps, as JSON data."""
        return {name: getattr(self, name) for name in STORED}

    def restore(self, stored: Mapping[str, Any]) -> None:
        """Take back what `stored` and `dispatched` gave; what is missing stays as it is."""
        for name in stored.keys() & {*STORED, *_DISPATCHED}:
            setattr(self, name, stored[name])

    def dispatched(self) -> dict[str, Any]:
        """Who has the trial and how far it was let go on, as JSON data."""
        return {name: getattr(self, name) for name in _DISPATCHED}

    def row(self) -> dict[str, Any]:
        """The trial as it stands in `sweep.json`. A failed trial has no loss: what it reached before is in `rungs`."""
        row = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name not in _NOT_SHOWN}
        return {**row, "loss": None if self.state == "failed" else self.loss}


def _finite(entry: Mapping[str, Any]) -> dict[str, Any]:
    # JSON has no NaN or infinity; an unmeasurable gradient norm becomes null.
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in entry.items()
    }
