"""Serving the endpoint: the socket, the token, the engine's life, a clean end. Knows addresses, not answers."""

import socket
from collections.abc import Mapping
from dataclasses import dataclass

import uvicorn

from qlora_core.errors import ConfigError
from qlora_core.listening import http_address, is_loopback, listen
from qlora_core.serving.app import create_app
from qlora_core.serving.desk import Desk
from qlora_core.serving.engine import Engine
from qlora_core.serving.following import Follower, Following
from qlora_core.serving.served import Served

TOKEN_VARIABLE = "QLORA_SERVE_TOKEN"
MIN_TOKEN_CHARACTERS = 16
GRACE_S = 10


@dataclass(frozen=True)
class Limits:
    """How much is taken on at once: rows of the batch, requests that wait, bytes of a body."""

    rows: int = 16
    waiting: int = 64
    body_bytes: int = 1 << 20


@dataclass(frozen=True)
class ModelServer:
    """An endpoint that listens and has yet to answer; `url` ends in /v1, as OpenAI's clients want it."""

    url: str
    needs_token: bool
    engine: Engine
    follower: Follower | None
    _server: uvicorn.Server
    _socket: socket.socket

    def run(self) -> None:
        """Answer until SIGINT or SIGTERM, which uvicorn passes on after the last answer, or after 10 s."""
        self.engine.start()
        if self.follower is not None:
            self.follower.start()
        try:
            self._server.run(sockets=[self._socket])
        finally:
            if self.follower is not None:
                self.follower.stop()
            self.engine.stop()
            self._socket.close()

    def stop(self) -> None:
        """Let `run` end as a signal would; from another thread."""
        self._server.should_exit = True


def check_access(host: str, environment: Mapping[str, str]) -> str | None:
    """The token callers must bear, None where none is set. Raises ConfigError for a short one, or none beyond loopback.

    Called before a model is loaded, so that a mistake is told at once.
    """
    token = environment.get(TOKEN_VARIABLE) or None
    if token is None and not is_loopback(host):
        raise ConfigError(
            f"host {host} can be reached from other machines; set {TOKEN_VARIABLE} (openssl rand -hex 32), "
            "or serve on 127.0.0.1"
        )
    if token is not None and (len(token) < MIN_TOKEN_CHARACTERS or not token.isprintable() or " " in token):
        raise ConfigError(f"{TOKEN_VARIABLE} must have {MIN_TOKEN_CHARACTERS} characters or more, none of them a space")
    return token


def open_model_server(
    served: Served,
    *,
    host: str,
    port: int,
    environment: Mapping[str, str],
    limits: Limits | None = None,
    following: Following | None = None,
) -> ModelServer:
    """Listen on `host`:`port` (0: a free one). `following`: names whose alias is looked up again while it answers.

    Raises:
        ConfigError: see `check_access`; an address that cannot be had. ModelError: see `RunningBatch`.
    """
    limits = limits or Limits()
    token = check_access(host, environment)
    engine = Engine(served.model, rows=limits.rows, waiting=limits.waiting)
    desk = Desk(served, engine)
    follower = None if following is None else Follower(desk, following)
    app = create_app(desk, token=token, max_body_bytes=limits.body_bytes)
    listening = listen(host, port)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
        timeout_graceful_shutdown=GRACE_S,
    )
    url = f"{http_address(host, listening)}/v1"
    return ModelServer(url, token is not None, engine, follower, uvicorn.Server(config), listening)
