"""One answer in the making: what was asked for, and what has happened to it so far.

The engine writes, in its own thread; whoever asked listens. Knows nothing of HTTP, models or batches.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from qlora_core.serving.answer_text import AnswerText, Decoder
from qlora_core.serving.sampling import Choice, Sampler, Sampling

FinishReason = Literal["stop", "length", "error"]


class Piece(NamedTuple):
    """What one token added: text to show (often empty), and the token itself; None for what is left at the end."""

    text: str
    choice: Choice | None


class Finish(NamedTuple):
    """The last thing to be heard of an answer. `completion_tokens` counts the stop token, too; `fault`: in words."""

    reason: FinishReason
    completion_tokens: int
    fault: str | None = None


Event = Piece | Finish


@dataclass(frozen=True)
class Wanted:
    """An answer as it was asked for. `stop_token_ids` end it and are no part of it; `adapter` None: the base."""

    prompt_ids: Sequence[int]
    adapter: str | None
    max_tokens: int
    sampling: Sampling
    stop_token_ids: frozenset[int]
    stops: Sequence[str]
    decoder: Decoder


class Answer:
    """A `Wanted` under way. `listen` is called in the engine's thread, for every event in turn."""

    def __init__(self, wanted: Wanted, listen: Callable[[Event], None]) -> None:
        self.wanted = wanted
        self.last_token = -1
        self._listen = listen
        self._sampler = Sampler(wanted.sampling)
        self._text = AnswerText(wanted.decoder, wanted.stops)
        self._count = 0
        self._cancelled = False
        self.done = False

    @property
    def cancelled(self) -> bool:
        """Whether nobody listens any more."""
        return self._cancelled

    def cancel(self) -> None:
        """Nobody listens any more: the engine lets go of it before its next step. From any thread."""
        self._cancelled = True

    def take(self, logits_v: torch.Tensor) -> None:
        """Choose the next token from its logits [vocabulary] and tell what it adds."""
        choice = self._sampler.choose(logits_v)
        self._count += 1
        self.last_token = choice.token
        if choice.token in self.wanted.stop_token_ids:
            self._end("stop")
            return
        self._listen(Piece(self._text.add(choice.token), choice))
        if self._text.stopped:
            self._end("stop")
        elif self._count >= self.wanted.max_tokens:
            self._end("length")

    def fail(self, fault: str) -> None:
        """It cannot be answered; said once."""
        if not self.done:
            self.done = True
            self._listen(Finish("error", self._count, fault))

    def _end(self, reason: FinishReason) -> None:
        rest = self._text.finish()
        if rest:
            self._listen(Piece(rest, None))
        self.done = True
        self._listen(Finish(reason, self._count))
