"""From texts to words as arrays: letters, 64-bit word hashes, rolling n-gram hashes. Knows nothing of rows or items.

A word is a run of letters, digits and their combining marks, without case or compatibility forms. Scripts written
without blanks (Han, kana, Thai, Lao, Burmese, Khmer) have no such runs: there every letter is a word of its own.
"""

import functools
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qlora_core.data.decontamination.kernels import BORDER, IGNORED, LETTER, LONE_LETTER, MARK, scan_words

# First and last code point of scripts that put no blanks between words.
UNSPACED_SCRIPTS = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x3040, 0x30FF),  # kana
    (0x31F0, 0x31FF),
    (0x3400, 0x4DBF),  # Han
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x3FFFF),
)
# What may stand around a sentence. Comma, hyphen and apostrophe are not here: they stand inside one as well.
SENTENCE_BORDERS = '.!?:;…\n\r"“”«»„()[]{}<>#*|。、؟।'


@dataclass(frozen=True, slots=True)
class Words:
    """The words of T texts, W in all.

    letters: uint32 code points of all words, end to end. bounds: int64 [W + 1], word w is
    letters[bounds[w]:bounds[w + 1]]. prefix: uint64 [W + 1], from which `ngram_hash` takes any n-gram. opens: bool [W],
    whether the text or a sentence begins with the word. offsets: int64 [T + 1], text t has words
    offsets[t]:offsets[t + 1].
    """

    letters: np.ndarray
    bounds: np.ndarray
    prefix: np.ndarray
    opens: np.ndarray
    offsets: np.ndarray

    def text(self, first: int, last: int) -> str:
        """Words first to last - 1, one blank between them."""
        words = [self.letters[self.bounds[w] : self.bounds[w + 1]] for w in range(first, last)]
        return " ".join(word.astype("<u4").tobytes().decode("utf-32-le", "surrogatepass") for word in words)


def split_words(texts: Sequence[str]) -> Words:
    """The words of `texts`, each text's apart. A text without letters or digits has none."""
    plain = [text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).casefold() for text in texts]
    codes = np.frombuffer("".join(plain).encode("utf-32-le", "surrogatepass"), dtype="<u4")
    ends = np.cumsum([len(text) for text in plain], dtype=np.int64)
    letters = np.empty(len(codes), np.uint32)
    bounds = np.empty(len(codes) + 1, np.int64)
    prefix = np.empty(len(codes) + 1, np.uint64)
    opens = np.empty(len(codes), np.bool_)
    offsets = np.zeros(len(plain) + 1, np.int64)
    size = scan_words(codes, ends, _character_classes(), letters, bounds, prefix, opens, offsets)
    count = int(offsets[-1])
    return Words(
        letters[:size].copy(), bounds[: count + 1].copy(), prefix[: count + 1].copy(), opens[:count].copy(), offsets
    )


@functools.cache
def _character_classes() -> np.ndarray:
    """uint8 [0x110000]: what each code point is to a word."""
    table = np.zeros(0x110000, np.uint8)
    for code in range(0x110000):
        category = unicodedata.category(chr(code))
        if category[0] in "LN":
            table[code] = LETTER
        elif category[0] == "M":
            table[code] = MARK
        elif category == "Cf":
            table[code] = IGNORED
    for first, last in UNSPACED_SCRIPTS:
        part = table[first : last + 1]
        part[part == LETTER] = LONE_LETTER
    table[[ord(mark) for mark in SENTENCE_BORDERS]] = BORDER
    return table
