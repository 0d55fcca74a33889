"""What in a store is garbage at one moment. Looks and decides; removes nothing."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from qlora_core.store.backend import Listed
from qlora_core.store.catalog import Catalog, Entry, age_order
from qlora_core.store.layout import BLOBS, QUARANTINE, VERSION
from qlora_core.store.refs import Ref
from qlora_core.store.roots import Root, SeenLease, StoredWork, age_s, missing_targets, standing_roots
from qlora_core.store.store import Store

_SHORTEST_LEFTOVER_AGE_S = 3600.0
_BLOB = re.compile(rf"{BLOBS}/[0-9a-f]{{2}}/[0-9a-f]{{64}}")


@dataclass(frozen=True)
class Policy:
    """What stays for its own sake: the newest of every stage, everything young, and unfinished work.

    Unfinished work goes only where `drop_work_older_than_s` says from which age on.
    """

    keep_last: int
    older_than_s: float
    drop_work_older_than_s: float | None = None


@dataclass(frozen=True)
class Garbage:
    """What may go, and what has to stay though nothing refers to it yet.

    `missing` are the artifacts that pins and refs name and that are not there, with who names each.
    """

    artifacts: list[Entry]
    blobs: list[Listed]
    views: list[str]
    work: list[StoredWork]
    leftovers: list[Listed]
    kept: frozenset[str]
    young_blobs: int
    missing: dict[str, list[str]]


def find_garbage(
    store: Store,
    catalog: Catalog,
    leases: Iterable[SeenLease],
    work: Iterable[StoredWork],
    refs: Sequence[Ref],
    policy: Policy,
    now: datetime,
) -> Garbage:
    """Everything in the store that no root keeps. The leases and refs must have been read before the catalog."""
    live = {seen.name for seen in leases if seen.live}
    unneeded: list[StoredWork] = []
    needed: list[StoredWork] = []
    for piece in work:
        (needed if _is_needed(piece, live, catalog, policy, now) else unneeded).append(piece)
    roots = [*standing_roots(store, leases, needed, refs), *_own_roots(catalog, policy, now)]
    kept = frozenset().union(*(root.kept_in(catalog) for root in roots))
    referenced = {sha256 for root in roots for sha256 in root.blobs}
    referenced |= {file.sha256 for address in kept for file in catalog.entries[address].manifest.files.values()}
    orphans = [
        blob
        for blob in store.backend.list(f"{BLOBS}/")
        if _BLOB.fullmatch(blob.name) and blob.name.rpartition("/")[2] not in referenced
    ]
    old = [blob for blob in orphans if age_s(blob, now) >= policy.older_than_s]
    return Garbage(
        artifacts=[entry for entry in catalog.newest_first if entry.manifest.address not in kept],
        blobs=old,
        views=_stray_views(store, {catalog.entries[address].manifest.digest for address in kept}),
        work=unneeded,
        leftovers=_leftovers(store, policy, now),
        kept=kept,
        young_blobs=len(orphans) - len(old),
        missing=missing_targets(refs, catalog.entries),
    )


def _own_roots(catalog: Catalog, policy: Policy, now: datetime) -> list[Root]:
    newest: set[str] = set()
    counted: Counter[str] = Counter()
    for entry in sorted(catalog.entries.values(), key=age_order, reverse=True):
        counted[entry.manifest.stage] += 1
        if counted[entry.manifest.stage] <= policy.keep_last:
            newest.add(entry.manifest.address)
    young = {
        address
        for address, entry in catalog.entries.items()
        if max(0.0, (now - entry.modified).total_seconds()) < policy.older_than_s
    }
    return [Root("newest of its stage", frozenset(newest)), Root("young", frozenset(young))]


def _is_needed(piece: StoredWork, live: set[str], catalog: Catalog, policy: Policy, now: datetime) -> bool:
    if piece.snapshot is None:
        # Somebody's first snapshot may be on its way, for whom no lease can be named yet.
        return piece.age_s(now) < max(policy.older_than_s, _SHORTEST_LEFTOVER_AGE_S)
    if piece.snapshot.lease in live:
        return True
    if f"{VERSION}/{piece.snapshot.lease}" in catalog.entries:
        return False
    # Unfinished, and nobody at it: it may be taken up again, after whatever time.
    return policy.drop_work_older_than_s is None or piece.age_s(now) < policy.drop_work_older_than_s


def _stray_views(store: Store, digests: set[str]) -> list[str]:
    pool = store.backend.pool
    return sorted(set(pool.view_digests()) - digests - pool.in_use())


def _leftovers(store: Store, policy: Policy, now: datetime) -> list[Listed]:
    """What is in quarantine for long enough, and probes of the dead: those of the living are gone in seconds."""
    found = [each for each in store.backend.list(f"{QUARANTINE}/") if age_s(each, now) >= policy.older_than_s]
    oldest_s = max(policy.older_than_s, _SHORTEST_LEFTOVER_AGE_S)
    for area in ("partial", "probe"):
        found += [each for each in store.backend.list(f"{VERSION}/{area}/") if age_s(each, now) >= oldest_s]
    return found
