"""Marks of a row's text: injected template text, cut answers, repetition, refusals, leftovers, broken encoding.

All are heuristics that would rather miss than accuse, and those that go by words know English only.
"""

import re
from collections.abc import Sequence
from importlib.metadata import version

import pyarrow as pa

from qlora_core.data.row import Message, Row
from qlora_core.data.tags.injection import MarkerFinder
from qlora_core.data.tags.tagger import Tagged, fingerprint_of, tagged
from qlora_core.data.text_form import spaced

SCHEMA = pa.schema(
    [
        ("injection", pa.bool_()),
        ("truncated", pa.bool_()),
        ("repeated_turns", pa.bool_()),
        ("refusal", pa.bool_()),
        ("placeholder", pa.bool_()),
        ("mojibake", pa.bool_()),
        ("repetition", pa.float64()),
        ("answer_words", pa.int32()),
    ]
)

_VERSION = 1
_NGRAM_WORDS = 4
_MIN_REPEATED_WORDS = 4
_MIN_CUT_WORDS = 8

# A word is a run of letters and digits; of scripts that set no blanks between words, every character is one.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
_ASCII_WORD = re.compile(r"\w+", re.ASCII)  # the same on such text, in half the time

_REFUSAL_CHARACTERS = 250
_REFUSAL = re.compile(
    r"\bas an? (?:ai|artificial intelligence|(?:large )?language model)\b"
    r"|\b(?:i'm|i am|we're|we are) (?:very |so |really |truly )?(?:sorry|afraid)\b[^.!?]{0,40}"
    r"\b(?:can't|cannot|can not|won't|am (?:not able|unable)|'m (?:not able|unable))\b"
    r"|\bi (?:can't|cannot|can not|won't|am not able to|am unable to|must decline to|have to decline to)"
    r" (?:help|assist|comply|fulfill?|answer|provide|generate|create|write|engage|do that|support|continue)\b"
    r"|\bi'm (?:not able|unable) to (?:help|assist|comply|fulfill?|answer|provide|generate|create|write|engage)\b"
)
# No phrase above is without one of these; looking for them first is ten times as fast.
_REFUSAL_HINTS = (
    " ai", "artificial", "language model", "can't", "cannot", "can not", "won't", "able to", "unable", "not able",
    "decline",
)  # fmt: skip

_FENCED = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)
_PLACEHOLDER = re.compile(r"\{\{\s*[A-Za-z_][\w .-]{0,40}\s*\}\}|\[(?:your|insert)\b[^\]\n]{0,40}\]", re.IGNORECASE)
_LOST = "\ufffd"
_DOUBLE_BYTES = re.compile(r"[^\x00-\x7f]{2}|[ÂÃ] ")

_CUT_WORDS = frozenset([
    "a", "an", "and", "are", "as", "at", "because", "but", "by", "for", "from", "if", "in", "into", "is",
    "of", "or", "than", "that", "the", "their", "these", "this", "to", "was", "were", "when", "which",
    "while", "whose", "with", "without",
])  # fmt: skip
_CUT_MARKS = (",", "(", "[", "{", "/", "=", "–", "—", "&")


class TextMarksTagger:
    """Columns, all of them bool unless said otherwise:

    - `injection`: a turn or the rejected answer holds text of a chat template, or one of `special_texts`;
    - `truncated`: a trained answer breaks off: an open code fence, or in an answer of 8 words or more a last character
      after which text must follow, or a last word that ends no English sentence;
    - `repeated_turns`: a turn of 4 words or more says again what an earlier turn said, or a turn is blank;
    - `refusal`: a trained answer opens (250 characters) with a phrase of refusal;
    - `placeholder`: `{{name}}`, `[Your name]` or `[Insert date]` outside code;
    - `mojibake`: text decoded from the wrong encoding, by ftfy's rules, or a replacement character;
    - `repetition` (float): 1 - distinct / all word 4-grams of the trained answers, 0 to 1; null under 4 words;
    - `answer_words` (int): words of the last turn.
    """

    name = "text_marks"
    cached = True
    schema = SCHEMA

    def __init__(self, special_texts: Sequence[str] = ()) -> None:
        self._markers = MarkerFinder(special_texts)
        settings = {"markers": list(self._markers.markers), "ftfy": version("ftfy")}
        self.fingerprint = fingerprint_of(self.name, _VERSION, SCHEMA, settings)

    def tag(self, rows: Sequence[Row]) -> Tagged:
        """The marks of each row."""
        lines = [self._line(row) for row in rows]
        return tagged(SCHEMA, list(zip(*lines, strict=True)) if lines else [[] for _ in SCHEMA])

    def _line(self, row: Row) -> tuple[bool | float | int | None, ...]:
        contents = [message.content for message in row.messages]
        answers = [message.content for message in row.messages if message.train]
        words = [words_of(answer) for answer in answers]
        shown = contents if row.rejected is None else [*contents, row.rejected]
        last = words[-1] if row.messages[-1].train else words_of(contents[-1])
        return (
            any(map(self._markers.found_in, shown)),
            any(map(is_cut, answers, words)),
            has_repeated_turns(row.messages),
            any(map(is_refusal, answers)),
            any(map(has_placeholder, contents)),
            any(map(is_mojibake, contents)),
            repetition(words),
            len(last),
        )


def words_of(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return (_ASCII_WORD if text.isascii() else _WORD).findall(text.lower())


def repetition(answers: Sequence[Sequence[str]]) -> float | None:
    """1 - distinct / all of the word 4-grams of some texts, none of them across two texts; None if there are none."""
    seen: set[tuple[str, ...]] = set()
    count = 0
    for words in answers:
        grams = list(zip(*(words[start:] for start in range(_NGRAM_WORDS)), strict=False))
        count += len(grams)
        seen.update(grams)
    return 1 - len(seen) / count if count else None


def is_cut(answer: str, words: Sequence[str]) -> bool:
    """Whether an answer breaks off before its end."""
    if answer.count("```") % 2:
        return True
    if len(words) < _MIN_CUT_WORDS:
        return False
    text = answer.rstrip()
    if text.endswith(_CUT_MARKS):
        return True
    return text[-1:].isalpha() and text.rpartition(" ")[2] in _CUT_WORDS


def has_repeated_turns(messages: Sequence[Message]) -> bool:
    """Whether a turn is blank, or says in 4 words or more what an earlier one of either side said, spacing aside."""
    seen: set[str] = set()
    for message in messages:
        text = spaced(message.content).casefold()
        if not text or (text in seen and len(words_of(text)) >= _MIN_REPEATED_WORDS):
            return True
        seen.add(text)
    return False


def is_refusal(answer: str) -> bool:
    """Whether an answer opens with a phrase by which English-speaking assistants refuse."""
    opening = answer[:_REFUSAL_CHARACTERS].lower().replace("’", "'")
    return any(hint in opening for hint in _REFUSAL_HINTS) and _REFUSAL.search(opening) is not None


def has_placeholder(text: str) -> bool:
    """Whether a template's gap was left unfilled; code is allowed its braces."""
    if "{{" not in text and "[" not in text:
        return False
    if _PLACEHOLDER.search(text) is None:
        return False
    return "`" not in text or _PLACEHOLDER.search(_FENCED.sub(" ", text)) is not None


def is_mojibake(text: str) -> bool:
    """Whether a text was decoded from the wrong encoding: every such character became two or three."""
    if text.isascii():
        return False
    if _LOST in text:
        return True
    if _DOUBLE_BYTES.search(text) is None:
        return False
    from ftfy.badness import is_bad

    return bool(is_bad(text))
