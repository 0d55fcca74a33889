"""Serving the page: the socket, who may reach it, the links to give out. Knows addresses, not votes."""

import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from qlora_core.errors import ConfigError
from qlora_core.evaluation.verdict import Verdict
from qlora_core.evaluation.vote.ballots import BallotBox, digest_pairs
from qlora_core.evaluation.vote.links import SECRET_VARIABLE, Grant, LinkSigner, check_rater_name, signing_secret
from qlora_core.evaluation.vote.page import create_app
from qlora_core.evaluation.vote.pairs import read_pairs
from qlora_core.listening import http_address, is_loopback, listen

DAY_S = 86400
DEFAULT_RATER = "rater"


@dataclass(frozen=True)
class VoteServer:
    """A page that listens and has yet to answer. `links` are by rater; `results` is for the study's owner alone."""

    links: Mapping[str, str]
    results: str
    _server: uvicorn.Server
    _socket: socket.socket

    def run(self) -> None:
        """Answer until SIGINT or SIGTERM, which uvicorn passes on after its last answer."""
        self._server.run(sockets=[self._socket])


def open_server(
    box: BallotBox,
    *,
    raters: Sequence[str],
    host: str,
    port: int,
    link_days: float,
    environment: Mapping[str, str],
    public_url: str | None = None,
    judge: Sequence[Verdict] = (),
) -> VoteServer:
    """Listen on `host`:`port` (0: a free one) and sign one link per rater, "rater" if none is named.

    `public_url` is the address raters use where a proxy stands before this one. Raises ConfigError for a bad rater
    name, an address that cannot be had, and one beyond loopback without a secret in QLORA_VOTE_SECRET.
    """
    names = [check_rater_name(name) for name in raters] or [DEFAULT_RATER]
    if not is_loopback(host) and SECRET_VARIABLE not in environment:
        raise ConfigError(
            f"host {host} can be reached from other machines; set {SECRET_VARIABLE} (openssl rand -hex 32), "
            "or serve on 127.0.0.1"
        )
    secret = signing_secret(box.journal.path, environment)
    signer = LinkSigner(secret, box.study_id)
    listening = listen(host, port)
    base = (public_url or http_address(host, listening)).rstrip("/")
    expires_at = int(time.time() + link_days * DAY_S)
    config = uvicorn.Config(
        create_app(box, signer, judge), log_config=None, access_log=False, server_header=False, lifespan="off"
    )
    return VoteServer(
        links={name: f"{base}/r/{signer.sign(Grant('rate', name, expires_at))}" for name in names},
        results=f"{base}/results/{signer.sign(Grant('results', '', expires_at))}",
        _server=uvicorn.Server(config),
        _socket=listening,
    )


def open_study(path: Path, pairs_path: Path | None, settings: Mapping[str, object]) -> BallotBox:
    """The study at `path`, begun with the pairs of `pairs_path` where there is none yet.

    `settings` with a value must be those an existing study has; ConfigError names the first that differs.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    if not path.exists():
        if pairs_path is None:
            raise ConfigError(f"{path} is not there and no pairs are named; give a file of pairs to begin a study")
        return BallotBox.create(path, read_pairs(pairs_path), **given)
    box = BallotBox(path)
    if pairs_path is not None and digest_pairs(read_pairs(pairs_path)) != box.pairs_digest:
        raise ConfigError(f"{path} holds a study of other pairs than {pairs_path}; name another --study")
    for name, value in given.items():
        if (kept := getattr(box.settings, name)) != value:
            raise ConfigError(f"the study {path} was begun with {name} {kept}, not {value}; leave it out")
    return box
