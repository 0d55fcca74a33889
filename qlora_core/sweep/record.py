"""What is known of one trial of a sweep, as JSON data. Knows nothing of Optuna, workers or how trials are chosen."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

STORED = (
    "loss", "steps", "total_steps", "seconds", "tokens", "optimizer", "error", "curve", "rungs", "deaths", "recoveries",
    "micro_batch_size",
)  # fmt: skip
"""Fields kept in the study beside a trial's parameters and state."""


@dataclass
class TrialRecord:
    """One trial. `loss` is the validation loss (nats per trained token) at `steps`, None before the first rung.

    `state`: waiting | complete | pruned | failed. `rungs` has one {"step", "loss"} per comparison, `curve` one entry
    per optimizer step. `seconds` is what workers spent on it, repeated work included. `deaths` counts workers that
    died while training it, `recoveries` are its roll-backs and
    `micro_batch_size` the rows computed at a time (see TrialProgress).
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
            self.rungs.append({"step": progress["step"], "loss": loss})

    def stored(self) -> dict[str, Any]:
        """The fields the study keeps, as JSON data."""
        return {name: getattr(self, name) for name in STORED}

    def restore(self, stored: Mapping[str, Any]) -> None:
        """Take back what `stored` gave."""
        for name in STORED:
            setattr(self, name, stored[name])

    def row(self) -> dict[str, Any]:
        """The trial as it stands in `sweep.json`. A failed trial has no loss: what it reached before is in `rungs`."""
        row = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {**row, "loss": None if self.state == "failed" else self.loss}


def _finite(entry: Mapping[str, Any]) -> dict[str, Any]:
    # JSON has no NaN or infinity; an unmeasurable gradient norm becomes null.
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in entry.items()
    }
