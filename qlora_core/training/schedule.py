"""How many steps a trial has, and the learning rate of each: pure functions of the step, so a resume needs no state.

Knows nothing of optimizers. T is the trial's total number of optimizer steps, w its warm-up steps, s the number of
steps already done (0 before the first step, T after the last).
"""

import math

from qlora_core.config.train import TrainConfig
from qlora_core.errors import TrainingError

SCHEDULES = ("constant", "linear", "cosine", "wsd")
# Hägele et al. 2024 (Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations): a linear cooldown over
# a fifth of the steps ends where a tuned cosine does.
WSD_DECAY_SHARE = 0.2


def steps_per_epoch(params: TrainConfig, rows: int) -> int:
    """Optimizer steps of one pass over `rows` rows; the last one may have a smaller effective batch."""
    return math.ceil(rows / (params.micro_batch_size * params.gradient_accumulation_steps))


def total_steps(params: TrainConfig, rows: int) -> int:
    """Optimizer steps of a whole trial: `max_steps` where it is set, else `epochs` passes, rounded up.

    `rows` counts training rows with at least one trained token.

    Raises:
        TrainingError: there are no rows.
    """
    if rows < 1:
        raise TrainingError(f"there are {rows} training rows with a trained token; curate a dataset with at least one")
    if params.max_steps is not None:
        return params.max_steps
    # 0.1 epochs of 30 steps is 3.0000000000000004 in floating point, which must not become 4
    return max(1, math.ceil(round(params.epochs * steps_per_epoch(params, rows), 6)))


def warmup_steps(params: TrainConfig, total: int) -> int:
    """Warm-up steps w = ceil(warmup_ratio T), at most T - 1 so that one step has the full rate."""
    return min(math.ceil(round(params.warmup_ratio * total, 6)), total - 1)


def rate_multiplier(schedule: str, step: int, total: int, warmup: int) -> float:
    """The factor on the learning rate for the step taken after `step` = s steps, 0 <= s <= T.

    Warm-up, under every schedule, for s < w: (s + 1) / (w + 1), so that no step is wasted on a rate of zero. Then:

        constant  1
        linear    (T - s) / (T - w)
        cosine    (1 + cos(pi (s - w) / (T - w))) / 2
        wsd       1 until s = T - d, then (T - s) / d, with d = min(ceil(T / 5), T - w) steps of decay

    The decaying schedules reach 0 at s = T, where no step is taken any more.

    Raises:
        TrainingError: an unknown schedule, a step outside 0..T, or a warm-up that leaves no step.
    """
    if schedule not in SCHEDULES:
        raise TrainingError(f"schedule {schedule!r} is unknown; choose one of {', '.join(SCHEDULES)}")
    if not 0 <= step <= total or not 0 <= warmup < max(total, 1):
        raise TrainingError(f"step {step} of {total} with {warmup} warm-up steps is outside the schedule")
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == "linear":
        return (total - step) / (total - warmup)
    if schedule == "cosine":
        return (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2
    if schedule == "wsd":
        decay = min(math.ceil(WSD_DECAY_SHARE * total), total - warmup)
        return min(1.0, (total - step) / decay)
    return 1.0


def learning_rate(params: TrainConfig, step: int, total: int) -> float:
    """The learning rate of the step taken after `step` steps of a trial with `total` steps."""
    return params.learning_rate * rate_multiplier(params.schedule, step, total, warmup_steps(params, total))
