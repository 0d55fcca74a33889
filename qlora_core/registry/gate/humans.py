"""Human votes joined with a judge's verdicts, where the evidence holds any. Knows the per-item table and the policy.

The votes correct the judge (prediction-powered inference), so the joined figure is true whether or not the judge is
certified; the voted prompts must have been drawn without looking at the answers.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlora_core.config.gate import GateConfig
from qlora_core.evaluation.statistics.paired import paired_difference
from qlora_core.evaluation.statistics.prediction_powered import prediction_powered_mean
from qlora_core.registry.gate.findings import Finding, UnusableEvidenceError
from qlora_core.registry.gate.items import RESAMPLES, Estimate, detectable, normal_error

_LEAST = 2
_CHECK = "humans"


def votes_used(items: Mapping[str, Any] | None, policy: GateConfig) -> int:
    """How many prompts' votes the policy joins with the judge; 0 where there are none or it takes none.

    An always-valid test takes none: the joined interval is true for one look only.
    """
    if policy.humans.combine == "ignore" or policy.primary.test == "always_valid":
        return 0
    return int((~np.isnan(_scores(items, "human"))).sum())


def human_findings(items: Mapping[str, Any] | None, policy: GateConfig) -> Iterator[Finding]:
    """Whether there are votes enough and raters agree enough; nothing where there are no votes to join."""
    votes, humans = votes_used(items, policy), policy.humans
    if not votes:
        return
    if votes < humans.min_prompts:
        yield Finding(
            "HOLD",
            f"Too few votes: people voted on {votes} prompts, and the policy asks for {humans.min_prompts} "
            "(gate.humans.min_prompts); collect more, or set gate.humans.combine: ignore.",
            _CHECK,
        )
    alpha = (items or {}).get("human_alpha")
    if humans.min_alpha is not None and (alpha is None or alpha < humans.min_alpha):
        shown = "unknown" if alpha is None else f"{alpha:.2f}"
        yield Finding(
            "HOLD",
            f"The raters disagree: their agreement (Krippendorff's alpha) is {shown}, and the policy asks for "
            f"{humans.min_alpha:g}; look at their checks with `qlora vote`, and collect more votes.",
            _CHECK,
        )


def joined_estimate(items: Mapping[str, Any] | None, policy: GateConfig, alpha: float) -> tuple[Estimate, str] | None:
    """The win rate less one half from votes and verdicts together, and a note; None where there are no votes.

    Where fewer than two prompts have a verdict and no vote, the votes stand alone (Student's t).
    """
    if votes_used(items, policy) < _LEAST:
        return None
    human, judge = _scores(items, "human"), _scores(items, "judge")
    voted = ~np.isnan(human)
    both, rest = voted & ~np.isnan(judge), ~voted & ~np.isnan(judge)
    if both.sum() < _LEAST or rest.sum() < _LEAST:
        return _votes_alone(human[voted], alpha)
    found = prediction_powered_mean(human[both], judge[both], judge[rest], confidence=1 - alpha)
    half = (found.high - found.low) / 2
    note = f", from votes on {both.sum()} prompts and the judge's verdicts, of weight {found.weight:.2f}, on all"
    count, least = int(both.sum() + rest.sum()), detectable(half, normal_error(half, alpha))
    return Estimate(found.value - 0.5, found.low - 0.5, found.high - 0.5, count, least), note


def _votes_alone(scores: NDArray[np.float64], alpha: float) -> tuple[Estimate, str]:
    names = [str(place) for place in range(len(scores))]
    found = paired_difference(scores - 0.5, names, confidence=1 - alpha, resamples=RESAMPLES, seed=0)
    least = detectable((found["t_high"] - found["t_low"]) / 2, found["standard_error"])
    estimate = Estimate(found["difference"], found["t_low"], found["t_high"], len(scores), least)
    return estimate, f", from votes on {len(scores)} prompts alone"


def _scores(items: Mapping[str, Any] | None, column: str) -> NDArray[np.float64]:
    """The column of the prompts' table, shape [prompts], NaN where null; empty without a table."""
    table = (items or {}).get("prompts") or {}
    try:
        scores = np.array([np.nan if score is None else float(score) for score in table.get(column) or []])
    except (TypeError, ValueError) as error:
        raise UnusableEvidenceError(f"the per-item table's {column} scores cannot be read ({error})") from error
    if ((scores < 0) | (scores > 1)).any():
        raise UnusableEvidenceError(f"the per-item table holds {column} scores outside [0, 1]")
    return scores
