"""Which trial wins: by one loss, by several objectives, or by the mean over seeds; and a check of the winner.

Knows records; how runs are trained is the driver's.
"""

import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from qlora_core.config.sweep import FinalistsConfig, SweepConfig
from qlora_core.sweep.driver import SweepDriver
from qlora_core.sweep.pool import WorkerPool
from qlora_core.sweep.record import TrialRecord

RECHECK_TOLERANCE = 1e-3
"""Nats per token: on a float32 CPU a run alone agrees to 5e-5; kernels of GPUs may sum in another order."""

_LOGGER = logging.getLogger(__name__)


def front(records: Sequence[TrialRecord], objectives: Sequence[str]) -> list[TrialRecord]:
    """The complete trials that no other beats: as small in every objective and smaller in one. In the order drawn."""
    known = [(record, values) for record in records if (values := _values(record, objectives)) is not None]
    return [record for record, own in known if not any(_beats(other, own) for _, other in known)]


def _values(record: TrialRecord, objectives: Sequence[str]) -> list[float] | None:
    return record.values(objectives) if record.state == "complete" else None


def _beats(one: Sequence[float], other: Sequence[float]) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


def best_trial(
    records: Sequence[TrialRecord], sweep: SweepConfig, losses: Mapping[str, float] | None = None
) -> TrialRecord | None:
    """The complete trial with the lowest loss, drawn first among equals; None when none is complete.

    With several objectives: of those on the front whose loss is within `loss_tolerance` of the lowest, the one smallest
    in the other objectives, in their order. `losses` (by trial) stand in for the trials' own.
    """
    candidates = front(records, sweep.objectives) if len(sweep.objectives) > 1 else list(records)
    known = {record.id: record.loss for record in candidates if record.state == "complete"} | dict(losses or {})
    finite = [(record, loss) for record in candidates if (loss := known.get(record.id)) is not None]
    if not finite:
        return None
    others = [name for name in sweep.objectives if name != "loss"]
    allowed = min(loss for _, loss in finite) + (sweep.loss_tolerance if others else 0.0)
    within = [(record, loss) for record, loss in finite if loss <= allowed]
    return min(within, key=lambda pair: ((pair[0].values(others) or []), pair[1], pair[0].number))[0]


def ranked_trials(
    records: Sequence[TrialRecord], sweep: SweepConfig, finals: Mapping[str, Any] | None, best: TrialRecord, count: int
) -> list[TrialRecord]:
    """The `count` best complete trials, `best` first; fewer where fewer are complete.

    Each next one is what `best_trial` says of those left: finalists first, by their mean over seeds as `finals` (see
    `Finals.run`; None without finalists) has it, then the others by their own loss.
    """
    means = {row["trial"]: row["mean"] for row in finals["finalists"]} if finals is not None else {}
    left = [record for record in records if record.id != best.id]
    ranked = [best]
    while len(ranked) < count:
        finalists = [record for record in left if record.id in means]
        known = {record.id: means[record.id] for record in finalists}
        following = best_trial(finalists or left, sweep, known)
        if following is None:
            break
        ranked.append(following)
        left.remove(following)
    return ranked


def mean_interval(losses: Sequence[float], confidence: float) -> tuple[float, float | None, float | None]:
    """The mean and the ends of its t interval: mean -+ t(n - 1, (1 + confidence) / 2) s / sqrt(n), s over n - 1.

    One loss has no spread, so its ends are None; no loss is an error of the caller (StatisticsError).
    """
    from scipy.stats import t

    mean = statistics.fmean(losses)
    if len(losses) < 2:
        return mean, None, None
    half = float(t.ppf((1 + confidence) / 2, len(losses) - 1)) * statistics.stdev(losses) / math.sqrt(len(losses))
    return mean, mean - half, mean + half


class Finals:
    """The last round of a sweep: the best complete trials from several seeds each, and the winner once more, alone."""

    def __init__(self, driver: SweepDriver, sweep: SweepConfig, settings: FinalistsConfig) -> None:
        self._driver = driver
        self._sweep = sweep
        self._settings = settings

    def run(self, pool: WorkerPool, records: Sequence[TrialRecord]) -> tuple[TrialRecord | None, dict[str, Any] | None]:
        """The winner, and what is kept of the round as JSON data; None and None when no trial is complete.

        Losses of a trial's own run and of its extra runs count alike. A run that failed is left out and counted.
        """
        finalists = self._finalists(records)
        if not finalists:
            return None, None
        runs = {finalist.id: self._seeds_of(finalist) for finalist in finalists}
        self._driver.run_to_end(pool, [run for own in runs.values() for run in own])
        rows = [self._row(finalist, runs[finalist.id]) for finalist in finalists]
        winner = best_trial(finalists, self._sweep, {row["trial"]: row["mean"] for row in rows})
        if winner is None:
            return None, None
        check = self._check(pool, winner) if self._settings.recheck else None
        extra = [run.row() for own in runs.values() for run in own]
        return winner, {"confidence": self._settings.confidence, "finalists": rows, "runs": extra, "check": check}

    def _finalists(self, records: Sequence[TrialRecord]) -> list[TrialRecord]:
        left, chosen = list(records), []
        while len(chosen) < self._settings.count and (best := best_trial(left, self._sweep)) is not None:
            chosen.append(best)
            left.remove(best)
        return chosen

    def _seeds_of(self, finalist: TrialRecord) -> list[TrialRecord]:
        own = finalist.params["seed"]
        return [self._extra(finalist, "seed", own + more) for more in range(1, self._settings.seeds)]

    def _extra(self, of: TrialRecord, role: str, seed: int) -> TrialRecord:
        for known in self._driver.study.extras():
            if (known.of, known.role, known.params["seed"]) == (of.id, role, seed):
                return known
        return self._driver.study.add_extra(of, role, seed)

    def _row(self, finalist: TrialRecord, runs: Sequence[TrialRecord]) -> dict[str, Any]:
        losses = [run.loss for run in (finalist, *runs) if run.state == "complete" and run.loss is not None]
        mean, low, high = mean_interval(losses, self._settings.confidence)
        failed = sum(run.state == "failed" for run in runs)
        return {"trial": finalist.id, "losses": losses, "mean": mean, "low": low, "high": high, "failed": failed}

    def _check(self, pool: WorkerPool, winner: TrialRecord) -> dict[str, Any]:
        again = self._extra(winner, "check", winner.params["seed"])
        again.alone = True
        self._driver.run_to_end(pool, [again])
        difference = None if again.loss is None or winner.loss is None else again.loss - winner.loss
        agrees = difference is not None and abs(difference) <= RECHECK_TOLERANCE
        if not agrees:
            _LOGGER.warning(
                "trial %s ended at a loss of %s in the sweep and at %s alone (%s)",
                winner.id,
                winner.loss,
                again.loss,
                again.error or f"more than {RECHECK_TOLERANCE} apart",
            )
        return {
            "trial": winner.id,
            "loss": winner.loss,
            "loss_alone": again.loss,
            "difference": difference,
            "tolerance": RECHECK_TOLERANCE,
            "agrees": agrees,
            "run": again.row(),
        }
