"""Compiled loops over code points and word hashes. Know arrays only: no text, row or item.

They are in one file because numba's cache of machine code knows of changes in a kernel's own file alone.
"""

from typing import Any

import numpy as np

from qlora_core.compiled import compiled

SEPARATOR, LETTER, LONE_LETTER, MARK, IGNORED, BORDER = range(6)

# Of "0 0 0 0 ..." in a text and in an item every place pairs with every other; coverage needs one.
MAX_REPEATS = 16

FNV_OFFSET = np.uint64(0xCBF29CE484222325)
FNV_PRIME = np.uint64(0x100000001B3)
MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
MIX_2 = np.uint64(0x94D049BB133111EB)
BASE = np.uint64(0x9E3779B97F4A7C15)
SHIFT_30, SHIFT_27, SHIFT_31 = np.uint64(30), np.uint64(27), np.uint64(31)


@compiled
def mix(value: Any) -> Any:
    """Spreads a hash over all 64 bits (the finalizer of SplitMix64; Steele, Lea, Flood 2014)."""
    value = (value ^ (value >> SHIFT_30)) * MIX_1
    value = (value ^ (value >> SHIFT_27)) * MIX_2
    return value ^ (value >> SHIFT_31)


@compiled
def power(length: int) -> Any:
    """BASE to the power of `length`, modulo 2^64."""
    result = np.uint64(1)
    for _ in range(length):
        result = result * BASE
    return result


@compiled
def ngram_hash(prefix: np.ndarray, first: int, length: int, base_power: Any) -> Any:
    """Hash of `length` words from `first` on: polynomial over the word hashes, modulo 2^64 (Karp, Rabin 1987).

    `base_power` is `power(length)`. Equal n-grams have equal hashes; the reverse must be verified, `equal_words`.
    """
    return mix(prefix[first + length] - prefix[first] * base_power + np.uint64(length))


@compiled
def hash_ngrams(prefix: np.ndarray, first: np.ndarray, length: np.ndarray) -> np.ndarray:
    """uint64 [N]: `ngram_hash` of N n-grams; first, length: int64 [N]. A length of 0 is allowed."""
    hashes = np.empty(len(first), np.uint64)
    for i in range(len(first)):
        hashes[i] = ngram_hash(prefix, first[i], length[i], power(length[i]))
    return hashes


@compiled
def equal_words(
    letters_a: np.ndarray,
    bounds_a: np.ndarray,
    a: int,
    letters_b: np.ndarray,
    bounds_b: np.ndarray,
    b: int,
    length: int,
) -> bool:
    """Whether `length` words from a on are, letter for letter, those from b on."""
    first_a, first_b = bounds_a[a], bounds_b[b]
    for w in range(length + 1):
        if bounds_a[a + w] - first_a != bounds_b[b + w] - first_b:
            return False
    for i in range(bounds_a[a + length] - first_a):  # noqa: SIM110 - all() of a generator does not compile
        if letters_a[first_a + i] != letters_b[first_b + i]:
            return False
    return True


@compiled
def scan_words(
    codes: np.ndarray,
    ends: np.ndarray,
    classes: np.ndarray,
    letters: np.ndarray,
    bounds: np.ndarray,
    prefix: np.ndarray,
    opens: np.ndarray,
    offsets: np.ndarray,
) -> int:
    """Fills the arrays of `Words`; returns how many letters there are."""
    size, count, position = 0, 0, 0
    bounds[0], prefix[0] = 0, np.uint64(0)
    for t in range(len(ends)):
        state, border, hashed = SEPARATOR, True, FNV_OFFSET
        while position <= ends[t]:
            kind = classes[codes[position]] if position < ends[t] else SEPARATOR
            if kind == IGNORED or (kind == MARK and state == SEPARATOR):
                position += 1
                continue
            joins = kind == MARK or (kind == LETTER and state == LETTER)
            if state != SEPARATOR and not joins:
                count += 1
                bounds[count], prefix[count] = size, prefix[count - 1] * BASE + mix(hashed)
                state = SEPARATOR
            if kind in (LETTER, LONE_LETTER, MARK):
                if state == SEPARATOR:
                    opens[count], border, state, hashed = border, False, kind, FNV_OFFSET
                letters[size] = codes[position]
                hashed = (hashed ^ np.uint64(codes[position])) * FNV_PRIME
                size += 1
            elif kind == BORDER:
                border = True
            position += 1
        position = ends[t]
        offsets[t + 1] = count
    return size


@compiled
def find_ngrams(
    prefix: np.ndarray,
    letters: np.ndarray,
    bounds: np.ndarray,
    offsets: np.ndarray,
    least: np.ndarray,
    item_letters: np.ndarray,
    item_bounds: np.ndarray,
    lengths: np.ndarray,
    seen: np.ndarray,
    hashes: np.ndarray,
    firsts: np.ndarray,
    place_word: np.ndarray,
    place_length: np.ndarray,
    found: np.ndarray,
) -> int:
    """Fills `found` as far as it goes; returns how many shared n-grams there are, `MAX_REPEATS` of one in a text."""
    powers = np.array([power(length) for length in lengths])
    bits = 0
    while (1 << bits) < len(seen):
        bits += 1
    shift = np.uint64(64 - bits)
    count = 0
    last_text, repeats = np.full(len(hashes), -1, np.int64), np.zeros(len(hashes), np.int64)
    for t in range(len(offsets) - 1):
        for w in range(offsets[t], offsets[t + 1]):
            for k in range(len(lengths)):
                length = lengths[k]
                if w + length > offsets[t + 1]:
                    break
                if length < least[t]:
                    continue
                hashed = ngram_hash(prefix, w, length, powers[k])
                if not seen[np.int64(hashed >> shift)]:
                    continue
                g = np.searchsorted(hashes, hashed)
                if g == len(hashes) or hashes[g] != hashed:
                    continue
                if last_text[g] != t:
                    last_text[g], repeats[g] = t, 0
                repeats[g] += 1
                if repeats[g] > MAX_REPEATS:
                    continue
                for p in range(firsts[g], firsts[g + 1]):
                    same = place_length[p] == length and equal_words(
                        letters, bounds, w, item_letters, item_bounds, place_word[p], length
                    )
                    if same:
                        if count < len(found):
                            found[count, 0], found[count, 1], found[count, 2] = t, w, p
                        count += 1
    return count


@compiled
def measure_stretches(
    firsts: np.ndarray,
    item_word: np.ndarray,
    row_word: np.ndarray,
    length: np.ndarray,
    header: np.ndarray,
    marked: np.ndarray,
    stretches: np.ndarray,
) -> None:
    """Fills matched words and longest stretch of every group, whose n-grams lie diagonal by diagonal, in order."""
    for group in range(len(firsts) - 1):
        matched, best, best_item, best_row = 0, 0, 0, 0
        start_item, start_row, end_item, end_row = 0, 0, -1, -1
        for i in range(firsts[group], firsts[group + 1]):
            for w in range(item_word[i], item_word[i] + length[i]):
                if marked[w] != group:
                    marked[w] = group
                    matched += not header[w]
            joins = item_word[i] <= end_item and row_word[i] - item_word[i] == end_row - end_item
            if not joins:
                start_item, start_row = item_word[i], row_word[i]
            end_item, end_row = item_word[i] + length[i], row_word[i] + length[i]
            if end_item - start_item > best:
                best, best_item, best_row = end_item - start_item, start_item, start_row
        stretches[group, 0], stretches[group, 1] = matched, best_item
        stretches[group, 2], stretches[group, 3] = best_row, best
