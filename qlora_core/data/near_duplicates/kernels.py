"""Compiled loops over bytes and hashes. Know arrays only: no text, no row, no threshold's meaning.

Every kernel releases Python's lock and gives the same result on any number of threads.
"""

from typing import Any

import numpy as np

from qlora_core.compiled import compiled

# Mixing constants of MurmurHash3's 64-bit finaliser and of FNV-1a (both public domain).
MIX_1, MIX_2 = np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53)
FNV_BASIS, FNV_PRIME = np.uint64(0xCBF29CE484222325), np.uint64(0x100000001B3)
POLYNOMIAL = np.uint64(0x9E3779B97F4A7C15)
SHIFT_33 = np.uint64(33)
SHIFT_32 = np.uint64(32)
# ASCII: everything up to the blank is white space or a control character.
BLANK, LINE_FEED, EXCLAMATION, FULL_STOP, COLON, QUESTION = 0x20, 0x0A, 0x21, 0x2E, 0x3A, 0x3F


@compiled
def mix(value: Any) -> Any:
    """Spread every bit of a 64-bit value over all of them."""
    value ^= value >> SHIFT_33
    value *= MIX_1
    value ^= value >> SHIFT_33
    value *= MIX_2
    return value ^ (value >> SHIFT_33)


@compiled
def hash_words(data: Any, start: int, stop: int, splits: Any, out: Any) -> int:
    """Hash each run of bytes in `data[start:stop]` at which `splits` is False into `out`; returns how many."""
    count = 0
    value = FNV_BASIS
    inside = False
    for place in range(start, stop):
        byte = data[place]
        if splits[byte]:
            if inside:
                out[count] = mix(value)
                count += 1
                value = FNV_BASIS
                inside = False
        else:
            value = (value ^ np.uint64(byte)) * FNV_PRIME
            inside = True
    if inside:
        out[count] = mix(value)
        count += 1
    return count


@compiled
def hash_shingles(data: Any, starts: Any, spaced_only: Any, splits: Any, words: int, out: Any, offsets: Any) -> None:
    """Shingle hashes of each text `data[starts[i]:starts[i + 1]]` into `out[offsets[i]:offsets[i + 1]]`, in text order.

    `splits` (2, 256) says at which bytes words end: row 0 for folded texts, row 1 for texts yet to be split at marks.
    A text of nothing but marks is split at white space. A text of fewer words than a shingle is one shingle.
    """
    position = 0
    for text in range(len(starts) - 1):
        start, stop = starts[text], starts[text + 1]
        count = 0
        if not spaced_only[text]:
            count = hash_words(data, start, stop, splits[1], out[position:])
        if count == 0:
            count = hash_words(data, start, stop, splits[0], out[position:])
        width = min(count, words)
        shingles = count - width + 1
        # Word k is read for the last time when shingle k is written in its place.
        for k in range(shingles):
            value = np.uint64(width)
            for word in range(position + k, position + k + width):
                value = value * POLYNOMIAL + out[word]
            out[position + k] = mix(value)
        position += shingles
        offsets[text + 1] = position


@compiled
def make_sets(hashes: Any, offsets: Any) -> int:
    """Sort each `hashes[offsets[i]:offsets[i + 1]]`, leave out what repeats, close the gaps; returns the new length."""
    position = 0
    start = offsets[0]
    for text in range(len(offsets) - 1):
        stop = offsets[text + 1]
        part = np.sort(hashes[start:stop])
        start = stop
        for k in range(len(part)):
            if k == 0 or part[k] != part[k - 1]:
                hashes[position] = part[k]
                position += 1
        offsets[text + 1] = position
    return position


@compiled
def add_up(hashes: Any, offsets: Any, out: Any) -> None:
    """A hash of each text's shingles, repeats included, that does not depend on their order."""
    for text in range(len(offsets) - 1):
        total = np.uint64(0)
        for k in range(offsets[text], offsets[text + 1]):
            total += mix(hashes[k] ^ POLYNOMIAL)
        out[text] = total


