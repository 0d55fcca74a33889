"""Exact Jaccard similarity of candidate pairs, in bounded memory. Gets shingles by rank; knows no row."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from qlora_core.data.near_duplicates import kernels
from qlora_core.data.near_duplicates.candidates import MAX_BUCKET
from qlora_core.data.near_duplicates.shingles import Shingles, join_sets, take_sets

# Shingles held at once on one side of a comparison: 32 MiB.
BLOCK_SHINGLES = 1 << 22

LoadSets = Callable[[np.ndarray], Shingles]


@dataclass(frozen=True, slots=True)
class Edges:
    """Pairs of ranks `left[k] < right[k]` (int64) and their exact similarity (float64)."""

    left: np.ndarray
    right: np.ndarray
    scores: np.ndarray

    def at_least(self, threshold: float) -> "Edges":
        """The pairs of at least this similarity."""
        good = self.scores >= threshold
        return Edges(self.left[good], self.right[good], self.scores[good])


@dataclass(frozen=True, slots=True)
class CappedBucket:
    """A bucket too large to pair off: its members, how many matched a representative, how many were compared with as
    many representatives as there may be and matched none.
    """

    members: int
    first: int
    matched: int
    unmatched: int
    compared: int


def join_edges(parts: list[Edges]) -> Edges:
    """All pairs of the parts once, ordered by right rank, then left."""
    left = np.concatenate([part.left for part in parts])
    right = np.concatenate([part.right for part in parts])
    scores = np.concatenate([part.scores for part in parts])
    _, chosen = np.unique((right.astype(np.uint64) << np.uint64(32)) | left.astype(np.uint64), return_index=True)
    return Edges(left[chosen], right[chosen], scores[chosen])


def compare(
    left: np.ndarray, right: np.ndarray, sizes: np.ndarray, load: LoadSets, block: int = BLOCK_SHINGLES
) -> Edges:
    """Exact similarity of each pair of ranks. `load` gives the sets of given ranks, made anew from text.

    `sizes` holds an upper bound of each rank's set. The sets of at most two blocks of `block` shingles (or two rows,
    where one is larger) are held at a time. Rows that pairs connect lie together, so most blocks are read once.
    """
    scores = np.empty(len(left), np.float64)
    touched, ends = np.unique(np.concatenate([left, right]), return_inverse=True)
    group = np.arange(len(touched))
    kernels.connect(ends[: len(left)], ends[len(left) :], group)
    order = np.argsort(group, kind="stable")
    touched, place = touched[order], np.argsort(order)[ends]
    low = np.minimum(place[: len(left)], place[len(left) :])
    high = np.maximum(place[: len(left)], place[len(left) :])
    block_of = np.cumsum(sizes[touched], dtype=np.int64) // block
    blocks = np.stack([block_of[low], block_of[high]], axis=1)
    loaded: dict[int, Shingles] = {}
    for a, b in np.unique(blocks, axis=0).tolist():
        starts = {number: int(np.searchsorted(block_of, number)) for number in (a, b)}
        loaded = {
            number: loaded.get(number) or load(touched[start : np.searchsorted(block_of, number, side="right")])
            for number, start in starts.items()
        }
        here = np.flatnonzero((blocks[:, 0] == a) & (blocks[:, 1] == b))
        out = np.empty(len(here), np.float64)
        first, second = loaded[a], loaded[b]
        kernels.jaccard_pairs(
            first.hashes, first.offsets, low[here] - starts[a],
            second.hashes, second.offsets, high[here] - starts[b], out,
        )  # fmt: skip
        scores[here] = out
    return Edges(left, right, scores)


def compare_bucket(
    members: np.ndarray, load: LoadSets, threshold: float, most: int = MAX_BUCKET, batch: int = 4096
) -> tuple[Edges, CappedBucket]:
    """Compare the members of a large bucket (ascending ranks) with its representatives alone.

    A member that matches no representative becomes one, up to `most`, so the work grows with the number of members and
    the best of a group is its representative. Returns the pairs of at least `threshold`.
    """
    leaders, ranks = Shingles(np.zeros(0, np.uint64), np.zeros(1, np.int64)), members[:0]
    edges, tallies = [Edges(members[:0], members[:0], np.zeros(0))], []
    for start in range(0, len(members), batch):
        part = members[start : start + batch]
        known, ranks = len(ranks), np.append(ranks, part)
        sets = join_sets([leaders, load(part)])
        chosen = np.empty(most, np.int64)
        chosen[:known] = np.arange(known)
        room = len(part) * most
        left, right, scores = np.empty(room, np.int64), np.empty(room, np.int64), np.empty(room)
        count, found, *tally = kernels.compare_with_leaders(
            sets.hashes, sets.offsets, chosen, known, known, threshold, left, right, scores
        )
        edges.append(Edges(ranks[left[:found]], ranks[right[:found]], scores[:found].copy()))
        tallies.append(tally)
        leaders, ranks = take_sets(sets, chosen[:count]), ranks[chosen[:count]]
    compared, matched, unmatched = np.sum(tallies, axis=0).tolist()
    return join_edges(edges), CappedBucket(len(members), int(members[0]), matched, unmatched, compared)
