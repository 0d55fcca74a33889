"""What in a store must stay, and for whose sake. Decides nothing about age and removes nothing.

A record that cannot be read is an error here, never "nothing is kept by it"; but who only looks may ask for such
records to be noted in `faults`, by name, and left out.
"""

import secrets
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from datetime import datetime

from qlora_core.errors import CorruptArtifactError, StoreError
from qlora_core.store.backend import Backend, Listed, Record, is_name
from qlora_core.store.catalog import READS_AT_ONCE, Catalog
from qlora_core.store.contents import in_parallel
from qlora_core.store.layout import LEASES, STAGES, VERSION, WORK
from qlora_core.store.lease import LeaseRecord, parse_lease
from qlora_core.store.quarantine import noting
from qlora_core.store.refs import PIN, Ref
from qlora_core.store.store import Store
from qlora_core.store.work import Snapshot, parse_snapshot, snapshot_name

_SNAPSHOT = "/snapshot.json"
_BLOBS = "/blob/"
_TTLS_UNTIL_DEAD = 2


@dataclass(frozen=True)
class Root:
    """Artifacts that something keeps: by address, or whichever have one of these digests; and single blobs."""

    reason: str
    addresses: frozenset[str] = frozenset()
    digests: frozenset[str] = frozenset()
    blobs: frozenset[str] = frozenset()

    def kept_in(self, catalog: Catalog) -> set[str]:
        """The addresses it keeps, inputs of inputs included."""
        by_digest = {entry.manifest.address for digest in self.digests for entry in catalog.by_digest.get(digest, ())}
        return catalog.with_inputs(self.addresses | by_digest)


@dataclass(frozen=True)
class SeenLease:
    """A lease as found. `live` is whether somebody holds it, as far as can be told."""

    name: str
    record: Record
    lease: LeaseRecord
    live: bool

    @property
    def address(self) -> str | None:
        """The artifact that the holder builds, if it is one."""
        address = f"{VERSION}/{self.name}"
        return address if address.startswith(f"{STAGES}/") else None

    def is_over(self, kept: Container[str]) -> bool:
        """Whether it stands for an artifact that is none of `kept`."""
        return self.address is not None and self.address not in kept


@dataclass
class StoredWork:
    """All that one piece of work in progress has in the store; `snapshot` is None before its first one is whole."""

    name: str
    things: list[Listed] = field(default_factory=list)
    snapshot: Snapshot | None = None
    tag: str | None = None

    @property
    def snapshot_name(self) -> str:
        """The record that makes the rest of it worth something."""
        return snapshot_name(self.name)

    def age_s(self, now: datetime) -> float:
        """Seconds since anything in it was written."""
        return min(age_s(thing, now) for thing in self.things)


def place_time(backend: Backend) -> datetime:
    """What the clock of the place says: when it wrote a record just now. The record is removed again."""
    name = f"{VERSION}/probe/clock-{secrets.token_hex(8)}"
    backend.create(name, b"{}")
    try:
        return written_at(backend, name)
    finally:
        backend.remove(name)


def written_at(backend: Backend, name: str) -> datetime:
    """When a record that is there was written, by the clock of the place."""
    for listed in backend.list(f"{name.rpartition('/')[0]}/"):
        if listed.name == name:
            return listed.modified
    raise StoreError(f"{backend.location} does not list {name}, which is there; look at that disk or server")


def age_s(listed: Listed, now: datetime) -> float:
    """Seconds since it was written, by the clock of the place."""
    return max(0.0, (now - listed.modified).total_seconds())


def read_leases(
    backend: Backend, now: datetime, under: str = "", faults: dict[str, str] | None = None
) -> list[SeenLease]:
    """The leases. One that was not renewed for twice its time to live, by the clock of the place, is not live."""
    listed = {found.name: found for found in backend.list(f"{LEASES}/{under}")}
    seen: list[SeenLease] = []

    def look(record_name: str) -> None:
        name = record_name.removeprefix(f"{LEASES}/").removesuffix(".json")
        record = backend.read(record_name)
        if record is None:
            return
        with noting(faults, record_name):
            lease = parse_lease(record, name)
            silent = age_s(listed[record_name], now) > _TTLS_UNTIL_DEAD * lease.ttl_s
            live = lease.state != "free" and not silent and not lease.holder.is_dead
            seen.append(SeenLease(name, record, lease, live))

    in_parallel(look, listed, at_once=READS_AT_ONCE)
    return sorted(seen, key=lambda lease: lease.name)


def read_work(backend: Backend, faults: dict[str, str] | None = None) -> list[StoredWork]:
    """Every piece of work in progress."""
    pieces: dict[str, StoredWork] = {}
    for listed in backend.list(f"{WORK}/"):
        name = listed.name.removeprefix(f"{WORK}/").partition(_BLOBS)[0].removesuffix(_SNAPSHOT)
        pieces.setdefault(name, StoredWork(name)).things.append(listed)
    for piece in pieces.values():
        record = backend.read(piece.snapshot_name)
        if record is not None:
            with noting(faults, piece.snapshot_name):
                piece.tag, piece.snapshot = record.tag, sound_snapshot(record.data, piece.name)
    return list(pieces.values())


def sound_snapshot(data: bytes, name: str) -> Snapshot:
    """The snapshot found in area `name`. Raises CorruptArtifactError for one that is unsound or names no lease here."""
    snapshot = parse_snapshot(data, name)
    if snapshot.lease and not is_name(snapshot.lease):
        raise CorruptArtifactError(f"{snapshot_name(name)} names a lease outside the store: {snapshot.lease!r}")
    return snapshot


def missing_targets(refs: Iterable[Ref], addresses: Container[str]) -> dict[str, list[str]]:
    """What pins and refs name and is none of `addresses`: by address, who names it."""
    missing: dict[str, list[str]] = {}
    for ref in refs:
        for address in ref.addresses:
            if address not in addresses:
                missing.setdefault(address, []).append(_called(ref))
    return missing


def _called(ref: Ref) -> str:
    return f"pin {ref.name}" if ref.kind == PIN else f"{ref.kind} {ref.name}"


def standing_roots(
    store: Store, leases: Iterable[SeenLease], work: Iterable[StoredWork], refs: Iterable[Ref]
) -> list[Root]:
    """What pins, refs, living producers, pieces of work and living readers on this machine keep."""
    roots = [Root(_called(ref), addresses=frozenset(ref.addresses)) for ref in refs]
    for seen in leases:
        if seen.live:
            manifest = seen.lease.manifest
            named = {address for address in (seen.address, manifest.address if manifest else None) if address}
            inputs = {*seen.lease.inputs.values(), *(manifest.inputs.values() if manifest else ())}
            blobs = {entry.sha256 for entry in manifest.files.values()} if manifest else set()
            reason = f"lease of {seen.lease.holder}"
            roots.append(Root(reason, frozenset(named), frozenset(inputs), frozenset(blobs)))
    for piece in work:
        if piece.snapshot is not None:
            reason = f"work {piece.name} at {piece.snapshot.label}"
            roots.append(Root(reason, digests=frozenset(piece.snapshot.inputs.values())))
    held = store.backend.pool.in_use()
    return [*roots, Root("in use on this machine", digests=frozenset(held))] if held else roots