@compiled
def hash_bands(signatures: Any, band_rows: int, out: Any) -> None:
    """Hash every `band_rows` neighbouring values of each signature; `signatures` is (texts, permutations), `out` is
    (bands, texts) of 32 bits: a chance collision costs one comparison in vain.
    """
    for text in range(signatures.shape[0]):
        for band in range(out.shape[0]):
            value = np.uint64(band)
            for k in range(band * band_rows, (band + 1) * band_rows):
                value = mix(value * POLYNOMIAL + np.uint64(signatures[text, k]))
            out[band, text] = np.uint32(value >> SHIFT_32)


@compiled
def bucket_pairs(keys: Any, members: Any, largest: int) -> tuple[Any, Any]:
    """Pairs of members with equal keys, and the buckets too large to pair off.

    `keys` are sorted; `members` (int64, ascending within a key) lie in the same order. Returns pairs as
    `first << 32 | second` (uint64), and (start, stop) of each bucket of more than `largest` members.
    """
    count, large, start = 0, 0, 0
    for stop in range(1, len(keys) + 1):
        if stop == len(keys) or keys[stop] != keys[start]:
            size = stop - start
            if size > largest:
                large += 1
            else:
                count += size * (size - 1) // 2
            start = stop
    pairs = np.empty(count, np.uint64)
    buckets = np.empty((large, 2), np.int64)
    count, large, start = 0, 0, 0
    for stop in range(1, len(keys) + 1):
        if stop == len(keys) or keys[stop] != keys[start]:
            if stop - start > largest:
                buckets[large, 0], buckets[large, 1] = start, stop
                large += 1
            else:
                for i in range(start, stop):
                    for j in range(i + 1, stop):
                        pairs[count] = (np.uint64(members[i]) << SHIFT_32) | np.uint64(members[j])
                        count += 1
            start = stop
    return pairs, buckets


@compiled
def jaccard(first: Any, second: Any) -> float:
    """Size of the intersection over size of the union of two sorted sets, neither of them empty."""
    i, j, common = 0, 0, 0
    while i < len(first) and j < len(second):
        if first[i] == second[j]:
            common += 1
            i += 1
            j += 1
        elif first[i] < second[j]:
            i += 1
        else:
            j += 1
    return common / (len(first) + len(second) - common)


@compiled
def jaccard_pairs(
    hashes: Any, offsets: Any, left: Any, other_hashes: Any, other_offsets: Any, right: Any, out: Any
) -> None:
    """Jaccard similarity of set `left[k]` of the first collection and set `right[k]` of the other into `out[k]`."""
    for k in range(len(left)):
        i, j = left[k], right[k]
        out[k] = jaccard(hashes[offsets[i] : offsets[i + 1]], other_hashes[other_offsets[j] : other_offsets[j + 1]])


@compiled
def compare_with_leaders(
    hashes: Any,
    offsets: Any,
    leaders: Any,
    count: int,
    first: int,
    threshold: float,
    left: Any,
    right: Any,
    scores: Any,
) -> tuple[int, int, int, int, int]:
    """Compare sets `first`, `first + 1`, ... with the leaders among the sets before them.

    `leaders` holds the numbers of `count` sets and has room for more: a set that reaches `threshold` with none becomes
    one. Pairs that reach it go to `left`, `right`, `scores`, which have room for every set with every leader. Returns
    how many leaders there are, how many pairs were found and compared, how many sets matched and how many neither
    matched nor found room.
    """
    found, compared, matched, unmatched = 0, 0, 0, 0
    for member in range(first, len(offsets) - 1):
        mine = hashes[offsets[member] : offsets[member + 1]]
        before = found
        for k in range(count):
            theirs = hashes[offsets[leaders[k]] : offsets[leaders[k] + 1]]
            # The similarity of two sets is at most the share of the smaller in the larger.
            if min(len(mine), len(theirs)) / max(len(mine), len(theirs)) >= threshold:
                score = jaccard(theirs, mine)
                if score >= threshold:
                    left[found], right[found], scores[found] = leaders[k], member, score
                    found += 1
        compared += count
        if found > before:
            matched += 1
        elif count < len(leaders):
            leaders[count] = member
            count += 1
        else:
            unmatched += 1
    return count, found, compared, matched, unmatched


