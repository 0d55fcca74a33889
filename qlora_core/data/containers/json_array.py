"""The elements of a JSON array one by one, from pieces of its text. What is outside of the elements must be flawless.

An element that cannot be parsed is set aside alone as long as its brackets and quotes say where it ends.
"""

import codecs
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace

from qlora_core.data.containers.json_value import MAX_NESTING, parse_json
from qlora_core.data.containers.record import Quarantined, Record, set_aside, too_long
from qlora_core.data.row import LONE_SURROGATE, RowError

JSON_BLANKS = " \t\r\n"
_BLANKS = re.compile(f"[{JSON_BLANKS}]*")
_OUTSIDE = re.compile(r'["\[\]{},]')
_INSIDE = re.compile(r'["\\]')
_DECODER = json.JSONDecoder()


class ArrayError(ValueError):
    """The text is no JSON array as a whole. `cut` tells one that only ends too early."""

    def __init__(self, message: str, *, cut: bool = False) -> None:
        super().__init__(message)
        self.cut = cut


def array_elements(name: str, read: Callable[[], bytes], max_row_bytes: int) -> Iterator[Record | Quarantined]:
    """The elements in order, with the line each starts on. `read` gives the next bytes, none at the end.

    Where the line holds what is before an element too, the reason for setting it aside ends on the element's number.
    Memory is bounded by one piece and one element of `max_row_bytes`. Raises ArrayError where the array itself breaks.
    """
    window = _Window(read)
    window.next_mark()
    window.at += 1  # the opening bracket, by which the array was recognised
    mark = window.next_mark()
    if mark == "]":
        window.at += 1
    else:
        mark = ","
    number = 0
    while mark != "]":
        number += 1
        line_before = window.line
        window.next_mark()
        outcome = _element(name, window, max_row_bytes)
        if isinstance(outcome, Quarantined) and outcome.line == line_before:
            outcome = replace(outcome, reason=f"{outcome.reason} (element {number} of the array)")
        yield outcome
        mark = window.next_mark()
        if mark not in (",", "]"):
            raise window.fault("expected ',' or ']'")
        window.at += 1
    if window.next_mark():
        raise ArrayError(f"text after the end of the array on line {window.line}")


class _Window:
    """The part of the text that is in memory, and the place up to which it is done with.

    Bytes that are no UTF-8 become lone surrogates, so that one bad element does not end the reading.
    """

    def __init__(self, read: Callable[[], bytes]) -> None:
        self._read = read
        self._decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
        self._line, self._counted = 1, 0
        self.text, self.at = "", 0

    @property
    def line(self) -> int:
        """The line of the place that has been reached."""
        self._line += self.text.count("\n", self._counted, self.at)
        self._counted = self.at
        return self._line

    def more(self) -> bool:
        """Read on; what is done with is let go, so that places count anew. False at the end."""
        data = self._read()
        text = self._decode(data, not data)
        _ = self.line
        self.text, self.at, self._counted = self.text[self.at :] + text, 0, 0
        return bool(data)

    def next_mark(self) -> str:
        """Go to the next character that is not blank and say which it is; '' at the end."""
        while True:
            blanks = _BLANKS.match(self.text, self.at)
            self.at = blanks.end() if blanks else self.at
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return self.text[self.at : self.at + 1]

    def fault(self, message: str) -> ArrayError:
        """The fault at the place reached, which may be the end."""
        return ArrayError(f"{message} on line {self.line}", cut=not self.next_mark())


def _element(name: str, window: _Window, max_bytes: int) -> Record | Quarantined:
    line = window.line
    try:
        value, end = _DECODER.raw_decode(window.text, window.at)
    except (ValueError, RecursionError):
        value, end = None, len(window.text)
    # At the end of the window a number may go on beyond it, and a fault may be a mere lack of text.
    if end == len(window.text):
        return _element_across(name, window, max_bytes)
    text, start, window.at = window.text, window.at, end
    suspect = (
        4 * (end - start) > max_bytes
        or text.count("[", start, end) + text.count("{", start, end) > MAX_NESTING
        or LONE_SURROGATE.search(text, start, end)
    )
    return _parsed(name, line, text[start:end], max_bytes) if suspect else Record(line, value)


def _element_across(name: str, window: _Window, max_bytes: int) -> Record | Quarantined:
    """An element that reaches beyond the window, or is faulty: its end is looked for by brackets and quotes."""
    line, scan, kept, place = window.line, _Scan(), True, window.at
    while (end := scan.end_of_value(window.text, place)) < 0:
        if len(window.text) - window.at > max_bytes:
            kept = False
        if not kept:
            window.at = len(window.text)
        place = len(window.text) - window.at
        if not window.more():
            raise ArrayError(f"it ends within the element that starts on line {line}", cut=True)
    text, window.at = window.text[window.at : end], end
    if not kept:
        return set_aside(name, line, too_long(max_bytes))
    if not text.strip(JSON_BLANKS):
        raise window.fault("expected a value")
    return _parsed(name, line, text, max_bytes)


def _parsed(name: str, line: int, text: str, max_bytes: int) -> Record | Quarantined:
    try:
        if len(text.encode(errors="surrogateescape")) > max_bytes:
            return set_aside(name, line, too_long(max_bytes))
        if LONE_SURROGATE.search(text):
            raise RowError("not UTF-8: the element holds bytes that are no text")
        return Record(line, parse_json(text.strip(JSON_BLANKS)))
    except RowError as error:
        return set_aside(name, line, error)


class _Scan:
    """Looks for the comma or bracket that ends a value, in one text after the other."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def end_of_value(self, text: str, place: int) -> int:
        """Where the value ends in `text`, looked at from `place` on; -1 if it goes on in the next."""
        if self._escaped and place < len(text):
            place, self._escaped = place + 1, False
        while found := (_INSIDE if self._in_string else _OUTSIDE).search(text, place):
            place = found.end()
            mark = found[0]
            if mark == "\\":
                self._escaped = place == len(text)
                place += 1
            elif mark == '"':
                self._in_string = not self._in_string
            elif mark in "[{":
                self._depth += 1
            elif self._depth == 0:
                return found.start()
            elif mark != ",":
                self._depth -= 1
        return -1
