"""The endpoint: paths, who may call, how much may be sent, streams as server-sent events, and clients that go away.

Knows HTTP; what a request means is `desk`, what may be asked is `wire`.
"""

import asyncio
import hmac
import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import HTTPException
from fastapi.responses import JSONResponse, StreamingResponse

from qlora_core.listening import is_loopback
from qlora_core.serving.answer import Finish, Piece
from qlora_core.serving.desk import Desk, Ticket
from qlora_core.serving.served import ServedModel
from qlora_core.serving.wire import ApiError, ChatRequest, CompletionRequest, parse_request

HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
_LISTEN_S = 0.2
_DONE = "data: [DONE]\n\n"


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


def create_app(desk: Desk, *, token: str | None, max_body_bytes: int) -> FastAPI:
    """The endpoint over what `desk` serves. `token`: what callers must bear; None: only callers on this machine.

    Without a token, requests that a web page could make a browser send are refused by their Host and Origin.
    """
    app = FastAPI(title="qlora serve", docs_url=None, redoc_url=None, openapi_url=None)
    _add_errors(app)

    @app.middleware("http")
    async def guard(request: Request, call_next: Any) -> Response:
        refusal = None if request.url.path == "/health" else _refusal(request, token)
        response = await call_next(request) if refusal is None else _error(refusal)
        response.headers.update(HEADERS)
        return response

    @app.get("/health")
    async def health() -> Response:
        load = desk.engine.load
        content = {"status": "ok" if desk.engine.alive else "stopped", **vars(load)}
        return JSONResponse(content, status_code=200 if desk.engine.alive else 503)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_card(model, desk) for model in desk.models()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        return _card(desk.model(name), desk)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await _answer(desk, request, parse_request(ChatRequest, await _body(request, max_body_bytes)))

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _answer(desk, request, parse_request(CompletionRequest, await _body(request, max_body_bytes)))

    return app


async def _answer(desk: Desk, request: Request, wanted: ChatRequest | CompletionRequest) -> Response:
    ticket = desk.take(wanted)
    try:
        if wanted.stream:
            first = await _next(ticket, request)
            if isinstance(first, Finish) and first.reason == "error":
                raise _failed(first)
            options = wanted.stream_options
            stream = _stream(ticket, request, first, options is not None and options.include_usage)
            return StreamingResponse(stream, media_type="text/event-stream")
        return JSONResponse(await _whole(ticket, request))
    except ClientGoneError:
        ticket.answer.cancel()
        return Response(status_code=499)  # nobody reads it
    except BaseException:
        ticket.answer.cancel()
        raise


async def _whole(ticket: Ticket, request: Request) -> dict[str, Any]:
    pieces: list[Piece] = []
    while isinstance(event := await _next(ticket, request), Piece):
        pieces.append(event)
    if event.reason == "error":
        raise _failed(event)
    return ticket.shape.whole(pieces, event, ticket.prompt_tokens)


async def _stream(ticket: Ticket, request: Request, first: Piece | Finish, with_usage: bool) -> AsyncIterator[str]:
    """Server-sent events. An answer that fails under way ends with an error and without [DONE]."""
    shape, event, held = ticket.shape, first, []
    try:
        if (opening := shape.opening()) is not None:
            yield _event(opening)
        while isinstance(event, Piece):
            held.append(event)
            if event.text:
                yield _event(shape.piece(held))
                held = []
            event = await _next(ticket, request)
        if event.reason == "error":
            yield _event(_failed(event).body)
            return
        if held and shape.logprobs:  # tokens without a text of their own
            yield _event(shape.piece(held))
        yield _event(shape.closing(event))
        if with_usage:
            yield _event(shape.counts(event, ticket.prompt_tokens))
        yield _DONE
    except ClientGoneError:
        return
    finally:
        ticket.answer.cancel()


async def _next(ticket: Ticket, request: Request) -> Piece | Finish:
    """The next event of an answer. Raises ClientGoneError once the client has closed its connection."""
    while True:
        try:
            return await asyncio.wait_for(ticket.events.get(), _LISTEN_S)
        except TimeoutError:
            if await request.is_disconnected():
                raise ClientGoneError from None


async def _body(request: Request, limit: int) -> bytes:
    """The whole body. Raises ApiError 413 as soon as it is longer than `limit`, 415 for another type than JSON."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "send Content-Type: application/json")
    length = request.headers.get("content-length", "")
    received = bytearray()
    too_long = length.isdigit() and int(length) > limit
    if not too_long:
        async with aclosing(request.stream()) as parts:
            async for part in parts:
                received += part
                if len(received) > limit:
                    too_long = True
                    break
    if too_long:
        raise ApiError(413, f"the body is over {limit} bytes; send less", code="body_too_large")
    return bytes(received)


def _refusal(request: Request, token: str | None) -> ApiError | None:
    """Why this caller is not let in, or None."""
    if token is not None:
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), token.encode()):
            return None
        message = "the token is missing or wrong; send Authorization: Bearer TOKEN"
        return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
    for header, value in (("Host", request.headers.get("host")), ("Origin", request.headers.get("origin"))):
        if value is None:
            continue
        host = urlsplit(value if header == "Origin" else f"//{value}").hostname
        if host is None or not is_loopback(host):
            return ApiError(403, f"{header} {value!r} is not this machine; set a token to serve others", code="foreign")
    return None


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def refuse(request: Request, error: ApiError) -> Response:
        return _error(error)

    @app.exception_handler(HTTPException)
    @app.exception_handler(404)
    @app.exception_handler(405)
    async def no_such_path(request: Request, error: Any) -> Response:
        status = getattr(error, "status_code", 404)
        return _error(ApiError(status, f"{request.method} {request.url.path}: {getattr(error, 'detail', 'not found')}"))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return _error(ApiError(500, "the server failed; see its log", kind="server_error"))


def _error(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body, status_code=error.status, headers=error.headers)


def _failed(finish: Finish) -> ApiError:
    return ApiError(500, finish.fault or "the answer failed", kind="server_error", code="model_failed")


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _card(model: ServedModel, desk: Desk) -> dict[str, Any]:
    """A model as it is listed; what this server adds to OpenAI's keys stands under `qlora`."""
    source = model.source
    return {
        "id": model.id,
        "object": "model",
        "created": 0,
        "owned_by": "qlora",
        "qlora": {
            "kind": "base" if model.adapter is None else "adapter",
            "adapter_digest": model.digest,
            "bound_by": model.bound_by,
            "address": None if source is None else source.address,
            "version": None if source is None else source.version,
            "note": desk.notes.get(model.id),
            "chat_template": model.chat.origin,
        },
    }
