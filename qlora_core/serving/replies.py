"""Answers in OpenAI's shapes: whole, or in pieces for a stream. Knows JSON; knows nothing of HTTP or models."""

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from qlora_core.serving.answer import Finish, Piece
from qlora_core.serving.answer_text import UNFINISHED, Decoder
from qlora_core.serving.sampling import Choice


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Token counts; those of an answer count its stop token."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


@dataclass
class ReplyShape:
    """What is common to all pieces of one reply. `logprobs`: whether they were asked for."""

    model: str
    fingerprint: str
    decoder: Decoder
    logprobs: bool
    object: str = ""
    prefix: str = ""
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.id = f"{self.prefix}-{secrets.token_hex(12)}"

    def whole(self, pieces: Sequence[Piece], finish: Finish, prompt_tokens: int) -> dict[str, Any]:
        """The reply at once."""
        choice = self._answer("".join(piece.text for piece in pieces), self._logs(pieces)) | {
            "index": 0,
            "finish_reason": finish.reason,
        }
        counts = usage(prompt_tokens, finish.completion_tokens)
        return self._envelope(self.object) | {"choices": [choice], "usage": counts}

    def opening(self) -> dict[str, Any] | None:
        """What a stream begins with, if anything."""
        return None

    def piece(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """Part of a stream: the text and tokens of some pieces."""
        choice = self._part("".join(piece.text for piece in pieces), self._logs(pieces))
        return self._chunk([choice | {"index": 0, "finish_reason": None}])

    def closing(self, finish: Finish) -> dict[str, Any]:
        """The part that says why the answer ended."""
        return self._chunk([self._part("", None) | {"index": 0, "finish_reason": finish.reason}])

    def counts(self, finish: Finish, prompt_tokens: int) -> dict[str, Any]:
        """The part without choices that `include_usage` asks for."""
        return self._chunk([]) | {"usage": usage(prompt_tokens, finish.completion_tokens)}

    def _envelope(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }

    def _logs(self, pieces: Sequence[Piece]) -> dict[str, Any] | None:
        return self._told([piece.choice for piece in pieces if piece.choice is not None]) if self.logprobs else None

    def _token_text(self, token: int) -> str:
        return self.decoder.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        raise NotImplementedError

    def _answer(self, text: str, logs: dict[str, Any] | None) -> dict[str, Any]:
        raise NotImplementedError

    def _part(self, text: str, logs: dict[str, Any] | None) -> dict[str, Any]:
        raise NotImplementedError

    def _told(self, choices: Sequence[Choice]) -> dict[str, Any]:
        raise NotImplementedError


@dataclass
class ChatShape(ReplyShape):
    """Replies of /v1/chat/completions."""

    object: str = "chat.completion"
    prefix: str = "chatcmpl"

    def opening(self) -> dict[str, Any] | None:
        """The role."""
        delta = {"role": "assistant", "content": ""}
        return self._chunk([{"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}])

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._envelope("chat.completion.chunk") | {"choices": choices}

    def _answer(self, text: str, logs: dict[str, Any] | None) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}, "logprobs": logs}

    def _part(self, text: str, logs: dict[str, Any] | None) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}, "logprobs": logs}

    def _told(self, choices: Sequence[Choice]) -> dict[str, Any]:
        return {
            "content": [
                self._entry(choice.token, choice.logprob)
                | {"top_logprobs": [self._entry(*each) for each in choice.top]}
                for choice in choices
            ],
            "refusal": None,
        }

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._token_text(token)
        # part of a character has no text, and its bytes are the tokenizer's own affair
        return {"token": text, "logprob": logprob, "bytes": None if UNFINISHED in text else list(text.encode())}


@dataclass
class CompletionShape(ReplyShape):
    """Replies of /v1/completions."""

    object: str = "text_completion"
    prefix: str = "cmpl"

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._envelope("text_completion") | {"choices": choices}

    def _answer(self, text: str, logs: dict[str, Any] | None) -> dict[str, Any]:
        return {"text": text, "logprobs": logs}

    def _part(self, text: str, logs: dict[str, Any] | None) -> dict[str, Any]:
        return self._answer(text, logs)

    def _told(self, choices: Sequence[Choice]) -> dict[str, Any]:
        texts = [self._token_text(choice.token) for choice in choices]
        return {
            "tokens": texts,
            "token_logprobs": [choice.logprob for choice in choices],
            "top_logprobs": [{self._token_text(token): value for token, value in choice.top} for choice in choices],
            "text_offset": [sum(map(len, texts[:place])) for place in range(len(texts))],
        }
