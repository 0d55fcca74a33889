"""The registration on record with its version, so that a retry knows what was done and what was only begun.

Kept as one tag in two states: `started` before the aliases move, `done` afterwards. Knows nothing of how to register.
"""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qlora_core.digest import canonical_json
from qlora_core.registry.aliases import CHAMPION, alias_version
from qlora_core.registry.connection import connect, sqlite_file
from qlora_core.registry.sqlite_lookup import finished_registration
from qlora_core.registry.versions import RegisteredVersion, get_version, set_version_tag, versions_of_run

if TYPE_CHECKING:
    from mlflow import MlflowClient

REGISTRATION_TAG = "registration"


def find_registration(tracking_uri: str, model_name: str, run_key: str) -> dict[str, Any] | None:
    """What `register_run` returned for this run key, from the registry itself; None when it never got to its end.

    A registration that died after its aliases had moved is completed here; one that died before is None, and is decided
    on again. A SQLite file that does not exist is not created. Raises RegistryError when the registry cannot be read.
    """
    database = sqlite_file(tracking_uri)
    if database is not None and not database.is_file():
        return None
    if database is not None:
        finished = finished_registration(database, model_name, run_key, REGISTRATION_TAG)
        if finished is not None:
            return finished
    client = connect(tracking_uri)
    for version in versions_of_run(client, model_name, run_key):
        if REGISTRATION_TAG not in version.tags:
            continue
        entry = json.loads(version.tags[REGISTRATION_TAG])
        if entry["state"] == "done":
            return entry["registration"]
        arrived = alias_version(client, model_name, CHAMPION) == version.version
        if arrived and entry["registration"]["verdict"] == "PROMOTE":
            return finish_registration(client, version, entry["registration"])
    return None


def start_registration(client: "MlflowClient", version: RegisteredVersion, registration: Mapping[str, Any]) -> None:
    """Record what is about to be done to the aliases."""
    _write(client, version, "started", registration)


def finish_registration(
    client: "MlflowClient", version: RegisteredVersion, registration: Mapping[str, Any]
) -> dict[str, Any]:
    """Record that it was done; returns the registration with the aliases as they are now."""
    aliases = get_version(client, version.name, version.version).aliases
    finished = {**registration, "aliases": list(aliases)}
    _write(client, version, "done", finished)
    return finished


def _write(client: "MlflowClient", version: RegisteredVersion, state: str, registration: Mapping[str, Any]) -> None:
    entry = canonical_json({"state": state, "registration": dict(registration)}).decode()
    set_version_tag(client, version, REGISTRATION_TAG, entry)
