"""Elo ratings averaged over random match orders, as in the QLoRA paper. Knows matches as numbers only."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from qlora_core.evaluation.bootstrap import percentile_interval

START = 1000.0
K = 32.0
SCALE = 400.0
INDICES_PER_CHUNK = 40_000_000


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
    which is larger: read Bradley-Terry's for that. No matches leave all at 1000.
    """
    finals = np.concatenate(
        [_play(matches, players, rng_orders) for rng_orders in _order_chunks(len(matches.a), orders, seed)]
    )
    bounds = [percentile_interval(finals[:, player], confidence) for player in range(players)]
    return EloRatings(
        mean=finals.mean(axis=0),
        low=np.array([low for low, _ in bounds]),
        high=np.array([high for _, high in bounds]),
        standard_error=finals.std(axis=0, ddof=1 if orders > 1 else 0) / np.sqrt(orders),
    )


def _order_chunks(matches: int, orders: int, seed: int) -> list[tuple[int, np.random.Generator]]:
    """Orders split so that one chunk's permutations fit in memory; each chunk has its own stream of the seed."""
    size = max(1, min(orders, INDICES_PER_CHUNK // max(1, matches)))
    sizes = [size] * (orders // size) + ([orders % size] if orders % size else [])
    streams = np.random.SeedSequence(seed).spawn(len(sizes))
    return [(count, np.random.default_rng(stream)) for count, stream in zip(sizes, streams, strict=True)]


def _play(matches: Matches, players: int, chunk: tuple[int, np.random.Generator]) -> NDArray[np.float64]:
    """Final ratings [orders, players] of one chunk: all orders advance together, match by match."""
    orders, rng = chunk
    turns = np.tile(np.arange(len(matches.a), dtype=np.int32)[:, None], (1, orders))
    rng.permuted(turns, axis=0, out=turns)
    ratings = np.full(orders * players, START)
    offsets = np.arange(orders) * players
    for turn in turns:
        a = offsets + matches.a[turn]
        b = offsets + matches.b[turn]
        rating_a, rating_b = ratings[a], ratings[b]
        expected = 1.0 / (1.0 + 10.0 ** ((rating_b - rating_a) / SCALE))
        move = K * (matches.score[turn] - expected)
        ratings[a] = rating_a + move
        ratings[b] = rating_b - move
    return ratings.reshape(orders, players)
