"""Work in progress: the newest state of something unfinished, in a store, so that another machine can go on with it.

An area is one record, which names files as an artifact's manifest does, and the blobs that it names. A save sends the
blobs, swaps the record, and only then deletes what the new record does not name: whenever its process dies, the area
holds the old snapshot or the new one, and what is left over goes with the next save.

An area has one writer, the one that took it last: the record of an earlier one is stale from then on, and so its next
save is refused. It does not know what the files mean, nor which of two labels is the later one.
"""

import logging
import re
import secrets
import shutil
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from qlora_core.digest import canonical_json
from qlora_core.errors import CorruptArtifactError, LeaseLostError, StoreError
from qlora_core.store.backend import Backend, Record
from qlora_core.store.contents import list_files, seal
from qlora_core.store.disk import named_os_errors
from qlora_core.store.layout import WORK
from qlora_core.store.manifest import FileEntry, InsidePath
from qlora_core.store.quarantine import set_record_aside

logger = logging.getLogger(__name__)

_SNAPSHOT_FILE = "snapshot.json"
_BLOB_FOLDER = "blob"
_PART = "[A-Za-z0-9][A-Za-z0-9_.-]{0,99}"
_ATTEMPTS = 3


def _area_name(name: str) -> str:
    parts = name.split("/")
    if not all(re.fullmatch(_PART, part) and part not in (_SNAPSHOT_FILE, _BLOB_FOLDER) for part in parts):
        raise ValueError(
            f"{name!r} cannot name work in a store: parts of letters, digits, dot, dash and underscore, up to 100 "
            f"characters each, joined by /, none of them {_SNAPSHOT_FILE} or {_BLOB_FOLDER}"
        )
    return name


class Snapshot(BaseModel):
    """What `snapshot.json` says. `nonce` makes every write of it different from every other.

    `lease` names the lease under which the work goes on; `inputs` are the digests of the artifacts that it needs.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    name: Annotated[str, AfterValidator(_area_name)]
    label: str = Field(pattern=rf"^{_PART}$")
    lease: str
    inputs: dict[str, str]
    files: dict[InsidePath, FileEntry] = Field(min_length=1)
    created: AwareDatetime
    nonce: str = ""

    def to_json(self) -> bytes:
        """The record's bytes, equal for equal snapshots."""
        return canonical_json(self.model_dump(mode="json"))


def parse_snapshot(data: bytes, name: str) -> Snapshot:
    """The snapshot found in area `name`. Raises CorruptArtifactError for anything but a sound one of that area."""
    try:
        snapshot = Snapshot.model_validate_json(data)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        raise CorruptArtifactError(f"{snapshot_name(name)} is no sound snapshot: {faults}") from error
    if snapshot.name != name:
        raise CorruptArtifactError(f"{snapshot_name(name)} belongs to other work, {snapshot.name}")
    return snapshot


def snapshot_name(name: str) -> str:
    """The record of area `name`."""
    return f"{WORK}/{name}/{_SNAPSHOT_FILE}"


def clear_work(backend: Backend, name: str) -> None:
    """Remove area `name` and all below it: the records first, then the blobs. Nothing there: no effect."""
    found = [listed.name for listed in backend.list(f"{WORK}/{name}/")]
    for stored in sorted(found, key=lambda stored: not stored.endswith(f"/{_SNAPSHOT_FILE}")):
        backend.remove(stored)


