"""Reading a whole store where it is, and naming what is broken. Repair means moving it away, so that it is built anew.

It does not fetch: a sound copy on this machine says nothing about the place itself.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from qlora_core.errors import CorruptArtifactError
from qlora_core.progress import progress_bar
from qlora_core.store.backend import Record
from qlora_core.store.catalog import READS_AT_ONCE, Catalog, read_catalog
from qlora_core.store.contents import in_parallel
from qlora_core.store.layout import BLOBS, LEASES, TAGS, VERDICTS, WORK, blob_name, manifest_name
from qlora_core.store.lease import parse_lease
from qlora_core.store.manifest import FileEntry, Manifest, parse_manifest
from qlora_core.store.quarantine import noting, set_record_aside
from qlora_core.store.refs import Ref, list_refs, remedy
from qlora_core.store.roots import missing_targets, sound_snapshot
from qlora_core.store.shelf import parse_document
from qlora_core.store.store import Store
from qlora_core.store.tag_shelf import check_segment

_AT_ONCE = 4
_SNAPSHOT = "/snapshot.json"


@dataclass
class BrokenBlob:
    """A blob that does not match its entry, and the files that are it: (artifact, path)."""

    entry: FileEntry
    fault: str
    files: list[tuple[Manifest, str]]

    def to_json(self) -> dict[str, Any]:
        """As plain JSON data."""
        files = [{"stage": made.stage, "key": made.key, "path": path} for made, path in self.files]
        return {"blob": self.entry.sha256, "fault": self.fault, "files": files}


@dataclass
class Verification:
    """What was read and what is broken.

    `manifests` has the faults of unsound ones by address, `records` those of leases, pins, references, snapshots and
    verdicts by name, `missing` the addresses that pins and references name where nothing is, and who names each.
    `set_aside` is what repair moved.
    """

    artifacts: int = 0
    blobs: int = 0
    size_bytes: int = 0
    orphans: int = 0
    orphan_bytes: int = 0
    broken: list[BrokenBlob] = field(default_factory=list)
    manifests: dict[str, str] = field(default_factory=dict)
    records: dict[str, str] = field(default_factory=dict)
    missing: dict[str, list[str]] = field(default_factory=dict)
    set_aside: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether all of it matches, and all that is named is there."""
        return not (self.broken or self.manifests or self.records or self.missing)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON data."""
        return {
            **vars(self),
            "ok": self.ok,
            "broken": [blob.to_json() for blob in self.broken],
            "manifests": [{"address": address, "fault": fault} for address, fault in self.manifests.items()],
            "records": [{"name": name, "fault": fault} for name, fault in self.records.items()],
            "missing": [{"address": address, "named_by": names} for address, names in self.missing.items()],
        }


def verify(store: Store, *, repair: bool = False) -> Verification:
    """Read every blob that an artifact has, once each, every manifest, and every other record.

    With `repair`, broken blobs and the manifests of their artifacts are moved to quarantine: the next run builds them.
    So are unsound leases, snapshots and verdicts. Pins and references are only named, with what to do about them:
    nobody may guess what they kept.
    """
    records: dict[str, str] = {}
    refs = list_refs(store.backend, records)
    records.update((name, f"{fault}; {remedy(name)}") for name, fault in list(records.items()))
    records.update(_record_faults(store))
    catalog = read_catalog(store.backend)
    files = _files_by_blob(catalog)
    found = Verification(
        artifacts=len(catalog.entries),
        blobs=len(files),
        size_bytes=sum(entry.size_bytes for entry in files),
        manifests=dict(catalog.faults),
        records=dict(sorted(records.items())),
        missing=_still_missing(store, refs, catalog),
    )
    found.broken = _read_blobs(store, catalog, files)
    referenced = {entry.sha256 for entry in files}
    orphans = [blob for blob in store.backend.list(f"{BLOBS}/") if blob.name.rpartition("/")[2] not in referenced]
    found.orphans, found.orphan_bytes = len(orphans), sum(blob.size_bytes for blob in orphans)
    if repair:
        found.set_aside = _set_aside(store, catalog, found)
    return found


def _parse_lease(record: Record, name: str) -> object:
    return parse_lease(record, name.removeprefix(f"{LEASES}/").removesuffix(".json"))


def _parse_work(record: Record, name: str) -> object:
    return sound_snapshot(record.data, name.removeprefix(f"{WORK}/").removesuffix(_SNAPSHOT))


def _parse_verdict(record: Record, name: str) -> object:
    return parse_document(record.data, name)


# What nobody but a computer wrote, and so nobody misses: it is asked for, or built, again.
_MENDABLE: dict[str, Callable[[Record, str], object]] = {
    LEASES: _parse_lease,
    WORK: _parse_work,
    VERDICTS: _parse_verdict,
    TAGS: check_segment,
}


def _record_faults(store: Store) -> dict[str, str]:
    """What is wrong with leases, snapshots, verdicts and tags, by name."""
    faults: dict[str, str] = {}

    def look(name: str) -> None:
        record = store.backend.read(name)
        if record is not None and (fault := _record_fault(record, name)):
            faults[name] = fault

    for area in _MENDABLE:
        listed = (each.name for each in store.backend.list(f"{area}/"))
        names = [name for name in listed if area != WORK or name.endswith(_SNAPSHOT)]
        in_parallel(look, names, at_once=READS_AT_ONCE)
    return faults


def _record_fault(record: Record, name: str) -> str | None:
    faults: dict[str, str] = {}
    with noting(faults, name):
        next(parse for area, parse in _MENDABLE.items() if name.startswith(f"{area}/"))(record, name)
    return faults.get(name)


def _still_missing(store: Store, refs: Iterable[Ref], catalog: Catalog) -> dict[str, list[str]]:
    """What pins and refs name and is not there; neither are those that were taken away meanwhile."""
    there = {*catalog.entries, *catalog.faults}
    missing = missing_targets(refs, there)
    if not missing:
        return {}
    again = missing_targets(list_refs(store.backend, {}), there)
    return {address: names for address, names in sorted(again.items()) if address in missing}


def _files_by_blob(catalog: Catalog) -> dict[FileEntry, list[tuple[Manifest, str]]]:
    files: dict[FileEntry, list[tuple[Manifest, str]]] = {}
    for found in catalog.entries.values():
        for path, entry in found.manifest.files.items():
            files.setdefault(entry, []).append((found.manifest, path))
    return files


def _read_blobs(store: Store, catalog: Catalog, files: dict[FileEntry, list[tuple[Manifest, str]]]) -> list[BrokenBlob]:
    broken: list[BrokenBlob] = []
    with progress_bar("verifying", sum(entry.size_bytes for entry in files)) as advance:

        def look(entry: FileEntry) -> None:
            fault = store.backend.blob_fault(entry, BLOBS)
            # An artifact that was collected while this went on is not broken.
            theirs = (
                [(made, path) for made, path in files[entry] if _is_unchanged(store, catalog, made)] if fault else []
            )
            if fault and theirs:
                broken.append(BrokenBlob(entry, fault, theirs))
            advance(entry.size_bytes)

        in_parallel(look, files, at_once=_AT_ONCE)
    return sorted(broken, key=lambda blob: blob.entry.sha256)


def _is_unchanged(store: Store, catalog: Catalog, manifest: Manifest) -> bool:
    record = store.backend.read(manifest_name(manifest.address))
    return record is not None and record.tag == catalog.entries[manifest.address].tag


def _set_aside(store: Store, catalog: Catalog, found: Verification) -> list[str]:
    moved: list[str] = []
    # Blobs first: a rebuilt artifact must not meet the broken one, which would count as there already.
    for blob in found.broken:
        if store.backend.blob_fault(blob.entry, BLOBS):
            store.backend.set_aside(blob_name(blob.entry.sha256))
            moved.append(blob_name(blob.entry.sha256))
    artifacts = {made.address: made for blob in found.broken for made, _ in blob.files}
    for address, manifest in sorted(artifacts.items()):
        record = store.backend.read(manifest_name(address))
        if record is not None and _is_unchanged(store, catalog, manifest) and store.set_aside(address, record):
            moved.append(manifest_name(address))
    for address in found.manifests:
        record = store.backend.read(manifest_name(address))
        if record is not None and not _is_sound(record.data, address) and store.set_aside(address, record):
            moved.append(manifest_name(address))
    mendable = [name for name in found.records if name.startswith(tuple(_MENDABLE))]
    return moved + [name for name in mendable if _set_record_aside(store, name)]


def _set_record_aside(store: Store, name: str) -> bool:
    record = store.backend.read(name)
    return record is not None and bool(_record_fault(record, name)) and set_record_aside(store.backend, name, record)


def _is_sound(data: bytes, address: str) -> bool:
    try:
        parse_manifest(data, address)
    except CorruptArtifactError:
        return False
    return True
