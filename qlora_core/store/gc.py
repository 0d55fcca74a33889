"""Garbage collection: what nothing keeps any more goes, and nothing else, whoever works beside it and whenever it dies.

Why it is safe:

- *Nobody is overlooked.* The collector takes the lease `store/gc` first and only then looks who keeps what. Whoever is
  about to rely on something stored (a producer whose blobs may be there already, a pin, a reference) says so in a
  record first, and only then asks for that lease, and waits while it is held. If his record came before the collector
  looked, he is counted; if it came after, the lease came before his question, and he waits.
- *Leases before manifests.* A producer writes his manifest before he gives his lease back. Looking at leases first, the
  collector sees one or the other.
- *Nobody comes back from the dead.* A lease whose holder counts as dead is taken from him before what it kept is given
  up. In turn, who finds the collector dead takes the lease from it before he goes on. Either is refused when he wakes:
  the collector renews its lease before every few deletions.
- *Manifests before blobs.* A reader who misses a blob finds the manifest gone too, which is a plain miss. No artifact
  that stays has such a blob: its blobs were counted.
- *Nothing to repair.* What is garbage does not depend on how much of it is gone, so the next collection finishes.
- *No guess.* A lease, pin, reference, snapshot or manifest that cannot be read stops it before anything is removed.

What is left: a collector that is stopped, for longer than its lease lives, just between renewing it and the deletion
after that; and an old artifact that a process on another machine has read, and not named as an input in a lease yet.
Either ends in a miss that says so and is built again, never in a wrong result.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from qlora_core.errors import LeaseLostError, StoreError
from qlora_core.store.catalog import Catalog, Entry, read_catalog
from qlora_core.store.garbage import Garbage, Policy, find_garbage
from qlora_core.store.layout import PINS, REFS, manifest_name
from qlora_core.store.lease import HeldLease, lease_name
from qlora_core.store.refs import Ref, list_refs, remedy
from qlora_core.store.roots import SeenLease, StoredWork, place_time, read_leases, read_work, written_at
from qlora_core.store.store import GC_LEASE, Store
from qlora_core.store.sweep import Sweep

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GcReport:
    """What a collection removed, or with `dry_run` would remove. `artifacts` are the removed ones, newest first.

    `missing` says of each artifact that a pin or reference names and that is not there who names it: of such a one
    nothing is known any more, so nothing of it is kept.
    """

    dry_run: bool
    kept: int
    artifacts: tuple[dict[str, Any], ...]
    blobs: int = 0
    freed_bytes: int = 0
    young_blobs: int = 0
    views: int = 0
    work: int = 0
    leases: int = 0
    leftovers: int = 0
    missing: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON data."""
        return {**vars(self), "artifacts": list(self.artifacts), "missing": list(self.missing)}


def collect(
    store: Store,
    *,
    keep_last: int,
    older_than_s: float,
    drop_work_older_than_s: float | None = None,
    dry_run: bool = False,
) -> GcReport:
    """Remove what is kept by no pin, reference, living producer or reader, piece of work, or artifact that stays.

    The newest `keep_last` artifacts of each stage stay too, and whatever is younger than `older_than_s` by the clock of
    the place. Unfinished work, whose artifact is not there, stays with its inputs whatever its age, unless
    `drop_work_older_than_s` says from which age on it goes too. Raises StoreError where another collection is at work,
    or a record that may keep something is unsound.
    """
    policy = Policy(keep_last, older_than_s, drop_work_older_than_s)
    if dry_run:
        now = place_time(store.backend)
        seen = _seen(store, lambda faults: read_leases(store.backend, now, faults=faults))
        return _expected(_look(store, seen, policy, now), seen.leases)
    with _only_collector(store) as lease:
        now = written_at(store.backend, lease_name(GC_LEASE))
        seen = _seen(store, lambda faults: _without_the_dead(store, now, faults))
        garbage = _look(store, seen, policy, now)
        return _swept(Sweep(store, lease), garbage, older_than_s, now)


@contextmanager
def _only_collector(store: Store) -> Iterator[HeldLease]:
    with ExitStack() as leaving:
        lease = leaving.enter_context(store.leases.attempt(GC_LEASE))
        if lease is None and _retire_silent_collector(store):
            lease = leaving.enter_context(store.leases.attempt(GC_LEASE))
        if lease is None:
            raise StoreError(
                f"{store.location}: garbage is being collected already, or the process that did so on another machine "
                "has died in the last minutes; wait for its end, then run the same command again"
            )
        try:
            yield lease
        except LeaseLostError as lost:
            raise StoreError(
                f"{store.location}: this collection was silent for so long that others took it for dead, so it "
                "stopped; nothing that is kept was removed; run the same command again to finish"
            ) from lost


def _retire_silent_collector(store: Store) -> bool:
    """Void the lease of one that died on another machine: nobody here has watched it for long, but its age tells."""
    now = place_time(store.backend)
    seen = [seen for seen in read_leases(store.backend, now, under="store/") if seen.name == GC_LEASE]
    return any(not each.live and store.leases.retire(each.name, each.record, each.lease) for each in seen)


