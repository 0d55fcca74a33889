"""What is in a store and why it is still there. Changes nothing, and reads no blob."""

from datetime import UTC, datetime
from typing import Any

from qlora_core.errors import StoreError
from qlora_core.store.catalog import Catalog, Entry, read_catalog
from qlora_core.store.refs import list_refs
from qlora_core.store.roots import read_leases, read_work, standing_roots
from qlora_core.store.store import Store


def list_artifacts(store: Store) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """A row for every artifact, newest first, with what keeps it; and what is corrupt, manifests by address.

    Leases, pins, references and snapshots that are corrupt are there by name; what they keep is not known.
    """
    catalog = read_catalog(store.backend)
    kept_by, faults = reasons(store, catalog)
    return [_row(entry, kept_by) for entry in catalog.newest_first], {**catalog.faults, **faults}


def show_artifact(store: Store, address: str) -> dict[str, Any]:
    """The manifest of an artifact, with what keeps it and which artifacts were made from it.

    `corrupt` has the records that may keep it as well, and cannot be read: what is wrong with each, by name.
    """
    catalog = read_catalog(store.backend)
    if address not in catalog.entries:
        raise StoreError(catalog.faults.get(address) or f"{store.location} holds no artifact {address} any more")
    entry = catalog.entries[address]
    document = entry.manifest.model_dump(mode="json")
    used_by = sorted(
        user.manifest.address
        for user in catalog.entries.values()
        if entry.manifest.digest in user.manifest.inputs.values()
    )
    kept_by, corrupt = reasons(store, catalog)
    return {
        **document,
        "address": address,
        "size_bytes": entry.manifest.size_bytes,
        "kept_by": kept_by.get(address, []),
        "used_by": used_by,
        "corrupt": corrupt,
    }


def reasons(store: Store, catalog: Catalog) -> tuple[dict[str, list[str]], dict[str, str]]:
    """By address, the pins, references, producers and readers that keep an artifact from being collected.

    With what is wrong with the records of which that cannot be told, by name.
    """
    backend = store.backend
    faults: dict[str, str] = {}
    # This machine's clock is good enough to show something by, and asking the place for its own means writing there.
    leases = read_leases(backend, datetime.now(UTC), faults=faults)
    found: dict[str, list[str]] = {}
    for root in standing_roots(store, leases, read_work(backend, faults), list_refs(backend, faults)):
        for address in root.kept_in(catalog):
            found.setdefault(address, []).append(root.reason)
    return {address: sorted(set(names)) for address, names in found.items()}, dict(sorted(faults.items()))


def _row(entry: Entry, kept_by: dict[str, list[str]]) -> dict[str, Any]:
    manifest = entry.manifest
    return {
        "stage": manifest.stage,
        "key": manifest.key,
        "created": manifest.created.isoformat(),
        "size_bytes": manifest.size_bytes,
        "files": len(manifest.files),
        "digest": manifest.digest,
        "kept_by": kept_by.get(manifest.address, []),
    }
