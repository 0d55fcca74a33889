"""Which pairs of models to judge next, so that the best one is known with fewest calls. Knows verdicts, not judges.

Round-robin spends most calls on pairs that cannot change who leads. Here each call goes to the leader and the rival
that is least clearly behind, as in best-arm identification; ratings come from all verdicts by `bradley_terry` as ever.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
from scipy.stats import norm

from qlora_core.errors import EvaluationError
from qlora_core.evaluation import bradley_terry
from qlora_core.evaluation.tournament import count_cells, design_of
from qlora_core.evaluation.verdict import Verdict

WARM_PROMPTS = 2
MIN_PROMPTS = 20


class Standing(NamedTuple):
    """Who leads, how many standard errors (clustered by prompt) each rival is behind, and whether that settles it."""

    leader: str
    behind: dict[str, float]
    settled: bool


class Played(NamedTuple):
    """A tournament's verdicts, its last standing (None where it never had one), and the calls it took."""

    verdicts: list[Verdict]
    standing: Standing | None
    calls: int


def standing(verdicts: Sequence[Verdict], models: Sequence[str], *, confidence: float = 0.95) -> Standing | None:
    """The leader and how far each rival is behind; None while some model is unconnected or prompts are under twenty.

    settled: every rival is behind by the one-sided normal quantile of (1 - confidence) / (models - 1): Bonferroni over
    the rivals, not over repeated looks, whose effect the benchmark measures.
    """
    scored = [row for row in verdicts if row.scored]
    seen = {name for row in scored for name in (row.model_a, row.model_b)}
    if seen != set(models):
        return None
    cells = count_cells(scored)
    design = design_of(cells)
    if len(cells.counts) < MIN_PROMPTS or not bradley_terry.strongly_connected(design, cells.counts.sum(axis=0)):
        return None
    fitted = bradley_terry.fit(design, cells.counts.sum(axis=0, keepdims=True))
    abilities = fitted.abilities[0]
    both = bradley_terry.covariance(design, cells.counts, fitted)
    best = int(np.argmax(abilities))
    behind = {}
    for i, name in enumerate(cells.models):
        if i != best:
            # Over few prompts the sandwich is too narrow as often as not: the wider of the two errors counts
            variance = max(v[best, best] + v[i, i] - 2 * v[best, i] for v in both)
            gap = abilities[best] - abilities[i]
            behind[name] = float(gap / np.sqrt(variance)) if variance > 0 else 0.0
    needed = float(norm.ppf(1 - (1 - confidence) / len(behind)))
    return Standing(cells.models[best], behind, min(behind.values()) >= needed)


def next_pairs(verdicts: Sequence[Verdict], models: Sequence[str], count: int) -> list[tuple[str, str]]:
    """The next `count` comparisons, a pair once per prompt it should be judged on (in both orders).

    Without a standing: the pairs judged least. With one: each goes to the leader and the rival whose distance, scaled
    by the square root of its comparisons' growth, would still be least. Raises EvaluationError for fewer than two
    models.
    """
    if len(set(models)) < 2:
        raise EvaluationError(f"a tournament needs two models or more, got {sorted(set(models))}")
    judged = Counter(frozenset((row.model_a, row.model_b)) for row in verdicts)
    now = standing(verdicts, models)
    chosen: list[tuple[str, str]] = []
    for _ in range(count):
        if now is None:
            pair = min(combinations(sorted(models), 2), key=lambda each: judged[frozenset(each)])
        else:
            rival = min(now.behind, key=lambda name: _expected(now, name, judged, verdicts))
            pair = (now.leader, rival)
        judged[frozenset(pair)] += 2
        chosen.append(pair)
    return chosen


def play(
    models: Sequence[str],
    prompts: Sequence[str],
    judge: Callable[[str, str, str], Sequence[Verdict]],
    *,
    batch: int = 10,
    confidence: float = 0.95,
    adaptive: bool = True,
) -> Played:
    """Judge pairs until the leader is settled or prompts run out; `judge(a, b, prompt)` gives both orders' verdicts.

    Not `adaptive`: all pairs in turn, round-robin, under the same rule to stop. A pair meets each prompt once, in the
    prompts' order from a place of its own on; that order must be random.
    """
    pairs = list(combinations(sorted(models), 2))
    # Pairs start at different prompts, so that a few verdicts of each already speak of many prompts
    starts = {pair: i * len(prompts) // len(pairs) for i, pair in enumerate(pairs)}
    used: Counter[tuple[str, str]] = Counter()
    verdicts: list[Verdict] = []
    calls, now = 0, None
    while now is None or not now.settled:
        warm = min(used[pair] for pair in pairs) < WARM_PROMPTS
        wanted = next_pairs(verdicts, models, batch) if adaptive and not warm else _in_turn(pairs, used, batch)
        open_pairs = [pair for each in wanted if used[pair := _ordered(each)] < len(prompts)]
        if not open_pairs:  # the chosen pairs have met every prompt: the others still say something
            open_pairs = [pair for pair in pairs if used[pair] < len(prompts)]
        if not open_pairs:
            break
        for pair in open_pairs:
            if used[pair] < len(prompts):
                judged = judge(*pair, prompts[(used[pair] + starts[pair]) % len(prompts)])
                used[pair] += 1
                calls += len(judged)
                verdicts += judged
        now = standing(verdicts, models, confidence=confidence)
    return Played(verdicts, now, calls)


def _expected(now: Standing, rival: str, judged: Counter[frozenset[str]], verdicts: Sequence[Verdict]) -> float:
    before = sum({row.model_a, row.model_b} == {now.leader, rival} for row in verdicts)
    return max(now.behind[rival], 0.1) * np.sqrt(judged[frozenset((now.leader, rival))] / max(before, 1))


def _in_turn(pairs: Sequence[tuple[str, str]], used: Counter[tuple[str, str]], count: int) -> list[tuple[str, str]]:
    taken = used.copy()
    chosen = []
    for _ in range(count):
        pair = min(pairs, key=lambda each: taken[each])
        taken[pair] += 1
        chosen.append(pair)
    return chosen


def _ordered(pair: tuple[str, str]) -> tuple[str, str]:
    return (pair[0], pair[1]) if pair[0] < pair[1] else (pair[1], pair[0])
