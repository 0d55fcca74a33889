"""Signed links: who may rate or read results, in which study, until when. Knows nothing of votes or the web."""

import hashlib
import os
import re
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from itsdangerous import BadSignature, URLSafeSerializer

from qlora_core.errors import ConfigError

SECRET_VARIABLE = "QLORA_VOTE_SECRET"
MIN_SECRET_CHARACTERS = 16
RATER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+-]{0,63}")
Role = Literal["rate", "results"]


class LinkError(Exception):
    """A link that opens nothing; the message is for whoever followed it."""


class Grant(NamedTuple):
    """What a link allows. `rater` is empty in a link to the results; `expires_at` in seconds since 1970."""

    role: Role
    rater: str
    expires_at: int


class LinkSigner:
    """Signs and reads the tokens of one study's links (HMAC-SHA-256)."""

    def __init__(self, secret: str, study_id: str) -> None:
        self._study_id = study_id
        self._serializer = URLSafeSerializer(
            secret, salt="qlora-vote", signer_kwargs={"key_derivation": "hmac", "digest_method": hashlib.sha256}
        )

    def sign(self, grant: Grant) -> str:
        """The token of a grant, fit for a URL."""
        token = self._serializer.dumps([self._study_id, grant.role, grant.rater, grant.expires_at])
        return token if isinstance(token, str) else token.decode()

    def read(self, token: str, role: Role, *, now: float | None = None) -> Grant:
        """The grant of a token. Raises LinkError where it is forged, expired, or of another study or role."""
        try:
            study_id, given_role, rater, expires_at = self._serializer.loads(token)
        except (BadSignature, ValueError) as error:
            raise LinkError("This link is not valid. Ask whoever invited you for a new one.") from error
        if study_id != self._study_id or given_role != role:
            raise LinkError("This link is not valid here. Ask whoever invited you for a new one.")
        if expires_at <= (time.time() if now is None else now):
            raise LinkError("This link has expired. Ask whoever invited you for a new one.")
        return Grant(given_role, rater, expires_at)


def check_rater_name(name: str) -> str:
    """The name itself. Raises ConfigError where it is none: it stands in links and files."""
    if not RATER_NAME.fullmatch(name):
        raise ConfigError(
            f"rater {name!r} is not a name; use 1 to 64 letters, digits and . _ @ + -, beginning with a letter or digit"
        )
    return name


def signing_secret(study: Path, environment: Mapping[str, str]) -> str:
    """The secret of QLORA_VOTE_SECRET, else of `<study>.secret`, made on first use and readable by its owner only.

    Raises ConfigError where the variable is too short or others may read the file.
    """
    given = environment.get(SECRET_VARIABLE)
    if given is not None:
        if len(given) < MIN_SECRET_CHARACTERS:
            raise ConfigError(
                f"{SECRET_VARIABLE} has {len(given)} characters; give {MIN_SECRET_CHARACTERS} or more, "
                "such as the output of: openssl rand -hex 32"
            )
        return given
    path = study.with_name(study.name + ".secret")
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return _read_secret(path)
    with os.fdopen(descriptor, "w", encoding="ascii") as stream:
        secret = secrets.token_hex(32)
        stream.write(secret)
    return secret


def _read_secret(path: Path) -> str:
    mode = path.stat().st_mode & 0o777
    if mode & 0o077:
        raise ConfigError(f"{path} has mode {mode:o}, so others can sign links; run: chmod 600 {path}")
    secret = path.read_text(encoding="ascii").strip()
    if len(secret) < MIN_SECRET_CHARACTERS:
        raise ConfigError(f"{path} holds no secret; remove it (links given out stop working) and start again")
    return secret
