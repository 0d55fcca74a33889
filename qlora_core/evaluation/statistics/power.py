"""How small a difference an evaluation can see. Knows standard deviations and sample sizes only."""

import math

from scipy.stats import norm

from qlora_core.errors import EvaluationError


def minimum_detectable_effect(sd: float, prompts: int, *, power: float = 0.8, alpha: float = 0.05) -> float:
    """The smallest true mean difference a two-sided test at `alpha` finds with probability `power`.

    (z[1 - alpha/2] + z[power]) * sd / sqrt(prompts), in the unit of `sd`: 2.80 sd / sqrt(n) at the defaults. `sd` is
    that of one prompt's difference. Raises EvaluationError for a negative sd, no prompts, or shares outside (0, 1).
    """
    _check(sd, power, alpha)
    if prompts < 1:
        raise EvaluationError(f"{prompts} prompts detect nothing; give at least 1")
    return _z_sum(power, alpha) * sd / math.sqrt(prompts)


def prompts_needed(sd: float, effect: float, *, power: float = 0.8, alpha: float = 0.05) -> int:
    """How many prompts make `effect` detectable: ((z[1 - alpha/2] + z[power]) sd / effect)^2, rounded up."""
    _check(sd, power, alpha)
    if not effect > 0:
        raise EvaluationError(f"effect is {effect}; it must be above 0")
    return math.ceil((_z_sum(power, alpha) * sd / effect) ** 2)


def _z_sum(power: float, alpha: float) -> float:
    return float(norm.ppf(1 - alpha / 2) + norm.ppf(power))


def _check(sd: float, power: float, alpha: float) -> None:
    if not (math.isfinite(sd) and sd >= 0):
        raise EvaluationError(f"sd is {sd}; it must be finite and at least 0")
    if not (0 < power < 1 and 0 < alpha < 1):
        raise EvaluationError(f"power {power} and alpha {alpha} must lie between 0 and 1")
