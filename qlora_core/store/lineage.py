"""What was made from what, as a graph: artifacts, and what came from outside the store. Reads manifests alone."""

from collections.abc import Iterable
from datetime import datetime
from typing import Any

from qlora_core.errors import StoreError
from qlora_core.store.catalog import read_catalog
from qlora_core.store.manifest import Manifest
from qlora_core.store.store import Store


def lineage(manifests: Iterable[Manifest]) -> dict[str, Any]:
    """The graph of these artifacts: `nodes`, what was made first coming first, and `edges` from an input to its user.

    An input that is the digest of none of them is an external node, named as its user names it.
    """
    made = sorted(manifests, key=_age)
    by_digest: dict[str, list[Manifest]] = {}
    for manifest in made:
        by_digest.setdefault(manifest.digest, []).append(manifest)
    nodes: dict[str, dict[str, Any]] = {}
    edges: list[dict[str, str]] = []
    for manifest in made:
        for name, digest in sorted(manifest.inputs.items()):
            source = provider(by_digest.get(digest, ()), manifest)
            node = _external(name, digest) if source is None else _artifact(source)
            nodes.setdefault(node["id"], node)
            edges.append({"from": node["id"], "to": manifest.key, "name": name})
        nodes.setdefault(manifest.key, _artifact(manifest))
    return {"nodes": list(nodes.values()), "edges": edges}


def lineage_of(store: Store, address: str) -> dict[str, Any]:
    """The graph of one artifact: all that it was made from, as far as it is still there, and itself last."""
    catalog = read_catalog(store.backend)
    if address not in catalog.entries:
        raise StoreError(f"{store.location} holds no sound artifact {address}; `qlora store ls` shows what is there")
    return lineage(catalog.entries[each].manifest for each in catalog.with_inputs([address]))


def lineage_of_all(store: Store) -> dict[str, Any]:
    """The graph of every artifact in the store."""
    return lineage(entry.manifest for entry in read_catalog(store.backend).entries.values())


def provider(same: Iterable[Manifest], user: Manifest) -> Manifest | None:
    """Which of the artifacts with the same files `user` was made from: the newest that is older, but never itself."""
    found = [manifest for manifest in same if manifest.key != user.key]
    before = [manifest for manifest in found if manifest.created <= user.created]
    return max(before or found, key=_age, default=None)


def _age(manifest: Manifest) -> tuple[datetime, str]:
    return manifest.created, manifest.address


def _artifact(manifest: Manifest) -> dict[str, Any]:
    return {
        "id": manifest.key,
        "kind": "artifact",
        "stage": manifest.stage,
        "key": manifest.key,
        "digest": manifest.digest,
        "created": manifest.created.isoformat(),
        "size_bytes": manifest.size_bytes,
    }


def _external(name: str, digest: str) -> dict[str, Any]:
    return {"id": f"{name}@{digest}", "kind": "external", "name": name, "digest": digest}
