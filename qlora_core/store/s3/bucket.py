"""A bucket of S3, or of anything that speaks S3 and honours conditional writes, as the place of a store.

Records and blobs are objects under `<prefix>/` with the names in `layout`. Blobs are read through copies in a pool on
this machine, each compared with its entry whenever it is used. It does not know what records mean.
"""

import logging
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Literal

from qlora_core.errors import ConfigError, CorruptArtifactError, StoreError
from qlora_core.store.backend import Listed, Record, checked_name
from qlora_core.store.contents import in_parallel
from qlora_core.store.disk import named_os_errors
from qlora_core.store.layout import QUARANTINE, VERSION, blob_name, is_blob_name
from qlora_core.store.local import LocalFolder
from qlora_core.store.manifest import FileEntry, inside_path
from qlora_core.store.pieces import PieceRange, piece_fault, pieces_of_range
from qlora_core.store.pool import BlobPool
from qlora_core.store.s3.client import S3Client
from qlora_core.store.s3.download import Download
from qlora_core.store.s3.inspection import inspect_blob
from qlora_core.store.s3.outcome import Outcome, Refused
from qlora_core.store.s3.partial import remove_old
from qlora_core.store.s3.probe import probe_conditions
from qlora_core.store.s3.records import S3Records
from qlora_core.store.s3.sending import Blob
from qlora_core.store.s3.stream import ObjectStream
from qlora_core.store.s3.unfinished import abort_old_uploads
from qlora_core.store.s3.upload import upload_blobs

logger = logging.getLogger(__name__)

_PROBE_ATTEMPTS = 2
_PROBE_READ_TIMEOUT_S = 10.0
_DOWNLOADS_KEPT_S = 7 * 86400.0
_UPLOADS_KEPT_S = 86400.0


