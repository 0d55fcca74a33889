"""The aliases of versions: set, read back, moved only from where they should be.

`challenger` is the newest version; `candidate` passed the gate and waits for a person, or is in its shadow period;
`champion` is served, and `previous_champion` was before it.

MLflow's own alias call is last-writer-wins. Here the champion moves only if it still is the version the decision was
made against, under the registry's lock for SQLite; on a server two racing drivers are told apart by reading back. Knows
nothing of evidence: callers have verified what they move to.
"""

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from qlora_core.errors import RegistryError
from qlora_core.registry.connection import registry_errors, registry_lock
from qlora_core.registry.history import champion_line, finish_move, read_moves, settle_moves, start_move

if TYPE_CHECKING:
    from mlflow import MlflowClient

CHAMPION = "champion"
CHALLENGER = "challenger"
CANDIDATE = "candidate"
PREVIOUS_CHAMPION = "previous_champion"
# What MLflow answers when model or alias is missing: not the same code for both.
_ABSENT = {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST"}

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MoveOutcome:
    """Whether the champion alias now names the wanted version, and what it names."""

    moved: bool
    champion: str | None


def alias_version(client: "MlflowClient", model_name: str, alias: str) -> str | None:
    """The version an alias names, as text; None when model or alias does not exist."""
    from mlflow.exceptions import MlflowException

    with registry_errors(f"reading alias {alias!r} of {model_name!r}"):
        try:
            return str(client.get_model_version_by_alias(model_name, alias).version)
        except MlflowException as error:
            if error.error_code in _ABSENT:
                return None
            raise


def set_alias(client: "MlflowClient", model_name: str, alias: str, version: str) -> None:
    """Point an alias at a version and read it back; RegistryError when someone else moved it meanwhile."""
    with registry_errors(f"setting alias {alias!r} of {model_name!r}"):
        client.set_registered_model_alias(model_name, alias, version)
    found = alias_version(client, model_name, alias)
    if found != version:
        raise RegistryError(
            f"alias {alias!r} of {model_name!r} was set to version {version} and reads {found}: "
            "another process moved it; see who else promotes, and run the command again"
        )


def remove_alias(client: "MlflowClient", model_name: str, alias: str) -> None:
    """Take an alias away; one that is not there is no fault."""
    with registry_errors(f"removing alias {alias!r} of {model_name!r}"):
        client.delete_registered_model_alias(model_name, alias)


def move_champion(
    client: "MlflowClient",
    model_name: str,
    version: str,
    *,
    expected: str | None,
    action: Literal["promote", "rollback"],
    reason: str,
    by: str | None = None,
    evidence: str | None = None,
) -> MoveOutcome:
    """Make `version` champion if the champion still is `expected` (None: there is none yet); recorded with `reason`.

    Already being there is success without a new record; what a process that died on the way left open is closed.
    Otherwise a champion other than `expected` moves nothing and is reported in the outcome. `by` (who decided, None:
    the gate) and `evidence` (the digest decided on) are recorded, too.
    """
    with registry_lock(client.tracking_uri):
        current = alias_version(client, model_name, CHAMPION)
        if current == version:
            settle_moves(client, model_name, current)
            _set_previous(client, model_name, version)
            return MoveOutcome(True, current)
        if current != expected:
            return MoveOutcome(False, current)
        move = start_move(
            client,
            model_name,
            action=action,
            version=version,
            previous=current,
            reason=reason,
            by=by,
            evidence=evidence,
        )
        set_alias(client, model_name, CHAMPION, version)
        finish_move(client, model_name, move)
        _set_previous(client, model_name, version)
    _log.info("Champion of %s: version %s (was %s): %s", model_name, version, current or "none", reason)
    return MoveOutcome(True, version)


def former_champions(client: "MlflowClient", model_name: str) -> list[str]:
    """The line of champions, oldest first, the present one last; empty without a champion."""
    current = alias_version(client, model_name, CHAMPION)
    return champion_line(read_moves(client, model_name), current) if current is not None else []


def _set_previous(client: "MlflowClient", model_name: str, champion: str) -> None:
    line = champion_line(read_moves(client, model_name), champion)
    if len(line) > 1:
        set_alias(client, model_name, PREVIOUS_CHAMPION, line[-2])
        return
    remove_alias(client, model_name, PREVIOUS_CHAMPION)
