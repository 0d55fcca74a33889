"""What the answers of a shadow period say: whether the candidate is worse than the champion in a way that a rule names.

The rules are read again after every batch of prompts, so that each rests on an always-valid interval (`sequential`),
and the error is shared among them. Knows answers as text; nothing of aliases or models.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from qlora_core.config.shadow import ShadowConfig
from qlora_core.evaluation.answer_checks import is_degenerate, is_refusal, word_count
from qlora_core.evaluation.statistics.sequential import confidence_sequence

_RULES = 3


class ShadowPair(NamedTuple):
    """Both answers to one prompt."""

    prompt: str
    champion: str
    candidate: str


def shadow_figures(pairs: Sequence[ShadowPair], rules: ShadowConfig) -> dict[str, Any]:
    """The pairs held against the rules, in the order they were answered.

    Keys: `prompts`; `degenerate` and `refused` {champion, candidate, low, high, allowed}: shares, and the interval of
    their difference; `words` {low, high, allowed}: the interval of the candidate's share of a pair's words; `broken`:
    a sentence for each rule that is broken beyond chance. No pairs break nothing and have no figures (null).
    """
    figures: dict[str, Any] = {"prompts": len(pairs), "degenerate": None, "refused": None, "words": None, "broken": []}
    if not pairs:
        return figures
    confidence = 1 - rules.alpha / _RULES
    checks = {
        "degenerate": ([_degenerate(pair) for pair in pairs], rules.max_degenerate_increase),
        "refused": (
            [(is_refusal(pair.champion), is_refusal(pair.candidate)) for pair in pairs],
            rules.max_refusal_increase,
        ),
    }
    for name, (seen, allowed) in checks.items():
        champion, candidate = np.array(seen, np.float64).T
        low, high = 2 * confidence_sequence((candidate - champion + 1) / 2, confidence=confidence)[-1] - 1
        shares = {"champion": float(champion.mean()), "candidate": float(candidate.mean())}
        figures[name] = {**shares, "low": float(low), "high": float(high), "allowed": allowed}
        if low > allowed:
            figures["broken"].append(
                f"{name} answers: {shares['candidate']:.1%} against the champion's {shares['champion']:.1%}, more than "
                f"{allowed:.1%} above it over {len(pairs)} prompts (difference at least {low:.1%})"
            )
    figures["words"] = _words(pairs, rules, confidence, figures["broken"])
    return figures


def _degenerate(pair: ShadowPair) -> tuple[bool, bool]:
    return is_degenerate(pair.champion, pair.prompt), is_degenerate(pair.candidate, pair.prompt)


def _words(pairs: Sequence[ShadowPair], rules: ShadowConfig, confidence: float, broken: list[str]) -> dict[str, Any]:
    """A ratio r of words is a share r / (1 + r) of the pair's; two empty answers are even."""
    counts = np.array([(word_count(pair.champion), word_count(pair.candidate)) for pair in pairs], np.float64)
    total = counts.sum(axis=1)
    shares = np.where(total > 0, counts[:, 1] / np.maximum(total, 1), 0.5)
    low, high = (float(bound) for bound in confidence_sequence(shares, confidence=confidence)[-1])
    least, most = (ratio / (1 + ratio) for ratio in rules.length_ratio)
    if low > most or high < least:
        way = "longer" if low > most else "shorter"
        broken.append(
            f"answers are {way}: the candidate has {shares.mean():.1%} of a pair's words over {len(pairs)} prompts, "
            f"outside {least:.1%} to {most:.1%}"
        )
    return {"share": float(shares.mean()), "low": low, "high": high, "allowed": [least, most]}
