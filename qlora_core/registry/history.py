"""The record of champion moves, kept as tags of the registered model, so that it lives wherever the registry lives.

An entry is written before the alias moves and another one afterwards: whatever moment a process dies at, the entries
and the alias together say what happened. The entries are a hash chain (`chain`), so that an edited, deleted or
exchanged one is noticed. Knows nothing of why a move is allowed.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from qlora_core.digest import digest_json
from qlora_core.errors import RegistryError
from qlora_core.registry.chain import BrokenChainError, Link, head_text, next_link, read_chain
from qlora_core.registry.connection import registry_errors

if TYPE_CHECKING:
    from mlflow import MlflowClient

Action = Literal["promote", "rollback", "decline"]
State = Literal["started", "done", "abandoned", "declined"]

MAX_REASON_CHARACTERS = 2000
"""Databases hold at most 5000 characters of a tag; the evidence holds all the reasons."""

_PREFIX = "promotion_log."
_HEAD = "promotion_log_head"
_UNCHAINED = "promotion."
"""Entries of versions that kept no chain; the chain begins with the digest of those it found."""


@dataclass(frozen=True)
class Move:
    """One move of the champion alias. `at` is UTC, ISO 8601; `previous` is None for the first champion.

    `by` is the person who decided, None where the gate did; `evidence` is the digest of the evidence it was decided on.
    """

    number: int
    action: Action
    version: str
    previous: str | None
    reason: str
    at: str
    state: State
    by: str | None = None
    evidence: str | None = None


@dataclass(frozen=True)
class History:
    """All moves, oldest first, and the digest of the log's last entry (None: an empty log)."""

    moves: tuple[Move, ...]
    head: str | None


@dataclass(frozen=True)
class _Log:
    earlier: tuple[Move, ...]
    origin: str
    chain: tuple[Link, ...]

    @property
    def moves(self) -> list[Move]:
        moves = {move.number: move for move in self.earlier}
        for link in self.chain:
            body = link.body
            if body["state"] == "started":
                moves[body["move"]] = Move(body["move"], **{key: body[key] for key in body if key != "move"})
            else:
                moves[body["move"]] = replace(moves[body["move"]], state=body["state"])
        return sorted(moves.values(), key=lambda move: move.number)


def read_moves(client: "MlflowClient", model_name: str) -> list[Move]:
    """All moves, oldest first; empty when none was made. Raises RegistryError where the log was changed."""
    return _read(client, model_name).moves


def read_log(client: "MlflowClient", model_name: str) -> History:
    """The moves and the log's head, verified; note the head elsewhere, and a log rewritten as a whole shows, too."""
    log = _read(client, model_name)
    return History(tuple(log.moves), log.chain[-1].sha256 if log.chain else None)


def start_move(
    client: "MlflowClient",
    model_name: str,
    *,
    action: Action,
    version: str,
    previous: str | None,
    reason: str,
    by: str | None = None,
    evidence: str | None = None,
) -> Move:
    """Record that the alias is about to move from `previous` (its value right now) to `version`."""
    settle_moves(client, model_name, previous)
    moves = read_moves(client, model_name)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    shown = reason if len(reason) <= MAX_REASON_CHARACTERS else reason[: MAX_REASON_CHARACTERS - 1] + "…"
    number = moves[-1].number + 1 if moves else 1
    move = Move(number, action, version, previous, shown, now, "started", by, evidence)
    body = {key: value for key, value in vars(move).items() if key != "number"}
    _append(client, model_name, {"move": number, **body})
    return move


def finish_move(client: "MlflowClient", model_name: str, move: Move) -> None:
    """Record that the alias has moved and was read back."""
    _append(client, model_name, {"move": move.number, "state": "done"})


def record_decline(
    client: "MlflowClient",
    model_name: str,
    *,
    version: str,
    champion: str | None,
    reason: str,
    by: str | None = None,
    evidence: str | None = None,
) -> None:
    """Record that `version` was kept from becoming champion, by a person or (None) by a rule; no alias moves."""
    move = start_move(
        client,
        model_name,
        action="decline",
        version=version,
        previous=champion,
        reason=reason,
        by=by,
        evidence=evidence,
    )
    _append(client, model_name, {"move": move.number, "state": "declined"})


def settle_moves(client: "MlflowClient", model_name: str, current: str | None) -> None:
    """Close a move whose process died in between: whether the alias got there is what the alias, `current`, says."""
    moves = read_moves(client, model_name)
    if moves and moves[-1].state == "started":
        state = "done" if moves[-1].version == current else "abandoned"
        _append(client, model_name, {"move": moves[-1].number, "state": state})


def champion_line(moves: Sequence[Move], current: str | None) -> list[str]:
    """The champions behind one another, oldest first, ending with `current`; a rollback shortens the line.

    Moves that never happened are left out; a champion set by other means stands at the end. Empty when there is none.
    """
    line: list[str] = []
    for index, move in enumerate(moves):
        arrived = move.state == "done" or (
            move.state == "started" and index == len(moves) - 1 and move.version == current
        )
        if not arrived:
            continue
        if move.previous is not None and line[-1:] != [move.previous]:
            line.append(move.previous)
        if move.action == "rollback" and move.version in line:
            del line[line.index(move.version) + 1 :]
        else:
            line.append(move.version)
    if current is not None and line[-1:] != [current]:
        line.append(current)
    return line if current is not None else []


def _read(client: "MlflowClient", model_name: str) -> _Log:
    with registry_errors(f"reading the promotion history of {model_name!r}"):
        tags = dict(client.get_registered_model(model_name).tags)
    try:
        earlier = [Move(**json.loads(text)) for text in _numbered(tags, _UNCHAINED).values()]
        origin = digest_json([vars(move) for move in sorted(earlier, key=lambda move: move.number)])
        log = _Log(tuple(earlier), origin, tuple(read_chain(_numbered(tags, _PREFIX), tags.get(_HEAD), origin=origin)))
        _ = log.moves
    except BrokenChainError as error:
        raise RegistryError(
            f"the promotion log of {model_name!r} is not as it was written: {error}; nothing moves until the model's "
            f"{_PREFIX}* tags are restored in MLflow from a backup"
        ) from error
    except (TypeError, KeyError, ValueError) as error:
        raise RegistryError(
            f"the promotion history of {model_name!r} has an entry this version cannot read ({error!r}); "
            f"look at the model's {_UNCHAINED}* and {_PREFIX}* tags in MLflow"
        ) from error
    return log


def _numbered(tags: Mapping[str, str], prefix: str) -> dict[int, str]:
    return {int(key.removeprefix(prefix)): text for key, text in tags.items() if key.startswith(prefix)}


def _append(client: "MlflowClient", model_name: str, body: Mapping[str, Any]) -> None:
    """The entry first, then the head: in between, the head is one entry behind, which the next writer mends."""
    log = _read(client, model_name)
    link = next_link(log.chain, body, origin=log.origin)
    with registry_errors(f"writing the promotion history of {model_name!r}"):
        client.set_registered_model_tag(model_name, f"{_PREFIX}{link.number:06d}", link.text())
        client.set_registered_model_tag(model_name, _HEAD, head_text([link]))
