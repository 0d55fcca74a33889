"""Why an artifact's key differs from another's: version, settings, inputs, and why those inputs differ in turn.

Compares what manifests record. It does not know what a setting means.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from qlora_core.digest import canonical_json
from qlora_core.errors import ConfigError, StoreError
from qlora_core.store.backend import Backend
from qlora_core.store.catalog import Catalog, age_order, read_catalog
from qlora_core.store.layout import QUARANTINE
from qlora_core.store.lineage import provider
from qlora_core.store.manifest import Manifest
from qlora_core.store.store import Store

_ABSENT = "(absent)"
_SHORT = 12


def explain(store: Store, address: str, against: str | None = None) -> dict[str, Any]:
    """Why the artifact at `address` is not the one at `against`.

    By default that is the earlier one of its stage that differs from it in the fewest things, the newest among equals:
    the newest of all may be another project's, where several share a store.

    `version`, `config` and `inputs` list what differs, each with `old` and `new`; an input that is an artifact has
    under `because` why that one differs. `set_aside` names what of this artifact was once found corrupt.
    """
    catalog = read_catalog(store.backend)
    new = _manifest(catalog, store, address)
    old = _manifest(catalog, store, against) if against else _nearest(catalog, new)
    if old is not None and old.stage != new.stage:
        raise ConfigError(f"{new.stage} {new.key[:_SHORT]} cannot be compared with {old.stage} {old.key[:_SHORT]}")
    difference = {} if old is None else _difference(catalog, new, old, frozenset())
    return {
        "stage": new.stage,
        "key": new.key,
        "created": new.created.isoformat(),
        "against": None if old is None else _chosen(catalog, new, old, is_given=against is not None),
        **{"version": None, "config": [], "inputs": [], **difference},
        "set_aside": _set_aside(store.backend, new),
    }


def explain_lines(explained: Mapping[str, Any]) -> list[str]:
    """What `explain` found, for people."""
    head = f"{explained['stage']} {explained['key'][:_SHORT]}"
    if explained["against"] is None:
        lines = [f"{head} is the first of its stage here: there is nothing to compare it with"]
    else:
        lines = [f"{head} differs from {_compared_with(explained['against'])} in", *_lines(explained)]
    for name in explained["set_aside"]:
        lines.append(f"was found corrupt once, and set aside: {name}")
    return lines


def _lines(difference: Mapping[str, Any]) -> Iterator[str]:
    if difference["version"]:
        yield f"version: {difference['version']['old']} -> {difference['version']['new']}"
    for change in difference["config"]:
        yield f"{change['path']}: {_shown(change, 'old')} -> {_shown(change, 'new')}"
    for change in difference["inputs"]:
        yield f"input {change['name']}: {_digest(change['old'])} -> {_digest(change['new'])}"
        if change["because"]:
            yield from (f"    {line}" for line in _lines(change["because"]))


def _manifest(catalog: Catalog, store: Store, address: str) -> Manifest:
    if address not in catalog.entries:
        raise StoreError(catalog.faults.get(address) or f"{store.location} holds no artifact {address} any more")
    return catalog.entries[address].manifest


def _earlier(catalog: Catalog, new: Manifest) -> list[Manifest]:
    """The earlier ones of its stage, the newest first."""
    own = age_order(catalog.entries[new.address])
    return [e.manifest for e in catalog.newest_first if e.manifest.stage == new.stage and age_order(e) < own]


def _nearest(catalog: Catalog, new: Manifest) -> Manifest | None:
    return min(_earlier(catalog, new), key=lambda old: _distance(new, old), default=None)


def _distance(new: Manifest, old: Manifest) -> int:
    """In how many settings and inputs two artifacts differ; an input that has only one of them counts too."""
    inputs = sum(old.inputs.get(name) != new.inputs.get(name) for name in {*old.inputs, *new.inputs})
    return inputs + sum(1 for _ in _config_changes(old.config, new.config, "")) + (old.version != new.version)


def _chosen(catalog: Catalog, new: Manifest, old: Manifest, *, is_given: bool) -> dict[str, Any]:
    found = {"key": old.key, "created": old.created.isoformat()}
    return found if is_given else {**found, "nearest_of": len(_earlier(catalog, new))}


def _compared_with(against: Mapping[str, Any]) -> str:
    key = f"{against['key'][:_SHORT]} of {against['created'][:16].replace('T', ' ')}"
    earlier = against.get("nearest_of", 0)
    return f"{key}, the nearest of {earlier} earlier ones (--against KEY for another)," if earlier > 1 else key


def _difference(catalog: Catalog, new: Manifest, old: Manifest, above: frozenset[str]) -> dict[str, Any]:
    version = None if new.version == old.version else {"old": old.version, "new": new.version}
    config = list(_config_changes(old.config, new.config, ""))
    inputs = []
    for name in sorted({*new.inputs, *old.inputs}):
        before, after = old.inputs.get(name), new.inputs.get(name)
        if before != after:
            because = _because(catalog, (new, after), (old, before), above | {new.key})
            inputs.append({"name": name, "old": before, "new": after, "because": because})
    return {"version": version, "config": config, "inputs": inputs}


def _because(
    catalog: Catalog, new: tuple[Manifest, str | None], old: tuple[Manifest, str | None], above: frozenset[str]
) -> dict[str, Any] | None:
    """Why two artifacts differ that were inputs; None where one of them is not an artifact of this store."""
    after, before = (
        provider([entry.manifest for entry in catalog.by_digest.get(digest or "", ())], user)
        for user, digest in (new, old)
    )
    # A manifest may name anything as its input, itself at several removes too.
    if after is None or before is None or after.stage != before.stage or after.key in above:
        return None
    return {"stage": after.stage, "old": before.key, "new": after.key, **_difference(catalog, after, before, above)}


def _config_changes(old: Any, new: Any, path: str) -> Iterator[dict[str, Any]]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in sorted({*old, *new}):
            below = f"{path}.{name}" if path else name
            if name not in new:
                yield {"path": below, "old": old[name]}
            elif name not in old:
                yield {"path": below, "new": new[name]}
            else:
                yield from _config_changes(old[name], new[name], below)
    elif canonical_json(old) != canonical_json(new):  # as keys are computed: 1 and 1.0 differ
        yield {"path": path, "old": old, "new": new}


def _set_aside(backend: Backend, manifest: Manifest) -> list[str]:
    of_it = {manifest.key, *(entry.sha256 for entry in manifest.files.values())}
    names = (listed.name for listed in backend.list(f"{QUARANTINE}/"))
    return [name for name in names if any(each in name for each in of_it)]


def _shown(change: Mapping[str, Any], side: str) -> str:
    if side not in change:
        return _ABSENT
    value = change[side]
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _digest(digest: str | None) -> str:
    if digest is None:
        return _ABSENT
    return f"{digest[:_SHORT]}…" if len(digest) > _SHORT else digest
