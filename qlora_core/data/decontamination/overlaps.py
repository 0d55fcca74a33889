"""Shared n-grams between texts and evaluation items, each verified word for word. Decides nothing about them."""

from dataclasses import dataclass

import numpy as np

from qlora_core.data.decontamination.kernels import find_ngrams, measure_stretches
from qlora_core.data.decontamination.ngrams import ItemTexts, NgramIndex
from qlora_core.data.decontamination.words import Words

FIRST_CAPACITY = 1 << 14


@dataclass(frozen=True, slots=True)
class Overlaps:
    """H pairs of a text and an item's text that share n-grams; all int64 [H], ascending by text, then by item's text.

    matched: words of the item's text inside shared n-grams, headers aside, each counted once. item_first, row_first,
    length: the longest stretch that is equal in both, by its first word in each and its words, headers included; of a
    stretch that a text repeats over and over, the first sixteen places are looked at.
    """

    text: np.ndarray
    item_text: np.ndarray
    matched: np.ndarray
    item_first: np.ndarray
    row_first: np.ndarray
    length: np.ndarray


def find_overlaps(
    words: Words, long_only: np.ndarray, long_length: int, items: ItemTexts, index: NgramIndex
) -> Overlaps:
    """Look up every n-gram of `words` (T texts) in `index`.

    A text with `long_only`, bool [T], is searched for n-grams of `long_length` words and not for short items.
    """
    lengths = index.lengths
    least = np.where(long_only, long_length, 0)
    capacity = FIRST_CAPACITY
    while True:
        found = np.empty((capacity, 3), np.int64)
        count = find_ngrams(
            words.prefix, words.letters, words.bounds, words.offsets, least,
            items.words.letters, items.words.bounds,
            lengths, index.seen, index.hashes, index.firsts, index.word, index.length,
            found,
        )  # fmt: skip
        if count <= capacity:
            break
        capacity = count
    return _group(found[:count], words, long_length, items, index)


def stand_alone(words: Words, text: np.ndarray, first: np.ndarray, length: np.ndarray) -> np.ndarray:
    """bool, for each stretch of a text's words: whether it is made of whole sentences."""
    after = first + length
    opens = np.append(words.opens, True)
    return opens[first] & ((after == words.offsets[text + 1]) | opens[after])


def _group(found: np.ndarray, words: Words, long_length: int, items: ItemTexts, index: NgramIndex) -> Overlaps:
    """From shared n-grams (text, its word, place in the index) to one entry for each pair of texts."""
    text, row_word, place = found.T
    item_word, length, item_text = index.word[place], index.length[place], index.text[place]
    # A short item that stands in a text twice is shown where it is a sentence of its own.
    within = ~stand_alone(words, text, row_word, length) & (length < long_length)
    order = np.lexsort((item_word, row_word - item_word, within, item_text, text))
    text, row_word, item_word, length, item_text = (
        column[order] for column in (text, row_word, item_word, length, item_text)
    )
    new = np.append(True, (text[1:] != text[:-1]) | (item_text[1:] != item_text[:-1]))[: len(text)]
    firsts = np.append(np.flatnonzero(new), len(text)).astype(np.int64)
    stretches = np.empty((len(firsts) - 1, 4), np.int64)
    measure_stretches(
        firsts, item_word, row_word, length, items.header, np.full(len(items.header), -1, np.int64), stretches
    )
    return Overlaps(text[new], item_text[new], *stretches.T)
