"""N-grams of evaluation items, ready to be looked up: headers left out, short items whole. Knows nothing of rows."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qlora_core.config.curation import DecontaminateConfig
from qlora_core.data.decontamination.eval_sets import EvalSet
from qlora_core.data.decontamination.kernels import hash_ngrams
from qlora_core.data.decontamination.words import Words, split_words
from qlora_core.data.text_form import folded
from qlora_core.data.wrappers import strip_wrappers

# Longest run of words by which a header is recognised. A header may be shorter than the n-grams that are looked for
# ("The following are multiple choice questions (with answers) about" has nine words), so they cannot show it.
HEADER_WORDS = 8
SHOWN_CHARACTERS = 200


@dataclass(frozen=True, slots=True)
class Suppressed:
    """Words that stand together in so many items of a set that they tell nothing: `items` items hold just these."""

    set_name: str
    text: str
    words: int
    items: int


@dataclass(frozen=True, slots=True)
class ItemTexts:
    """The T texts of all items: every prompt, and the stems of multiple-choice questions.

    item, set_index: int64 [T]. whole: bool [T], True for an item's first prompt, which is the item; a later turn and a
    stem are parts. header: bool [W], words that count for nothing. counted: int64 [T], words that do. first, last:
    int64 [T], where a text begins and ends in `words` without a header before and after it. folded: for the exact rule.
    """

    words: Words
    folded: Sequence[str]
    item: np.ndarray
    set_index: np.ndarray
    whole: np.ndarray
    header: np.ndarray
    counted: np.ndarray
    first: np.ndarray
    last: np.ndarray

    @property
    def sizes(self) -> np.ndarray:
        """int64 [T]: words of each text, header and all."""
        return np.diff(self.words.offsets)


@dataclass(frozen=True, slots=True)
class NgramIndex:
    """Sorted hashes of n-grams and where each stands.

    hashes: uint64 [G], ascending. firsts: int64 [G + 1], n-gram g stands at places firsts[g]:firsts[g + 1]. word,
    length, text: int64 [P], a place's first word in `ItemTexts.words`, its words, its text. lengths: int64, the
    distinct lengths, ascending. seen: bool [2^b], whether some hash has these b leading bits.
    """

    hashes: np.ndarray
    firsts: np.ndarray
    word: np.ndarray
    length: np.ndarray
    text: np.ndarray
    lengths: np.ndarray
    seen: np.ndarray


def item_texts(sets: Sequence[EvalSet], config: DecontaminateConfig) -> tuple[ItemTexts, list[Suppressed]]:
    """The words of every item, wrappers taken off, and the headers found in each set, most frequent first."""
    texts: list[str] = []
    item, set_index, whole = [], [], []
    placed = [(place, entry) for place, eval_set in enumerate(sets) for entry in eval_set.items]
    for number, (place, entry) in enumerate(placed):
        parts = [*entry.prompts, *([entry.stem] if entry.stem else [])]
        texts += [strip_wrappers(part) for part in parts]
        item += [number] * len(parts)
        set_index += [place] * len(parts)
        whole += [True] + [False] * (len(parts) - 1)
    words = split_words(texts)
    items, set_of = np.array(item, np.int64), np.array(set_index, np.int64)
    header = _header_words(words, items, set_of, min(HEADER_WORDS, config.ngram_words), config.max_ngram_items)
    counted, first, last = _bodies(words.offsets, header)
    made = ItemTexts(
        words, [folded(text) for text in texts], items, set_of, np.array(whole, bool), header, counted, first, last
    )
    return made, _suppressed(made, [entry.name for entry in sets])


def index_ngrams(texts: ItemTexts, config: DecontaminateConfig) -> NgramIndex:
    """Every n-gram of the long texts of which at least half is no header; every short text as one n-gram.

    A text is short if fewer than `ngram_words` words are left without the header around it. Shorter than
    `min_exact_words` it is left out, and so is one that is the same in more than `max_ngram_items` items of a set.
    """
    n = config.ngram_words
    sizes = texts.last - texts.first
    long = sizes >= n
    word, text = _ngram_starts(texts.words.offsets, n)
    plain = np.concatenate([[0], np.cumsum(~texts.header)])
    good = long[text] & (2 * (plain[word + n] - plain[word]) >= n)
    short = np.flatnonzero(~long & (sizes >= config.min_exact_words))
    short_hashes = hash_ngrams(texts.words.prefix, texts.first[short], sizes[short])
    crowded = _in_many_items(short_hashes, texts.item[short], texts.set_index[short], config.max_ngram_items)
    short = short[~crowded]
    word = np.concatenate([word[good], texts.first[short]])
    length = np.concatenate([np.full(int(good.sum()), n, np.int64), sizes[short]])
    text = np.concatenate([text[good], short])
    hashes = hash_ngrams(texts.words.prefix, word, length)
    order = np.lexsort((word, hashes))
    unique, firsts = np.unique(hashes[order], return_index=True)
    return NgramIndex(
        unique,
        np.append(firsts, len(hashes)),
        word[order],
        length[order],
        text[order],
        np.unique(length),
        _seen(unique),
    )


def _header_words(words: Words, item: np.ndarray, set_index: np.ndarray, size: int, max_items: int) -> np.ndarray:
    """bool [W]: the words inside `size`-grams that more than `max_items` items of the set hold."""
    start, text = _ngram_starts(words.offsets, size)
    hashes = hash_ngrams(words.prefix, start, np.full(len(start), size, np.int64))
    common = start[_in_many_items(hashes, item[text], set_index[text], max_items)]
    edges = np.zeros(int(words.offsets[-1]) + 1, np.int64)
    np.add.at(edges, common, 1)
    np.add.at(edges, common + size, -1)
    return np.cumsum(edges)[:-1] > 0


def _ngram_starts(offsets: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The first word of every n-gram that lies within a text, and that text."""
    text = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    word = np.arange(offsets[-1])
    inside = word + size <= offsets[1:][text]
    return word[inside], text[inside]