def _without_the_dead(store: Store, now: datetime, faults: dict[str, str]) -> list[SeenLease]:
    """The leases, once those of dead holders are taken from them."""
    leases = read_leases(store.backend, now, faults=faults)
    dead = [seen for seen in leases if not seen.live and seen.lease.state != "free"]
    if not dead:
        return leases
    for seen in dead:
        store.leases.retire(seen.name, seen.record, seen.lease)
    # Whatever is not free by now belongs to somebody who showed that he lives.
    again = read_leases(store.backend, now, faults=faults)
    return [replace(seen, live=seen.lease.state != "free") for seen in again]


@dataclass(frozen=True)
class _Seen:
    """What says that something is to be kept. It was read before the catalog."""

    leases: Sequence[SeenLease]
    work: Sequence[StoredWork]
    refs: Sequence[Ref]


def _seen(store: Store, read_the_leases: Callable[[dict[str, str]], list[SeenLease]]) -> _Seen:
    """All of it. Raises StoreError where a record cannot be read: what is wrong with it, and which command helps."""
    faults: dict[str, str] = {}
    seen = _Seen(read_the_leases(faults), read_work(store.backend, faults), list_refs(store.backend, faults))
    if faults:
        told = sorted({_remedy(name) for name in faults})
        raise StoreError(
            f"{store.location}: {'; '.join(faults[name] for name in sorted(faults))}. Nothing is collected while it is "
            f"not known what this keeps: {'; '.join(told)}; then run the same command again"
        )
    return seen


def _remedy(record_name: str) -> str:
    if record_name.startswith((f"{PINS}/", f"{REFS}/")):
        return remedy(record_name)
    return "`qlora store verify --repair` moves unsound leases and snapshots to quarantine"


def _look(store: Store, found: _Seen, policy: Policy, now: datetime) -> Garbage:
    catalog = read_catalog(store.backend)
    if catalog.faults:
        raise StoreError(
            f"{store.location}: {'; '.join(catalog.faults.values())}. Nothing is collected while it is not known what "
            "this keeps: `qlora store verify --repair` moves damaged manifests to quarantine"
        )
    entries = dict(catalog.entries)
    for seen in found.leases:
        # Decided, and not carried out yet: for a collection that only looks, as if it were.
        manifest = seen.lease.manifest if seen.lease.state == "committed" else None
        if manifest is not None and manifest.address not in entries:
            entries[manifest.address] = Entry(manifest, "", now)
    garbage = find_garbage(store, Catalog(entries, {}), found.leases, found.work, found.refs, policy, now)
    for line in _told_missing(garbage):
        logger.warning("%s: %s", store.location, line)
    return garbage


def _told_missing(garbage: Garbage) -> tuple[str, ...]:
    return tuple(
        f"{address} is not there, though {', '.join(names)} names it; nothing of it can be kept"
        for address, names in sorted(garbage.missing.items())
    )


def _swept(sweep: Sweep, garbage: Garbage, older_than_s: float, now: datetime) -> GcReport:
    gone = sweep.remove({manifest_name(entry.manifest.address): entry.tag for entry in garbage.artifacts})
    blobs = sweep.remove(dict.fromkeys(blob.name for blob in garbage.blobs))
    views = sweep.remove_views(garbage.views)
    work = [piece for piece in garbage.work if sweep.remove_work(piece)]
    leases = sweep.remove_free_leases(garbage.kept, now)
    leftovers = sweep.remove(dict.fromkeys(each.name for each in garbage.leftovers))
    others = sweep.remove_others(older_than_s)
    things = [thing for thing in [*garbage.blobs, *garbage.leftovers] if thing.name in blobs | leftovers]
    return GcReport(
        dry_run=False,
        kept=len(garbage.kept),
        artifacts=tuple(_row(entry) for entry in garbage.artifacts if manifest_name(entry.manifest.address) in gone),
        blobs=len(blobs),
        freed_bytes=sum(thing.size_bytes for thing in [*things, *(each for piece in work for each in piece.things)]),
        young_blobs=garbage.young_blobs,
        views=views,
        work=len(work),
        leases=leases,
        leftovers=len(leftovers) + others,
        missing=_told_missing(garbage),
    )


def _expected(garbage: Garbage, leases: Sequence[SeenLease]) -> GcReport:
    things = [*garbage.blobs, *garbage.leftovers, *(each for piece in garbage.work for each in piece.things)]
    return GcReport(
        dry_run=True,
        kept=len(garbage.kept),
        artifacts=tuple(_row(entry) for entry in garbage.artifacts),
        blobs=len(garbage.blobs),
        freed_bytes=sum(thing.size_bytes for thing in things),
        young_blobs=garbage.young_blobs,
        views=len(garbage.views),
        work=len(garbage.work),
        leases=sum(not seen.live and seen.is_over(garbage.kept) for seen in leases),
        leftovers=len(garbage.leftovers),
        missing=_told_missing(garbage),
    )


def _row(entry: Entry) -> dict[str, Any]:
    manifest = entry.manifest
    return {
        "stage": manifest.stage,
        "key": manifest.key,
        "created": manifest.created.isoformat(),
        "size_bytes": manifest.size_bytes,
    }
