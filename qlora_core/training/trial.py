"""What a trial is and what comes back from training one: small, frozen, plain data that may cross processes.

Knows nothing of models, tensors or how trials are chosen.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qlora_core.config.train import TrainConfig
from qlora_core.errors import TrainingError


@dataclass(frozen=True)
class Trial:
    """One QLoRA training: its settings, and the name under which its checkpoints are kept.

    `scores` are its validation losses by step, as far as they are known: its checkpoints carry them, so that whoever
    goes on from one can tell how the trial stood earlier.
    """

    id: str
    params: TrainConfig
    scores: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", self.id):
            raise TrainingError(
                f"trial id {self.id!r} cannot name a folder; use letters, digits, dot, dash and underscore, 100 at most"
            )


@dataclass(frozen=True)
class TrialProgress:
    """Where a trial stands after a segment of training.

    `curve` has one entry per optimizer step: `step` (from 1), `loss` (nats per trained token over the effective batch,
    before the update; per pair where pairs are learned from), `learning_rate`, `grad_norm` (before clipping), `tokens`
    (trained tokens of the step).
    `tokens` and `seconds` add up over all segments. `validation_loss` is in the same unit, and None only when
    `interrupted` or with an `error`. Interrupted: training was asked to stop, the checkpoint holds everything, and the
    same call goes on from it. `reward_accuracy`: the share of validation pairs whose better answer has the higher
    implicit reward; None where none are scored, and for a loss known from before.
    `optimizer` says what really ran, with any departure from the setting; `micro_batch_size` how many rows at a time in
    the end. `error` says why the trial cannot go on; its neighbours in the pack did. `recoveries` are its roll-backs:
    at which `step`, `back_to` which, the `cause`, and how many batches were skipped.
    """

    id: str
    step: int
    total_steps: int
    curve: list[dict[str, Any]]
    validation_loss: float | None
    tokens: int
    seconds: float
    optimizer: str
    interrupted: bool = False
    error: str | None = None
    micro_batch_size: int = 0
    recoveries: list[dict[str, Any]] = field(default_factory=list)
    reward_accuracy: float | None = None
