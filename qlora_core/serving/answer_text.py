"""The text of an answer as its tokens arrive: what may be shown already, and where a stop string ends it.

Held back are bytes of an unfinished character and whatever may yet turn out to be a stop string. All that was shown,
together, is the text of all tokens up to the first stop string. Knows a tokenizer; knows nothing of batches or HTTP.
"""

from collections.abc import Sequence
from typing import Any, Protocol

UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class Decoder(Protocol):
    """What a tokenizer does here."""

    def decode(self, token_ids: Any, *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> Any:
        """The text, a string, of a list of tokens."""
        ...


class AnswerText:
    """Takes tokens one by one and gives pieces of text; `stopped` once a stop string was met."""

    def __init__(self, decoder: Decoder, stops: Sequence[str] = ()) -> None:
        self._decoder = decoder
        self._stops = tuple(stops)
        self._ids: list[int] = []
        self._shown = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """The piece of text that can be shown after this token; often empty."""
        self._ids.append(token)
        text = self._text()
        cut = min((place for place in map(text.find, self._stops) if place >= 0), default=None)
        if cut is not None:
            self.stopped = True
            return self._show(text[:cut])
        text = text.rstrip(UNFINISHED)
        return self._show(text[: len(text) - self._held(text)])

    def finish(self) -> str:
        """What is left to show once no token follows."""
        return "" if self.stopped else self._text()[len(self._shown) :]

    def _text(self) -> str:
        return self._decoder.decode(self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _show(self, text: str) -> str:
        if not text.startswith(self._shown):
            return ""  # a token changed how those before it read: wait for what follows
        piece, self._shown = text[len(self._shown) :], text
        return piece

    def _held(self, text: str) -> int:
        """How many of the last characters begin a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
