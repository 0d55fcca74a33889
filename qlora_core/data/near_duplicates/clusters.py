"""From verified pairs to survivors and clusters, in ranks: 0 is the row that survives any other. Knows no text."""

from dataclasses import dataclass

import numpy as np

from qlora_core.data.near_duplicates import kernels
from qlora_core.data.near_duplicates.verification import Edges


@dataclass(frozen=True, slots=True)
class Clusters:
    """By rank: the row each one matched (itself if it stays), their similarity, and the number of its cluster.

    Clusters are numbered by their best row; -1 is a row that matched nothing.
    """

    survivor: np.ndarray
    score: np.ndarray
    cluster: np.ndarray

    @property
    def kept(self) -> np.ndarray:
        """Ranks of the rows that stay (int64)."""
        return np.flatnonzero(self.survivor == np.arange(len(self.survivor)))


def keep_one(edges: Edges, twins: Edges, rows: int) -> Clusters:
    """Let a row go only if it matches a better row that stays; every cluster keeps its best row.

    `edges` are verified pairs ordered by right, then left rank. `twins` are pairs of rows with the same shingles, the
    left one the best of its kind; only it has edges, and they hold for its twins too. A row linked to a survivor by a
    chain alone stays.
    """
    survivor, score = np.arange(rows), np.ones(rows)
    kernels.nearest_survivors(edges.left, edges.right, edges.scores, survivor, score)
    # The best of its kind has the lower rank, so its own fate is settled by now.
    survivor[twins.right] = survivor[twins.left]
    score[twins.right] = score[twins.left]
    return Clusters(survivor, score, _number(edges, twins, rows))


def drop_all(edges: Edges, twins: Edges, rows: int) -> Clusters:
    """Let every row go that matches another one; the row it matched is the best of those, the similarity theirs."""
    survivor, score = np.arange(rows), np.ones(rows)
    left = np.concatenate([edges.left, twins.left])
    right = np.concatenate([edges.right, twins.right])
    scores = np.concatenate([edges.scores, twins.scores])
    row, match, both = np.append(left, right), np.append(right, left), np.append(scores, scores)
    order = np.lexsort((match, row))
    rows_hit, first = np.unique(row[order], return_index=True)
    survivor[rows_hit], score[rows_hit] = match[order][first], both[order][first]
    return Clusters(survivor, score, _number(edges, twins, rows))


def _number(edges: Edges, twins: Edges, rows: int) -> np.ndarray:
    best = np.arange(rows)
    kernels.connect(np.append(edges.left, twins.left), np.append(edges.right, twins.right), best)
    members = np.bincount(best, minlength=rows)
    number = np.full(rows, -1, np.int64)
    heads = np.flatnonzero(members > 1)
    number[heads] = np.arange(len(heads))
    return number[best]
