"""Reading a whole store where it is, and naming what is broken. Repair means moving it away, so that it is built anew.

It does not fetch: a sound copy on this machine says nothing about the place itself.
"""

from dataclasses import dataclass, field
from typing import Any

from qlora_core.errors import CorruptArtifactError
from qlora_core.progress import progress_bar
from qlora_core.store.catalog import Catalog, read_catalog
from qlora_core.store.contents import in_parallel
from qlora_core.store.layout import BLOBS, blob_name, manifest_name
from qlora_core.store.manifest import FileEntry, Manifest, parse_manifest
from qlora_core.store.store import Store

_AT_ONCE = 4


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
    """What was read and what is broken. `manifests` has the faults of unsound ones, `set_aside` what repair moved."""

    artifacts: int = 0
    blobs: int = 0
    size_bytes: int = 0
    orphans: int = 0
    orphan_bytes: int = 0
    broken: list[BrokenBlob] = field(default_factory=list)
    manifests: dict[str, str] = field(default_factory=dict)
    set_aside: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether all of it matches."""
        return not self.broken and not self.manifests

    def to_json(self) -> dict[str, Any]:
        """As plain JSON data."""
        return {
            **vars(self),
            "ok": self.ok,
            "broken": [blob.to_json() for blob in self.broken],
            "manifests": [{"address": address, "fault": fault} for address, fault in self.manifests.items()],
        }


def verify(store: Store, *, repair: bool = False) -> Verification:
    """Read every blob that an artifact has, once each, and every manifest.

    With `repair`, broken blobs and the manifests of their artifacts are moved to quarantine: the next run builds them.
    """
    catalog = read_catalog(store.backend)
    files = _files_by_blob(catalog)
    found = Verification(
        artifacts=len(catalog.entries),
        blobs=len(files),
        size_bytes=sum(entry.size_bytes for entry in files),
        manifests=dict(catalog.faults),
    )
    found.broken = _read_blobs(store, catalog, files)
    referenced = {entry.sha256 for entry in files}
    orphans = [blob for blob in store.backend.list(f"{BLOBS}/") if blob.name.rpartition("/")[2] not in referenced]
    found.orphans, found.orphan_bytes = len(orphans), sum(blob.size_bytes for blob in orphans)
    if repair:
        found.set_aside = _set_aside(store, catalog, found)
    return found


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
    return moved


def _is_sound(data: bytes, address: str) -> bool:
    try:
        parse_manifest(data, address)
    except CorruptArtifactError:
        return False
    return True
