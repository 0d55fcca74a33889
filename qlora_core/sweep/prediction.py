"""How much work a sweep will be, before it begins. Knows the config and a trial's length; no study, no workers."""

from qlora_core.config.sweep import SweepConfig
from qlora_core.sweep.rungs import TrialLength, expected_steps, plan_rungs
from qlora_core.sweep.space import cohort_size, trial_count


def predicted_work(sweep: SweepConfig, length: TrialLength) -> tuple[float, float]:
    """Optimizer steps and trained tokens of a sweep of trials of this length when nothing fails.

    Trials are counted as halved by rungs, brackets are not; finalists' further seeds and the winner's check run to
    the end.
    """
    size, count, pruning = cohort_size(sweep), trial_count(sweep), sweep.pruning
    steps = 0.0
    for first in range(0, count, size):
        cohort = {f"t{number}": length for number in range(min(size, count - first))}
        steps += expected_steps(plan_rungs(cohort, pruning), pruning.reduction_factor)
    if (finals := sweep.finalists) is not None:
        runs = min(finals.count, count) * (finals.seeds - 1) + finals.recheck
        steps += runs * length.total_steps
    return steps, steps * length.tokens_per_step
