"""The record of champion moves, kept as tags of the registered model, so that it lives wherever the registry lives.

An entry is written before the alias moves and marked done afterwards: whatever moment a process dies at, the entries
and the alias together say what happened. Knows nothing of why a move is allowed.
"""

import datetime
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Literal

from qlora_core.digest import canonical_json
from qlora_core.errors import RegistryError
from qlora_core.registry.connection import registry_errors

if TYPE_CHECKING:
    from mlflow import MlflowClient

_PREFIX = "promotion."


@dataclass(frozen=True)
class Move:
    """One move of the champion alias. `at` is UTC, ISO 8601; `previous` is None for the first champion."""

    number: int
    action: Literal["promote", "rollback"]
    version: str
    previous: str | None
    reason: str
    at: str
    state: Literal["started", "done", "abandoned"]


def read_moves(client: "MlflowClient", model_name: str) -> list[Move]:
    """All moves, oldest first; empty when none was made."""
    with registry_errors(f"reading the promotion history of {model_name!r}"):
        tags = dict(client.get_registered_model(model_name).tags)
    try:
        moves = [Move(**json.loads(value)) for key, value in tags.items() if key.startswith(_PREFIX)]
    except (TypeError, ValueError) as error:
        raise RegistryError(
            f"the promotion history of {model_name!r} has an entry this version cannot read ({error}); "
            f"look at the model's {_PREFIX}* tags in MLflow"
        ) from error
    return sorted(moves, key=lambda move: move.number)


def start_move(
    client: "MlflowClient",
    model_name: str,
    *,
    action: Literal["promote", "rollback"],
    version: str,
    previous: str | None,
    reason: str,
) -> Move:
    """Record that the alias is about to move from `previous` (its value right now) to `version`."""
    moves = read_moves(client, model_name)
    if moves and moves[-1].state == "started":
        # Its process died in between: whether the alias got there is what the alias says.
        arrived = moves[-1].version == previous
        _write(client, model_name, replace(moves[-1], state="done" if arrived else "abandoned"))
    number = moves[-1].number + 1 if moves else 1
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    move = Move(number, action, version, previous, reason, now, "started")
    _write(client, model_name, move)
    return move


def finish_move(client: "MlflowClient", model_name: str, move: Move) -> None:
    """Record that the alias has moved and was read back."""
    _write(client, model_name, replace(move, state="done"))


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


def _write(client: "MlflowClient", model_name: str, move: Move) -> None:
    with registry_errors(f"writing the promotion history of {model_name!r}"):
        client.set_registered_model_tag(
            model_name, f"{_PREFIX}{move.number:06d}", canonical_json(asdict(move)).decode()
        )