def _in_many_items(hashes: np.ndarray, item: np.ndarray, set_index: np.ndarray, max_items: int) -> np.ndarray:
    """bool, for each hash: whether more than `max_items` items of its set have it."""
    order = np.lexsort((item, hashes, set_index))
    h, i, s = hashes[order], item[order], set_index[order]
    new_group = np.append(True, (h[1:] != h[:-1]) | (s[1:] != s[:-1]))[: len(h)]
    new_item = new_group | np.append(True, i[1:] != i[:-1])[: len(h)]
    group = np.cumsum(new_group) - 1
    many = np.empty(len(h), bool)
    many[order] = np.bincount(group[new_item])[group] > max_items if len(h) else False
    return many


def _bodies(offsets: np.ndarray, header: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each text: how many words are no header, the first of them, and the one after the last."""
    plain = np.flatnonzero(~header)
    low, high = np.searchsorted(plain, offsets[:-1]), np.searchsorted(plain, offsets[1:])
    counted = high - low
    padded = np.append(plain, 0)
    first = np.where(counted > 0, padded[np.minimum(low, len(plain))], offsets[:-1])
    last = np.where(counted > 0, padded[np.maximum(high - 1, 0)] + 1, offsets[:-1])
    return counted, first, last


def _suppressed(texts: ItemTexts, names: Sequence[str]) -> list[Suppressed]:
    """Maximal runs of header words, counted by the items that hold them."""
    holders: dict[tuple[int, str, int], set[int]] = {}
    edges = np.zeros(len(texts.header) + 1, bool)
    edges[texts.words.offsets] = True
    changes = np.flatnonzero(np.append(texts.header[1:] != texts.header[:-1], False)) + 1
    edges[changes] = True
    bounds = np.flatnonzero(edges)
    for first, last in itertools.pairwise(bounds.tolist()):
        if texts.header[first]:
            text = int(np.searchsorted(texts.words.offsets, first, side="right")) - 1
            key = (int(texts.set_index[text]), texts.words.text(first, last)[:SHOWN_CHARACTERS], int(last - first))
            holders.setdefault(key, set()).add(int(texts.item[text]))
    ranked = sorted(holders.items(), key=lambda entry: (entry[0][0], -len(entry[1]), entry[0][1:]))
    return [Suppressed(names[place], text, words, len(items)) for (place, text, words), items in ranked]


def _seen(hashes: np.ndarray) -> np.ndarray:
    """About 16 places for each hash, so that one look turns away most n-grams that stand in no item."""
    bits = int(np.clip(np.ceil(np.log2(max(len(hashes), 1))) + 4, 10, 24))
    table = np.zeros(1 << bits, bool)
    table[(hashes >> np.uint64(64 - bits)).astype(np.int64)] = True
    return table
