"""At which steps trials are compared. Pure arithmetic: knows nothing of losses, studies or workers.

Rung k of a trial stands at `min_steps * reduction_factor**k` optimizer steps, the last one at its end. Without
`min_steps` the first rung is a quarter of each trial's own steps, so that trials of different length are compared
after equal shares of their work. A rung that would fall into a trial's warm-up moves to the first step after it: a
loss at a learning rate that is still rising says little about the trial.

Every trial of a cohort gets the same number of rungs, so that rung k of one can be compared with rung k of another; a
short trial may therefore have several rungs at its end, and stands at the later ones with its final loss.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from qlora_core.config.sweep import PruningConfig

_FIRST_SHARE = 0.25


@dataclass(frozen=True)
class TrialLength:
    """Optimizer steps of one trial, and how many of them are warm-up."""

    total_steps: int
    warmup_steps: int


def plan_rungs(lengths: Mapping[str, TrialLength], pruning: PruningConfig) -> dict[str, tuple[int, ...]]:
    """For each trial the steps at which it is compared, never falling; the last is its end. Empty in, empty out.

    Without pruning, and for a lone trial, there is nothing to compare on the way: one rung, the end.
    """
    if not pruning.enabled or len(lengths) < 2:
        return {trial: (length.total_steps,) for trial, length in lengths.items()}
    return {trial: _rungs_of(length, lengths, pruning) for trial, length in lengths.items()}


def _rungs_of(length: TrialLength, lengths: Mapping[str, TrialLength], pruning: PruningConfig) -> tuple[int, ...]:
    total = length.total_steps
    if pruning.min_steps is None:
        planned = [math.ceil(share * total) for share in _shares(pruning.reduction_factor)]
    else:
        longest = max(other.total_steps for other in lengths.values())
        planned = _powers(pruning.min_steps, pruning.reduction_factor, longest)
    return *(min(total, max(step, length.warmup_steps + 1)) for step in planned), total


def _shares(reduction_factor: int) -> list[float]:
    shares = []
    share = _FIRST_SHARE
    while share < 1:
        shares.append(share)
        share *= reduction_factor
    return shares


def _powers(first: int, reduction_factor: int, limit: int) -> list[int]:
    steps = []
    step = first
    while step < limit:
        steps.append(step)
        step *= reduction_factor
    return steps


def expected_steps(rungs: Mapping[str, tuple[int, ...]], reduction_factor: int) -> int:
    """Optimizer steps halving spends on a cohort of trials of mean length when nothing fails. For display."""
    if not rungs:
        return 0
    going, spent, before = float(len(rungs)), 0.0, 0.0
    for column in zip(*rungs.values(), strict=True):
        mean = sum(column) / len(column)
        spent += going * (mean - before)
        going, before = math.ceil(going / reduction_factor), mean
    return round(spent)
