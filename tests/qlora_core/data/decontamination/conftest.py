"""Coverage of items by rows, from tuples of words in plain loops: what the arrays and hashes must agree with."""

from collections import defaultdict
from collections.abc import Callable, Sequence

import pytest

Gram = tuple[str, ...]


def _grams(words: Sequence[str], size: int) -> list[Gram]:
    return [tuple(words[start : start + size]) for start in range(len(words) - size + 1)]


def _header_words(items: Sequence[Sequence[str]], size: int, max_items: int) -> list[set[int]]:
    """For each item of a set, the positions inside `size`-grams that more than `max_items` items hold."""
    holders: dict[Gram, set[int]] = defaultdict(set)
    for number, words in enumerate(items):
        for gram in _grams(words, size):
            holders[gram].add(number)
    return [
        {
            start + offset
            for start, gram in enumerate(_grams(words, size))
            if len(holders[gram]) > max_items
            for offset in range(size)
        }
        for words in items
    ]


def _coverages(
    messages: Sequence[Sequence[str]], items: Sequence[Sequence[str]], size: int, headers: Sequence[set[int]]
) -> dict[tuple[int, int], float]:
    """Coverage above 0 of every long item by every message: {(message, item): share}."""
    found = {}
    message_grams = [set(_grams(message, size)) for message in messages]
    for number, words in enumerate(items):
        plain = [position for position in range(len(words)) if position not in headers[number]]
        if not plain or plain[-1] - plain[0] + 1 < size:
            continue
        item_grams = list(enumerate(_grams(words, size)))
        for place, there in enumerate(message_grams):
            matched: set[int] = set()
            for start, gram in item_grams:
                positions = set(range(start, start + size)) if gram in there else set()
                if 2 * len(positions - headers[number]) >= size:
                    matched |= positions
            if matched:
                found[place, number] = len(matched - headers[number]) / len(plain)
    return found


@pytest.fixture(scope="session")
def header_words() -> Callable[..., list[set[int]]]:
    return _header_words


@pytest.fixture(scope="session")
def coverages() -> Callable[..., dict[tuple[int, int], float]]:
    return _coverages
