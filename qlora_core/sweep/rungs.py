"""At which steps trials are compared. Pure arithmetic: knows nothing of losses, studies or workers.

Rung k of a trial stands at `min_steps * reduction_factor**k` optimizer steps, or at the first step by which it has had
`min_tokens * reduction_factor**k` trained tokens, the last one at its end. Tokens make trials of different batch sizes
comparable; a trial's are counted by the mean of its steps. Without either the first rung is a quarter of each trial's
own steps, so that trials of different length are compared after equal shares of their work. A rung that would fall into
a trial's warm-up moves to the first step after it: a loss at a learning rate that is still rising says little.

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
    """Optimizer steps of one trial, how many of them are warm-up, and the trained tokens of one, on the mean."""

    total_steps: int
    warmup_steps: int
    tokens_per_step: float = 1.0

    @property
    def total_tokens(self) -> float:
        """Trained tokens of the whole trial."""
        return self.total_steps * self.tokens_per_step


def plan_rungs(lengths: Mapping[str, TrialLength], pruning: PruningConfig) -> dict[str, tuple[int, ...]]:
    """For each trial the steps at which it is compared, never falling; the last is its end. Empty in, empty out.

    Without pruning, and for a lone trial, there is nothing to compare on the way: one rung, the end.
    """
    if not pruning.enabled or len(lengths) < 2:
        return {trial: (length.total_steps,) for trial, length in lengths.items()}
    steps = max(length.total_steps for length in lengths.values())
    tokens = max(length.total_tokens for length in lengths.values())
    return {trial: rungs_of(length, pruning, steps, tokens) for trial, length in lengths.items()}


def rungs_of(length: TrialLength, pruning: PruningConfig, longest_steps: int, longest_tokens: float) -> tuple[int, ...]:
    """The rungs of one trial beside others, of which the longest has so many steps, and one so many tokens."""
    total, factor = length.total_steps, pruning.reduction_factor
    if pruning.min_tokens is not None:
        budgets = _powers(pruning.min_tokens, factor, math.ceil(longest_tokens))
        planned = [math.ceil(round(tokens / length.tokens_per_step, 6)) for tokens in budgets]
    elif pruning.min_steps is not None:
        planned = _powers(pruning.min_steps, factor, longest_steps)
    else:
        planned = [math.ceil(share * total) for share in _shares(factor)]
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
