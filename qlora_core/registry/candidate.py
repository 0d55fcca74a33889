"""What ends a candidate's waiting, whoever decides: the alias taken away, the refusal logged once, the champion kept.

Knows neither why a version waits (`approval`, `shadow`) nor how one is promoted. Callers hold the registry's lease.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qlora_core.registry.aliases import CANDIDATE, CHAMPION, alias_version, remove_alias
from qlora_core.registry.evidence import EVIDENCE_TAG
from qlora_core.registry.history import read_moves, record_decline
from qlora_core.registry.versions import RegisteredVersion

if TYPE_CHECKING:
    from mlflow import MlflowClient


def log_decline(client: "MlflowClient", version: RegisteredVersion, reason: str, by: str | None) -> None:
    """Record that the version was not taken, and why; one that stands in the log as declined stays as it is."""
    moves = read_moves(client, version.name)
    if any(move.action == "decline" and move.version == version.version for move in moves):
        return
    record_decline(
        client,
        version.name,
        version=version.version,
        champion=alias_version(client, version.name, CHAMPION),
        reason=reason,
        by=by,
        evidence=version.tag(EVIDENCE_TAG),
    )


def clear_candidate(client: "MlflowClient", version: RegisteredVersion) -> None:
    """Take the alias `candidate` from the version, if it has it."""
    if alias_version(client, version.name, CANDIDATE) == version.version:
        remove_alias(client, version.name, CANDIDATE)


def champion_stays(
    client: "MlflowClient", version: RegisteredVersion, verdict: str, reasons: Sequence[str]
) -> dict[str, Any]:
    """The outcome of a decision that moves nothing, with the keys that `promote` gives."""
    champion = alias_version(client, version.name, CHAMPION)
    stays = {"champion": champion, "previous": champion, "version": version.version, "forced": False}
    return {"verdict": verdict, "reasons": list(reasons), **stays}
