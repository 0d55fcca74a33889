"""Which pairs of models to judge next, so that the best one is known with fewest calls. Knows verdicts, not judges.

Round-robin spends most calls on pairs that cannot change who leads. Here each call goes to the leader and the rival
that is least clearly behind, as in best-arm identification; ratings come from all verdicts by `bradley_terry` as ever.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Literal, NamedTuple

import numpy as np
from scipy.stats import norm

from qlora_core.errors import EvaluationError
from qlora_core.evaluation.statistics import bradley_terry
from qlora_core.evaluation.tournament import count_cells, design_of
from qlora_core.evaluation.verdict import Verdict

WARM_PROMPTS = 2
MIN_PROMPTS = 20
HALF_A_WIN = np.array([1.0, 1.0, 0.0])
"""Of (first wins, second wins, tie), times one half."""

BUDGET = "budget"
"""What the reason of a verdict begins with that was not asked for because the money is spent."""


class Standing(NamedTuple):
    """Who leads, how many standard errors (clustered by prompt) each rival is behind, and whether that settles it."""

    leader: str
    behind: dict[str, float]
    settled: bool


class Duel(NamedTuple):
    """Two models to be compared on one prompt."""

    model_a: str
    model_b: str
    prompt_id: str


class Played(NamedTuple):
    """A tournament's verdicts, its last standing (None where it never had one), the verdicts it took, why it ended."""

    verdicts: list[Verdict]
    standing: Standing | None
    calls: int
    ended: Literal["settled", "no prompts left", "budget"]


def standing(verdicts: Sequence[Verdict], models: Sequence[str], *, confidence: float = 0.95) -> Standing | None:
    """The leader and how far each rival is behind; None while some model was not compared or prompts are under twenty.

    settled: every rival is behind by the one-sided normal quantile of (1 - confidence) / (models - 1): Bonferroni over
    the rivals, not over repeated looks, whose effect the benchmark measures. Where some model never lost or never won,
    no finite ratings fit; half a win each way, once for each ordered pair that met, then stands beside the verdicts.
    """
    scored = [row for row in verdicts if row.scored]
    seen = {name for row in scored for name in (row.model_a, row.model_b)}
    if seen != set(models):
        return None
    cells = count_cells(scored)
    design = design_of(cells)
    if len(cells.counts) < MIN_PROMPTS or not _one_field(models, scored):
        return None
    counts = cells.counts
    if not bradley_terry.strongly_connected(design, counts.sum(axis=0)):
        counts = np.concatenate([counts, np.full_like(counts[:1], 0.5) * HALF_A_WIN])
    fitted = bradley_terry.fit(design, counts.sum(axis=0, keepdims=True))
    abilities = fitted.abilities[0]
    both = bradley_terry.covariance(design, counts, fitted)
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


def _one_field(models: Sequence[str], scored: Sequence[Verdict]) -> bool:
    """Whether the models that met hang together, so that all can be told apart on one scale."""
    met = {frozenset((row.model_a, row.model_b)) for row in scored}
    reached, found = set[str](), {models[0]}
    while reached != found:
        reached = set(found)
        found |= {name for pair in met if pair & reached for name in pair}
    return found == set(models)


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
    judge: Callable[[Sequence[Duel]], Sequence[Verdict]],
    *,
    batch: int = 10,
    confidence: float = 0.95,
    adaptive: bool = True,
) -> Played:
    """Judge `batch` duels at a time until the leader is settled, prompts run out, or the judge's budget is spent.

    `judge` gives the verdicts of both orders of all duels it is given. Not `adaptive`: all pairs in turn, round-robin,
    under the same rule to stop. A pair meets each prompt once, in the prompts' order from a place of its own on; that
    order must be random.
    """
    pairs = list(combinations(sorted(models), 2))
    # Pairs start at different prompts, so that a few verdicts of each already speak of many prompts
    starts = {pair: i * len(prompts) // len(pairs) for i, pair in enumerate(pairs)}
    used: Counter[tuple[str, str]] = Counter()
    verdicts: list[Verdict] = []
    now: Standing | None = None
    ended: Literal["settled", "no prompts left", "budget"] = "settled"
    while now is None or not now.settled:
        warm = min(used[pair] for pair in pairs) < WARM_PROMPTS
        wanted = next_pairs(verdicts, models, batch) if adaptive and not warm else _in_turn(pairs, used, batch)
        open_pairs = [pair for each in wanted if used[pair := _ordered(each)] < len(prompts)]
        if not open_pairs:  # the chosen pairs have met every prompt: the others still say something
            open_pairs = [pair for pair in pairs if used[pair] < len(prompts)]
        if not open_pairs:
            ended = "no prompts left"
            break
        judged = judge(list(_duels(open_pairs, prompts, starts, used)))
        verdicts += judged
        now = standing(verdicts, models, confidence=confidence)
        if any((row.reason or "").startswith(BUDGET) for row in judged):
            ended = "budget"
            break
    return Played(verdicts, now, len(verdicts), ended)


def _duels(
    pairs: Sequence[tuple[str, str]],
    prompts: Sequence[str],
    starts: Mapping[tuple[str, str], int],
    used: Counter[tuple[str, str]],
) -> Iterator[Duel]:
    """The next prompt of each pair, as often as it is named; `used` counts them, and a pair without prompts is left."""
    for pair in pairs:
        if used[pair] < len(prompts):
            yield Duel(*pair, prompts[(used[pair] + starts[pair]) % len(prompts)])
            used[pair] += 1


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
