"""Asks an OpenAI-compatible endpoint for models and streamed answers; for the chat in the terminal.

The standard library's client, since one conversation needs no pool, and no proxy stands before a server on this
machine. Knows HTTP and server-sent events; knows nothing of terminals.
"""

import http.client
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

from qlora_core.errors import ConfigError, ServingError

CONNECT_TIMEOUT_S = 10.0
SILENCE_TIMEOUT_S = 600.0
_DATA = "data:"


class ChatClient:
    """One endpoint. `url` ends in /v1. Raises ConfigError for an address that is none."""

    def __init__(self, url: str, token: str | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{url!r} is no http(s) address; give one like http://127.0.0.1:8000/v1")
        self._parts, self._token = parts, token

    def models(self) -> list[str]:
        """The names that can be asked for. Raises ServingError where nothing answers, or the token is refused."""
        with self._open("GET", "models", None) as answer:
            listed = _read_json(answer.read())
        return [str(each["id"]) for each in listed.get("data", [])]

    def chat(self, model: str, messages: Sequence[Mapping[str, str]], settings: Mapping[str, Any]) -> Iterator[str]:
        """The pieces of an answer as they come. Closing the iterator early tells the server to stop.

        Raises:
            ServingError: refused, with the server's words; or cut off before its end.
        """
        body = {"model": model, "messages": [dict(each) for each in messages], "stream": True, **settings}
        with self._open("POST", "chat/completions", body) as answer:
            for raw in answer:
                line = raw.decode("utf-8").strip()
                if not line.startswith(_DATA):
                    continue
                data = line.removeprefix(_DATA).strip()
                if data == "[DONE]":
                    return
                yield _piece(_read_json(data.encode()))
        raise ServingError("the answer was cut off before its end; ask again")

    @contextmanager
    def _open(self, method: str, path: str, body: Any) -> Iterator[http.client.HTTPResponse]:
        parts = self._parts
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname or "", parts.port, timeout=CONNECT_TIMEOUT_S)
        headers = {"Content-Type": "application/json"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        try:
            connection.connect()
            connection.sock.settimeout(SILENCE_TIMEOUT_S)
            raw = None if body is None else json.dumps(body).encode()
            connection.request(method, f"{parts.path.rstrip('/')}/{path}", raw, headers)
            answer = connection.getresponse()
            if answer.status != 200:
                lost = answer.status == HTTPStatus.NOT_FOUND and not parts.path.rstrip("/").endswith("/v1")
                hint = "; an OpenAI-compatible address ends in /v1: add it to --url" if lost else ""
                raise ServingError(_refused(answer.status, answer.read()) + hint)
            yield answer
        except (OSError, http.client.HTTPException) as error:
            where = f"{parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}"
            raise ServingError(f"{where} does not answer ({error}); run `qlora serve`, or mend --url") from error
        finally:
            connection.close()


def _piece(chunk: dict[str, Any]) -> str:
    if "error" in chunk:
        raise ServingError(f"the server gave up: {chunk['error'].get('message')}")
    choices = chunk.get("choices") or [{}]
    return choices[0].get("delta", {}).get("content") or ""


def _refused(status: int, body: bytes) -> str:
    try:
        said = json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        said = body[:200].decode(errors="replace")
    return f"the server refuses (HTTP {status}): {said}"


def _read_json(raw: bytes) -> dict[str, Any]:
    try:
        value = json.loads(raw)
    except ValueError as error:
        raise ServingError(f"the server sent no JSON ({error}); is it an OpenAI-compatible endpoint?") from error
    if not isinstance(value, dict):
        raise ServingError(f"the server sent a {type(value).__name__}, not an object; is --url right?")
    return value
