"""From a request to an answer under way: the model by name, the prompt's tokens, the room there is, and the listener.

Raises what is wrong with a request as ApiError. Knows engine and tokenizers; knows nothing of sockets.
"""

import asyncio
import contextlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qlora_core.data.row import Message
from qlora_core.digest import digest_json
from qlora_core.errors import EngineStoppedError, MaskError, QueueFullError
from qlora_core.serving.answer import Answer, Event, Wanted
from qlora_core.serving.engine import Engine
from qlora_core.serving.replies import ChatShape, CompletionShape, ReplyShape
from qlora_core.serving.served import Served, ServedModel
from qlora_core.serving.wire import ApiError, ChatRequest, CompletionRequest, GenerationRequest

RETRY_AFTER_S = 1
_UNLIMITED_TOKENS = 4096  # of an answer, where a model has no last position and the request names no limit


@dataclass(frozen=True)
class Ticket:
    """An answer under way: what to say it in, and the queue its events arrive in."""

    answer: Answer
    events: "asyncio.Queue[Event]"
    shape: ReplyShape

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.answer.wanted.prompt_ids)


class Desk:
    """Takes requests for what is served. `notes`: by name, why what answers may not be what the name means by now."""

    def __init__(self, served: Served, engine: Engine) -> None:
        self.served = served
        self.engine = engine
        self.notes: dict[str, str] = {}
        self._choosing = threading.RLock()

    def models(self) -> list[ServedModel]:
        """All that can be asked for, the base first."""
        with self._choosing:
            return list(self.served.models.values())

    def put(self, model: ServedModel) -> ServedModel | None:
        """Answer with `model` under its name from now on; returns what answered before. From any thread.

        Requests taken before are in the engine's queue, or answered, when this returns.
        """
        with self._choosing:
            before = self.served.models.get(model.id)
            self.served.models[model.id] = model
        return before

    def model(self, name: str) -> ServedModel:
        """The model of a name. Raises ApiError 404."""
        with self._choosing:
            found, known = self.served.models.get(name), ", ".join(self.served.models)
        if found is None:
            raise ApiError(404, f"no model is named {name!r}; there are {known}", code="model_not_found", param="model")
        return found

    def take(self, request: ChatRequest | CompletionRequest) -> Ticket:
        """Queue what is asked for; call from the event loop that will listen."""
        with self._choosing:  # until it is queued, what it asks for stays on the base
            return self._take(request)

    def _take(self, request: ChatRequest | CompletionRequest) -> Ticket:
        model = self.model(request.model)
        if isinstance(request, ChatRequest):
            ids, shape_of = self._chat_ids(model, request), ChatShape
        else:
            ids, shape_of = self._prompt_ids(model, request), CompletionShape
        wanted = Wanted(
            prompt_ids=ids,
            adapter=model.adapter,
            max_tokens=self._room(ids, request),
            sampling=request.sampling,
            stop_token_ids=model.stop_token_ids,
            stops=request.stop,
            decoder=model.decoder,
        )
        shape = shape_of(model.id, _fingerprint(model), model.chat.tokenizer, request.wanted_logprobs is not None)
        return self._queue(wanted, shape)

    def _queue(self, wanted: Wanted, shape: ReplyShape) -> Ticket:
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def listen(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to hear it
                loop.call_soon_threadsafe(events.put_nowait, event)

        try:
            return Ticket(self.engine.ask(wanted, listen), events, shape)
        except QueueFullError as error:
            headers = {"Retry-After": str(RETRY_AFTER_S)}
            raise ApiError(429, str(error), kind="rate_limit_error", code="queue_full", headers=headers) from error
        except EngineStoppedError as error:
            raise ApiError(503, str(error), kind="server_error", code="stopping") from error

    def _chat_ids(self, model: ServedModel, request: ChatRequest) -> Sequence[int]:
        messages = []
        for place, each in enumerate(request.messages):
            special = model.chat.special_text.search(each.text)
            if special is not None:
                where = f"messages.{place}.content"
                raise ApiError(400, f"{where} holds the special token {special[0]!r}; take it out", param=where)
            messages.append(Message("system" if each.role == "developer" else each.role, each.text))
        try:
            text = model.chat.render(messages, add_generation_prompt=True)
        except MaskError as error:
            raise ApiError(400, f"the chat template refuses these messages: {error}", param="messages") from error
        return model.chat.encode([text])[0]

    def _prompt_ids(self, model: ServedModel, request: CompletionRequest) -> Sequence[int]:
        prompt: Any = request.prompt
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], int):
            return self._checked_ids(prompt)
        text = prompt if isinstance(prompt, str) else "".join(prompt)
        ids = model.chat.encode([text])[0]
        bos = model.chat.bos_token_id
        ids = [bos, *ids] if bos is not None and ids[:1] != [bos] else ids
        return self._checked_ids(ids)

    def _checked_ids(self, ids: Sequence[int]) -> Sequence[int]:
        if not ids:
            raise ApiError(400, "prompt is empty; it needs at least one token", param="prompt")
        odd = [each for each in ids if not 0 <= each < self.served.vocabulary]
        if odd:
            raise ApiError(400, f"prompt: token {odd[0]} is outside the vocabulary of {self.served.vocabulary}")
        return ids

    def _room(self, ids: Sequence[int], request: GenerationRequest) -> int:
        """How many tokens the answer may have: what was asked for, or less where the model's positions end."""
        limit, wanted = self.served.max_positions, request.wanted_tokens
        if limit is None:
            return wanted or _UNLIMITED_TOKENS
        if len(ids) >= limit:
            raise ApiError(
                400,
                f"the prompt has {len(ids)} tokens and the model takes {limit} with the answer; shorten it",
                code="context_length_exceeded",
                param="messages" if isinstance(request, ChatRequest) else "prompt",
            )
        return min(wanted or limit, limit - len(ids))


def _fingerprint(model: ServedModel) -> str:
    """Changes with the weights that answer and the template they are asked in."""
    return f"fp_{digest_json([model.id, model.digest, str(model.chat.tokenizer.chat_template)])[:12]}"