class S3Bucket:
    """The S3 backend. Nothing is sent before something is asked for.

    `connect_timeout_s` and `read_timeout_s` bound the silence of each try of a request. An operation that gets no byte
    further for `deadline_s` fails with StoreUnavailableError, at the latest one try later.
    """

    def __init__(
        self,
        bucket: str,
        prefix: str,
        pool: BlobPool,
        *,
        encryption: Literal["none", "AES256", "aws:kms"] = "none",
        kms_key_id: str | None = None,
        connect_timeout_s: float = 5,
        read_timeout_s: float = 60,
        deadline_s: float = 120,
    ) -> None:
        try:
            inside_path(f"{bucket}/{prefix}" if prefix else bucket)
        except ValueError as error:
            raise ConfigError(f"store: 's3://{bucket}/{prefix}' is not understood; give s3://bucket/prefix") from error
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self._pool = pool
        self._encryption = _encryption(encryption, kms_key_id)
        self._connect_timeout_s = connect_timeout_s
        self._read_timeout_s = read_timeout_s
        self._deadline_s = deadline_s
        self._client = self._new_client(read_timeout_s)
        self._records = S3Records(self._client, self._prefix, self._encryption)

    @property
    def location(self) -> str:
        """The bucket and prefix as s3://bucket/prefix."""
        return f"s3://{self._bucket}/{self._prefix}".rstrip("/")

    @property
    def pool(self) -> BlobPool:
        """The copies on this machine."""
        return self._pool

    @property
    def pool_is_copies(self) -> bool:
        """What counts is in the bucket."""
        return True

    def read(self, name: str) -> Record | None:
        """The record, in one request."""
        return self._records.read(name)

    def create(self, name: str, data: bytes) -> str | None:
        """Write the record where none is. One that is there with the very same bytes counts as written."""
        return self._records.create(name, data)

    def replace(self, name: str, data: bytes, tag: str) -> str | None:
        """Overwrite the record that still has this ETag. One with the very same bytes by now counts as written."""
        return self._records.replace(name, data, tag)

    def remove(self, name: str, tag: str | None = None) -> bool:
        """Delete an object, and this machine's copy if it is a blob."""
        if is_blob_name(checked_name(name)):
            copy = self._pool.root / name
            with named_os_errors("remove", copy):
                copy.unlink(missing_ok=True)
        return self._records.remove(name, tag)

    def list(self, prefix: str) -> Iterator[Listed]:
        """Every object under the prefix; the time is the server's."""
        return self._records.list(prefix)

    def staging(self) -> AbstractContextManager[Path]:
        """An empty folder beside the copies, so that a rename makes its files copies."""
        return self._folder.staging()

    def send(self, folder: Path, files: Mapping[str, FileEntry], area: str) -> None:
        """Upload what is not there, then keep the files as copies: the producer need not fetch what it has made."""
        # Equal files are one blob, and are sent once.
        blobs = {entry.sha256: (folder / path, entry) for path, entry in files.items()}
        sent = [Blob(self._key(sha256, area), file, entry) for sha256, (file, entry) in blobs.items()]
        upload_blobs(self._client, sent, self._encryption)
        for sha256, (file, _) in blobs.items():
            self._pool.adopt(file, sha256, area, durable=False)
        self._pool.make_room()

    def fetch(self, entries: Iterable[FileEntry], area: str) -> None:
        """Download what has no sound copy here; what has one costs no request."""
        wanted = {entry.sha256: entry for entry in entries}
        absent: dict[str, FileEntry] = {}

        def look(sha256: str) -> None:
            fault = self._pool.fault(wanted[sha256], area)
            if fault is not None:
                absent[self._key(sha256, area)] = wanted[sha256]
                if self._pool.path(sha256, area).exists():
                    logger.warning("the copy in %s is damaged and fetched anew: %s", self._pool.root, fault)

        in_parallel(look, wanted, at_once=os.cpu_count() or 1)
        if not absent:
            return
        remove_old(self._pool.root, _DOWNLOADS_KEPT_S)
        download = Download(self._client, self._pool, area)
        download.run(absent)
        self._pool.make_room()
        for key, (_, etag) in download.faults.items():
            if etag is not None:
                self._try_to_set_aside(key, etag)
        if download.faults:
            raise CorruptArtifactError("; ".join(sorted(fault for fault, _ in download.faults.values())))

    def read_range(self, entry: FileEntry, offset: int, length: int, area: str) -> bytes:
        """Read the pieces that hold the range, from the copy if it is here and they are sound there."""
        read = pieces_of_range(entry, offset, length)
        if read.length == 0:
            return b""
        copy = self._pool.path(entry.sha256, area)
        if copy.is_file():
            with named_os_errors("read", copy), copy.open("rb") as stream:
                stream.seek(read.start)
                data = stream.read(read.length)
            if piece_fault(entry, read, data) is None:
                return read.cut(data)
        # A second time from the server: the first may have been damaged on the way.
        fault = None
        for _ in range(2):
            data = self._read_pieces(entry, read, area)
            fault = piece_fault(entry, read, data)
            if fault is None:
                return read.cut(data)
        raise CorruptArtifactError(fault)

    def blob_fault(self, entry: FileEntry, area: str) -> str | None:
        """Read the object in full; nothing is written here."""
        fault, _ = inspect_blob(self._client, self._key(entry.sha256, area), entry, self._client.patience())
        return fault

    def set_aside(self, name: str) -> None:
        """Copy the object to quarantine and delete it."""
        try:
            answer = self._client.ask("head_object", Key=self._prefix + checked_name(name))
        except Refused:
            return
        self._move_to_quarantine(self._prefix + name, answer["ETag"])

    def sweep_leftovers(self, older_than_s: float) -> int:
        """Abort uploads in which nothing has arrived for so long, for a day at least; remove old downloads here.

        A living process whose upload goes nevertheless begins it anew.
        """
        aborted = abort_old_uploads(self._client, f"{self._prefix}{VERSION}/", max(older_than_s, _UPLOADS_KEPT_S))
        removed = remove_old(self._pool.root, max(older_than_s, _UPLOADS_KEPT_S))
        return aborted + removed + self._folder.sweep_leftovers(older_than_s)

    def check(self) -> None:
        """Write, overwrite, read and remove probes, in the folder of the copies and in the bucket."""
        self._folder.check()
        client = self._new_client(min(_PROBE_READ_TIMEOUT_S, self._read_timeout_s), attempts=_PROBE_ATTEMPTS)
        probe_conditions(S3Records(client, self._prefix, self._encryption), client)

    def _new_client(self, read_timeout_s: float, **attempts: int) -> S3Client:
        return S3Client(
            self._bucket,
            self.location,
            connect_timeout_s=self._connect_timeout_s,
            read_timeout_s=read_timeout_s,
            deadline_s=self._deadline_s,
            **attempts,
        )

    @property
    def _folder(self) -> LocalFolder:
        return LocalFolder(self._pool.root, pool=self._pool)

    def _key(self, sha256: str, area: str) -> str:
        return self._prefix + blob_name(sha256, area)

    def _read_pieces(self, entry: FileEntry, read: PieceRange, area: str) -> bytes:
        data = bytearray()
        bounds = {"start": read.start, "length": read.length} if entry.pieces else {}
        key = self._key(entry.sha256, area)
        stream = ObjectStream(self._client, key, self._client.patience(), size_bytes=entry.size_bytes, **bounds)
        try:
            stream.into(data.extend)
        except Refused as no:
            what = "is missing" if no.outcome is Outcome.MISSING else "does not have its size"
            raise CorruptArtifactError(f"blob {entry.sha256} {what}") from no
        return bytes(data)

    def _try_to_set_aside(self, key: str, etag: str) -> None:
        try:
            self._move_to_quarantine(key, etag)
        except StoreError as error:
            logger.warning("%s is wrong and stays where it is: %s", key, error)

    def _move_to_quarantine(self, key: str, etag: str) -> None:
        """Move one object, unless it has been replaced or removed by others since `etag` was read."""
        name = key.removeprefix(self._prefix).removeprefix(f"{VERSION}/")
        target = f"{self._prefix}{QUARANTINE}/{name}-{secrets.token_hex(4)}"
        try:
            self._client.copy(key, target, etag, self._encryption)
            self._client.ask("delete_object", Key=key, IfMatch=etag)
        except Refused as no:
            logger.info("%s was not moved to quarantine: %s", key, no.outcome.value)
        else:
            logger.info("moved %s to %s in %s", key, target, self._client.place)


def _encryption(kind: str, kms_key_id: str | None) -> dict[str, str]:
    """The parameters of every write."""
    if kms_key_id is not None and kind != "aws:kms":
        raise ConfigError(f"store: kms_key_id is given, but encryption is {kind!r}; set encryption to aws:kms")
    if kind == "none":
        return {}
    return {"ServerSideEncryption": kind, **({"SSEKMSKeyId": kms_key_id} if kms_key_id else {})}
