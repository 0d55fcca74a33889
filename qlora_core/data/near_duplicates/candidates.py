"""Which pairs of rows are worth an exact comparison, from the bands of their signatures. Compares no text."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from qlora_core.data.near_duplicates import kernels

# All pairs of a bucket up to this size are compared; a larger one is compared with representatives, so that rows that
# share one band cannot make the work grow with the square of their number.
MAX_BUCKET = 64
# Pairs of several bands that wait to be made distinct: 32 MiB.
MOST_WAITING = 1 << 22
LOW_HALF = np.uint64(0xFFFF_FFFF)


@dataclass(frozen=True, slots=True)
class Candidates:
    """Pairs `left[k] < right[k]` of ranks (int64), and the members (ascending ranks) of every bucket left unpaired."""

    left: np.ndarray
    right: np.ndarray
    large_buckets: list[np.ndarray]


def find_twins(fingerprints: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ranks (first, other) of rows with equal fingerprints: each but the first of a group, beside the first."""
    order = np.argsort(fingerprints, kind="stable")
    ordered = fingerprints[order]
    opens = np.ones(len(order), bool)
    opens[1:] = ordered[1:] != ordered[:-1]
    first = order[opens][np.cumsum(opens) - 1]
    return first[~opens], order[~opens]


def find_candidates(band_hashes: Iterable[np.ndarray], ranks: np.ndarray, max_bucket: int = MAX_BUCKET) -> Candidates:
    """Pairs that agree on a band. `band_hashes`, len(ranks) of each band, belong to rows of the given ascending ranks.

    Each pair comes once, in ascending order. A set of members that falls together in several bands is one bucket.
    """
    parts = [np.zeros(0, np.uint64)]
    large: dict[bytes, np.ndarray] = {}
    for hashes in band_hashes:
        order = np.argsort(hashes, kind="stable")
        members = ranks[order]
        found, buckets = kernels.bucket_pairs(hashes[order], members, max_bucket)
        parts.append(found)
        if sum(map(len, parts[1:])) > MOST_WAITING:
            parts = [np.unique(np.concatenate(parts))]
        for start, stop in buckets.tolist():
            large.setdefault(members[start:stop].tobytes(), members[start:stop].copy())
    pairs = np.unique(np.concatenate(parts))
    left, right = (pairs >> np.uint64(32)).astype(np.int64), (pairs & LOW_HALF).astype(np.int64)
    return Candidates(left, right, sorted(large.values(), key=lambda bucket: (-len(bucket), *bucket[:1].tolist())))
