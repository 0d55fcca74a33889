"""MinHash signatures and their bands: which texts are worth comparing. Decides nothing about any of them."""

from array import array
from dataclasses import dataclass

import numpy as np
import rensa

from qlora_core.data.near_duplicates import kernels
from qlora_core.data.near_duplicates.shingles import Shingles

MIN_RECALL = 0.99
SIGNED_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class Banding:
    """A signature cut into `bands` bands of `rows` values; texts that agree on a whole band are compared."""

    bands: int
    rows: int

    def chance(self, similarity: float) -> float:
        """How likely two texts of this Jaccard similarity are compared: the S-curve 1 - (1 - s^rows)^bands."""
        return 1 - (1 - similarity**self.rows) ** self.bands


def choose_banding(threshold: float, permutations: int) -> Banding:
    """The longest bands, so the fewest comparisons in vain, that still miss under 1 % of pairs just at `threshold`.

    Pairs above it are missed far less often: at 0.8 and 128 permutations, 21 bands of 6 find 99.8 % of pairs of
    similarity 0.8, all but one in 10^6 of those of 0.9, and compare 28 % of pairs of 0.5, 2 % of those of 0.3. For a
    threshold so low that no banding reaches it, every value is a band of its own.
    Source: Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, section 3.4.
    """
    for rows in range(permutations, 1, -1):
        banding = Banding(permutations // rows, rows)
        if banding.chance(threshold) >= MIN_RECALL:
            return banding
    return Banding(permutations, 1)


def sign(shingles: Shingles, permutations: int, seed: int) -> np.ndarray:
    """Signatures (texts, permutations) of uint32: two agree on a value by the chance of the texts' Jaccard similarity.

    By rensa's R-MinHash over the whole set; order and repeats of shingles change nothing.
    """
    # rensa gives its matrix away as lists of integers only: an array takes them faster than numpy does, and a few
    # texts at a time stay in the processor's cache.
    texts = len(shingles.offsets) - 1
    values = array("I")
    for start in range(0, texts, SIGNED_AT_ONCE):
        offsets = shingles.offsets[start : start + SIGNED_AT_ONCE + 1]
        hashes = shingles.hashes[offsets[0] : offsets[-1]]
        matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(  # pyright: ignore[reportAttributeAccessIssue]
            hashes, (offsets - offsets[0]).astype(np.uint64), permutations, seed
        )
        for row in matrix.to_rows():
            values.fromlist(row)
    return np.frombuffer(values, np.uint32).reshape(texts, permutations)


def hash_bands(signatures: np.ndarray, banding: Banding) -> np.ndarray:
    """A 32-bit hash of each band of each signature: (bands, texts) of uint32."""
    out = np.empty((banding.bands, len(signatures)), np.uint32)
    kernels.hash_bands(signatures, banding.rows, out)
    return out