@compiled
def nearest_survivors(better: Any, worse: Any, scores: Any, survivor: Any, score: Any) -> None:
    """Give every row the best surviving row that it matches.

    Edges `(better[k], worse[k])` hold ranks, lower is better, and are sorted by `worse`, then `better`. `survivor`
    comes as 0, 1, 2 ... (each its own) and `score` as 1. A row matched only by rows that go survives.
    """
    for k in range(len(worse)):
        i, j = better[k], worse[k]
        if survivor[j] == j and survivor[i] == i:
            survivor[j] = i
            score[j] = scores[k]


@compiled
def find_root(parent: Any, node: int) -> int:
    """The root of a node's tree; halves the way there."""
    while parent[node] != node:
        parent[node] = parent[parent[node]]
        node = parent[node]
    return node


@compiled
def connect(left: Any, right: Any, parent: Any) -> None:
    """Join the trees of both ends of every edge; on return `parent[i]` is the lowest node connected with `i`."""
    for k in range(len(left)):
        a, b = find_root(parent, left[k]), find_root(parent, right[k])
        if a < b:
            parent[b] = a
        else:
            parent[a] = b
    for node in range(len(parent)):
        parent[node] = find_root(parent, node)


@compiled
def hash_continuation(data: Any, start: int, stop: int, words: int) -> Any:
    """A hash of the next `words` words in `data[start:stop]`, which starts with one."""
    value = FNV_BASIS
    for place in range(start, stop):
        blank = data[place] <= BLANK
        if blank and data[place - 1] > BLANK:
            words -= 1
            if words == 0:
                break
        if not blank:
            value = (value ^ np.uint64(data[place])) * FNV_PRIME
    return mix(value)


@compiled
def hash_prefixes(
    data: Any, starts: Any, min_words: int, min_characters: int, continuation_words: int, most: int
) -> tuple[Any, Any, Any, Any]:
    """Where the opening of each text `data[starts[i]:starts[i + 1]]` could end: after a sentence, a colon or a line.

    Returns the text, the bytes up to that end, the hash of those, and the hash of the words that follow; at most `most`
    ends a text, each after `min_words` words and `min_characters` characters (of UTF-8) or more, before something else.
    """
    size = (len(starts) - 1) * most
    text_of, end_of = np.empty(size, np.int64), np.empty(size, np.int64)
    prefix, following = np.empty(size, np.uint64), np.empty(size, np.uint64)
    count = 0
    for text in range(len(starts) - 1):
        start, stop = starts[text], starts[text + 1]
        value, words, characters, place, limit = FNV_BASIS, 0, 0, start, count + most
        while place < stop and count < limit:
            if data[place] > BLANK:
                value = (value ^ np.uint64(data[place])) * FNV_PRIME
                characters += (data[place] & 0xC0) != 0x80  # a byte that goes on with a character is none
                place += 1
                continue
            end, closes, long_enough = place, False, characters >= min_characters
            if place > start:
                words += 1
                last = data[place - 1]
                closes = last in (FULL_STOP, COLON, EXCLAMATION, QUESTION)
            at_end = value
            while place < stop and data[place] <= BLANK:
                closes = closes or data[place] == LINE_FEED
                value = (value ^ np.uint64(data[place])) * FNV_PRIME
                characters += 1
                place += 1
            if closes and words >= min_words and long_enough and place < stop:
                text_of[count], end_of[count], prefix[count] = text, end - start, mix(at_end)
                following[count] = hash_continuation(data, place, stop, continuation_words)
                count += 1
    return text_of[:count].copy(), end_of[:count].copy(), prefix[:count].copy(), following[:count].copy()