class WorkArea:
    """The area called `name`, such as `sweep/<key>/t000`, as one process sees it. StoreError for an unsafe name."""

    def __init__(self, backend: Backend, name: str, lease: str = "", inputs: Mapping[str, str] | None = None) -> None:
        try:
            self._name = _area_name(name)
        except ValueError as error:
            raise StoreError(str(error)) from error
        self._backend = backend
        self._lease = lease
        self._inputs = dict(inputs or {})
        self._record = snapshot_name(name)
        self._blobs = f"{WORK}/{name}/{_BLOB_FOLDER}"
        self._taken = False
        self._tag: str | None = None
        self._tried = b""

    def newest(self) -> Snapshot | None:
        """The snapshot; None where there is none. An unsound record is logged by name, moved to quarantine, and None.

        Whoever only looks takes nothing over.
        """
        return self._read()[1]

    def take(self) -> Snapshot | None:
        """Become the writer: an earlier one is refused from now on. Returns the snapshot to go on from, if any."""
        for _ in range(_ATTEMPTS):
            record, snapshot = self._read()
            if record is None or snapshot is None:
                self._taken, self._tag = True, None
                return None
            mine = snapshot.model_copy(update={"nonce": secrets.token_hex(8)})
            tag = self._backend.replace(self._record, mine.to_json(), record.tag)
            if tag is not None:
                self._taken, self._tag = True, tag
                return mine
        raise StoreError(
            f"{self._backend.location}: {self._record} changes faster than it can be taken over: end the other "
            "process that works on it, then run the same command again"
        )

    def save(self, folder: Path, label: str) -> Snapshot:
        """Make the files of `folder`, which stay as they are, the area's snapshot. Durable on return.

        Raises LeaseLostError if somebody else has taken the area over, StoreError when the files cannot be stored: the
        snapshot before it stays then.
        """
        if not self._taken:
            self.take()
        with self._backend.staging() as stage:
            # Copies: the backend takes the files it is given, and makes them read-only.
            with named_os_errors("copy", folder):
                _copy_files(folder, stage)
                files = seal(stage)
            snapshot = self._snapshot(label, files)
            self._backend.send(stage, files, self._blobs)
        self._drop_copies()
        self._swap(snapshot)
        try:
            self._delete_unnamed(snapshot)
        except StoreError as error:
            logger.info("what %s does not name any more stays until the next save: %s", self._record, error)
        return snapshot

    def restore(self, target: Path) -> Snapshot | None:
        """Put the snapshot's files into a new folder `target`, whole or not at all; None where there is none.

        Every file is verified during this call. A corrupt snapshot is logged with each file's expected and found
        digest, moved to quarantine, and None.
        """
        for _ in range(_ATTEMPTS):
            record, snapshot = self._read()
            if record is None or snapshot is None:
                return None
            try:
                self._backend.fetch(snapshot.files.values(), self._blobs)
                self._put(snapshot, target)
            except CorruptArtifactError as fault:
                # Gone where the record is another by now: its writer has deleted what it does not name.
                if self._set_aside(record, CorruptArtifactError(_with_paths(str(fault), snapshot))):
                    return None
            else:
                return snapshot
            finally:
                self._drop_copies()
        raise StoreError(
            f"{self._backend.location}: {self._record} changes faster than it can be read: end the process that "
            "writes it, then run the same command again"
        )

    def clear(self) -> None:
        """Remove the area: the record first, then the blobs. Nothing there: no effect."""
        clear_work(self._backend, self._name)
        self._drop_copies()
        self._taken = False

    def _snapshot(self, label: str, files: Mapping[str, FileEntry]) -> Snapshot:
        try:
            return Snapshot(
                name=self._name,
                label=label,
                lease=self._lease,
                inputs=self._inputs,
                files=dict(files),
                created=datetime.now(UTC),
                nonce=secrets.token_hex(8),
            )
        except ValidationError as error:
            raise StoreError(f"{label!r} is no label for a snapshot: {error.errors()[0]['msg']}") from error

    def _read(self) -> tuple[Record | None, Snapshot | None]:
        record = self._backend.read(self._record)
        if record is None:
            return None, None
        try:
            return record, parse_snapshot(record.data, self._name)
        except CorruptArtifactError as fault:
            self._set_aside(record, fault)
            return None, None

    def _swap(self, snapshot: Snapshot) -> None:
        earlier, self._tried = self._tried, snapshot.to_json()
        tag = self._write(self._tried)
        if tag is None:
            # This write of ours, or the one before, may have got there although its answer did not.
            found = self._backend.read(self._record)
            if found is not None and found.data == self._tried:
                tag = found.tag
            elif found is not None and found.data == earlier:
                self._tag = found.tag
                tag = self._write(self._tried)
        if tag is None:
            raise LeaseLostError(
                f"{self._backend.location}: {self._record} was taken over by another process, so this one stops; "
                f"{snapshot.label} is not kept there"
            )
        self._tag = tag

    def _write(self, data: bytes) -> str | None:
        if self._tag is None:
            return self._backend.create(self._record, data)
        return self._backend.replace(self._record, data, self._tag)

    def _delete_unnamed(self, snapshot: Snapshot) -> None:
        listed = [stored.name for stored in self._backend.list(f"{self._blobs}/")]
        found = self._backend.read(self._record)
        # Looked at after the list: as long as the record is ours, what it does not name is nobody's.
        if found is None or found.tag != self._tag:
            return
        named = {entry.sha256 for entry in snapshot.files.values()}
        for name in listed:
            if name.rpartition("/")[2] not in named:
                self._backend.remove(name)

    def _put(self, snapshot: Snapshot, target: Path) -> None:
        stage = target.with_name(f".staging-{secrets.token_hex(6)}")
        with named_os_errors("write to", target):
            try:
                for path, entry in snapshot.files.items():
                    (stage / path).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(self._backend.pool.path(entry.sha256, self._blobs), stage / path)
                stage.rename(target)
            finally:
                shutil.rmtree(stage, ignore_errors=True)

    def _set_aside(self, record: Record, fault: CorruptArtifactError) -> bool:
        """Move a record to quarantine; False if it was changed or removed meanwhile."""
        if not set_record_aside(self._backend, self._record, record):
            return False
        logger.warning("%s: corrupt snapshot, moved to quarantine: %s", self._backend.location, fault)
        if record.tag == self._tag:
            self._tag = None
        return True

    def _drop_copies(self) -> None:
        """Remove this machine's copies, if they are copies: no size limit looks at those of work in progress."""
        if self._backend.pool_is_copies:
            shutil.rmtree(self._backend.pool.path("0" * 64, self._blobs).parent.parent, ignore_errors=True)


def _copy_files(folder: Path, target: Path) -> None:
    for path, file in list_files(folder):
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target / path, follow_symlinks=False)


def _with_paths(faults: str, snapshot: Snapshot) -> str:
    """Faults that name blobs, with the files that are these blobs."""
    for sha256 in {entry.sha256 for entry in snapshot.files.values()}:
        paths = ", ".join(path for path, entry in snapshot.files.items() if entry.sha256 == sha256)
        faults = faults.replace(f"blob {sha256}", f"{paths} (blob {sha256})")
    return f"{snapshot_name(snapshot.name)}: {faults}"
