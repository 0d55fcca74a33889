"""Texts as sets of hashed word n-grams ("shingles"). Knows words, not what they are compared for."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qlora_core.data.near_duplicates import kernels
from qlora_core.data.text_form import folded

WHITE_SPACE = b" \t\n\v\f\r\x1c\x1d\x1e\x1f"
# The ASCII part of text_form.SENTENCE_MARKS.
MARKS = b".,;:!?\"'`"
SPLITS = np.zeros((2, 256), bool)
SPLITS[:, list(WHITE_SPACE)] = True
SPLITS[1, list(MARKS)] = True


@dataclass(frozen=True, slots=True)
class Shingles:
    """Text `i` has `hashes[offsets[i]:offsets[i + 1]]` (uint64), at least one; `offsets` (int64) has one more entry."""

    hashes: np.ndarray
    offsets: np.ndarray


def shingle(texts: Sequence[str], words: int) -> Shingles:
    """Hash every run of `words` words of each text, in order and with repeats.

    Words are those of `text_form.folded`: case, spacing and sentence marks make no difference, operators do. A text of
    fewer words is one shingle, and so is an empty one. Two runs of words get one hash by a chance of 2^-64.
    """
    plain = [text.isascii() for text in texts]
    # For ASCII, folding is lower case and the marks, at which the kernel splits.
    encoded = [
        text.lower().encode() if ascii_only else folded(text).encode("utf-8", "surrogatepass")
        for text, ascii_only in zip(texts, plain, strict=True)
    ]
    starts = np.zeros(len(texts) + 1, np.int64)
    np.cumsum([len(text) for text in encoded], out=starts[1:])
    data = np.frombuffer(b"".join(encoded), np.uint8)
    # A word takes two bytes with its blank; an empty text still takes one shingle.
    out = np.empty(len(data) // 2 + 2 * len(texts), np.uint64)
    offsets = np.zeros(len(texts) + 1, np.int64)
    kernels.hash_shingles(data, starts, ~np.array(plain, bool), SPLITS, words, out, offsets)
    return Shingles(out[: offsets[-1]], offsets)


def shingle_sets(texts: Sequence[str], words: int) -> Shingles:
    """`shingle`, each text's hashes sorted and without repeats."""
    shingles = shingle(texts, words)
    length = kernels.make_sets(shingles.hashes, shingles.offsets)
    return Shingles(shingles.hashes[:length].copy(), shingles.offsets)


def join_sets(parts: Sequence[Shingles]) -> Shingles:
    """The sets of all parts, one part after the other."""
    lengths = np.cumsum([0, *(len(part.hashes) for part in parts)])
    offsets = [part.offsets[:-1] + start for part, start in zip(parts, lengths[:-1], strict=True)]
    hashes = np.concatenate([part.hashes for part in parts]) if parts else np.zeros(0, np.uint64)
    return Shingles(hashes, np.concatenate([*offsets, lengths[-1:]]))


def take_sets(sets: Shingles, chosen: np.ndarray) -> Shingles:
    """A copy of the chosen sets, in the order asked for."""
    parts = [sets.hashes[sets.offsets[k] : sets.offsets[k + 1]] for k in chosen.tolist()]
    return join_sets([Shingles(part, np.array([0, len(part)])) for part in parts])
