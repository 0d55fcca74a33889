"""Elo ratings averaged over random match orders, as in the QLoRA paper. Knows matches as numbers only."""

import math
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from qlora_core.compiled import compiled
from qlora_core.errors import EvaluationError
from qlora_core.evaluation.statistics.bootstrap import percentile_interval

START = 1000.0
K = 32.0
SCALE = 400.0
ORDERS_PER_TASK = 64
ORDERS_AT_ONCE = 8


class Matches(NamedTuple):
    """Scored comparisons, one entry per match. `score` is a's: 1 win, 0 loss, 0.5 tie."""

    a: NDArray[np.int64]
    b: NDArray[np.int64]
    score: NDArray[np.float64]


class EloRatings(NamedTuple):
    """Per player: mean rating over the orders, central interval over the orders, Monte-Carlo error of the mean."""

    mean: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    standard_error: NDArray[np.float64]


def elo_ratings(matches: Matches, players: int, *, orders: int, seed: int, confidence: float) -> EloRatings:
    """Play all matches in `orders` seeded random orders from 1000 with K = 32 and average each player's final rating.

    A match moves a by K (score - 1 / (1 + 10^((R_b - R_a) / 400))) and b by as much the other way, so the players' mean
    stays 1000. The interval says how far one order alone may lie from the mean; it holds no sampling error of prompts,
    which is larger: read Bradley-Terry's for that. No matches leave all at 1000. Each order has a random stream of its
    own, so the ratings do not depend on how many threads play. Raises EvaluationError for fewer than one order, and
    for a score outside [0, 1].
    """
    if orders < 1:
        raise EvaluationError(f"{orders} match orders were asked for; give 1 or more (the paper's figure is 10,000)")
    if len(matches.score) and not (matches.score.min() >= 0.0 and matches.score.max() <= 1.0):
        raise EvaluationError("a match's score must lie in [0, 1]: 1 where a won, 0 where b won, 0.5 for a tie")
    finals = _play_all(matches, players, order_streams(orders, seed))
    bounds = [percentile_interval(finals[:, player], confidence) for player in range(players)]
    return EloRatings(
        mean=finals.mean(axis=0),
        low=np.array([low for low, _ in bounds]),
        high=np.array([high for _, high in bounds]),
        standard_error=finals.std(axis=0, ddof=1 if orders > 1 else 0) / np.sqrt(orders),
    )


def order_streams(orders: int, seed: int) -> NDArray[np.uint64]:
    """The start of each order's random stream [orders]."""
    return np.random.SeedSequence(seed).generate_state(orders, np.uint64).astype(np.uint64)


def match_order(matches: int, stream: int) -> NDArray[np.int32]:
    """The order in which the stream plays the matches: a permutation of 0 .. matches - 1."""
    turns = np.arange(matches, dtype=np.int32)
    _shuffle(turns, np.uint64(stream))
    return turns


def _play_all(matches: Matches, players: int, streams: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Final ratings [orders, players]."""
    finals = np.empty((len(streams), players))
    # Equal matches are one kind: what is shuffled and looked up then fits into the processor's nearest memory
    rows = np.stack([matches.a, matches.b, matches.score], axis=1) if len(matches.a) else np.zeros((0, 3))
    kinds, kind_of = np.unique(rows, axis=0, return_inverse=True)
    a, b, score = kinds[:, 0].astype(np.int64), kinds[:, 1].astype(np.int64), kinds[:, 2].copy()
    played = kind_of.astype(np.int32).reshape(-1)
    with ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="elo") as pool:
        starts = range(0, len(streams), ORDERS_PER_TASK)
        parts = [slice(start, start + ORDERS_PER_TASK) for start in starts]
        for done in [pool.submit(_play, played, a, b, score, streams[part], finals[part]) for part in parts]:
            done.result()
    return finals


@compiled
def _shuffle(turns: Any, stream: Any) -> None:
    """Fisher-Yates in place with SplitMix64 (Steele, Lea, Flood 2014) and Lemire's unbiased bounded draw (2019)."""
    state = stream
    for place in range(len(turns) - 1, 0, -1):
        bound = np.uint64(place + 1)
        while True:
            state += np.uint64(0x9E3779B97F4A7C15)
            mixed = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            product = ((mixed ^ (mixed >> np.uint64(31))) >> np.uint64(32)) * bound
            low = product & np.uint64(0xFFFFFFFF)
            if low >= bound or low >= (np.uint64(2**32) - bound) % bound:
                break
        other = np.int64(product >> np.uint64(32))
        turns[place], turns[other] = turns[other], turns[place]


@partial(compiled, fastmath={"contract"})
def _play(played: Any, a: Any, b: Any, score: Any, streams: Any, finals: Any) -> None:
    """Fill finals [orders, players]; `played` [matches] are kinds, a, b and score [kinds] say what they are.

    Ratings are kept as odds q = 10^((R - 1000) / 400), so that the expected score is q_a / (q_a + q_b) and a move
    multiplies one by e^x and divides the other by it, |x| <= 0.19: both come from one short series, exact to rounding.
    Several orders advance together: each waits for its own last result, and the processor fills the wait with another.
    """
    unit = math.log(10.0) / SCALE * K
    turns = np.empty((ORDERS_AT_ONCE, len(played)), dtype=np.int32)
    odds = np.empty((ORDERS_AT_ONCE, finals.shape[1]))
    for start in range(0, len(streams), ORDERS_AT_ONCE):
        lanes = min(ORDERS_AT_ONCE, len(streams) - start)
        odds[:] = 1.0
        for lane in range(ORDERS_AT_ONCE):
            turns[lane] = played
            _shuffle(turns[lane], streams[start + min(lane, lanes - 1)])
        for place in range(len(played)):
            for lane in range(ORDERS_AT_ONCE):  # a fixed count is unrolled; lanes beyond the last order are not read
                kind = turns[lane, place]
                i, j = a[kind], b[kind]
                x = unit * (score[kind] - odds[lane, i] / (odds[lane, i] + odds[lane, j]))
                y = x * x
                even = (1.0 + y * (1 / 2)) + y * y * (
                    (1 / 24 + y * (1 / 720)) + y * y * (1 / 40320 + y * (1 / 3628800))
                )
                odd = x * ((1.0 + y * (1 / 6)) + y * y * ((1 / 120 + y * (1 / 5040)) + y * y * (1 / 362880)))
                odds[lane, i] *= even + odd
                odds[lane, j] *= even - odd
        finals[start : start + lanes] = START + SCALE * np.log10(odds[:lanes])
