"""The artifact store: what was built once is never built again, and what is read is what was written.

Knows keys, manifests and the order of steps. Where the bytes are is the backend's business.
"""

import errno
import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

from qlora_core.errors import ConfigError, CorruptArtifactError, LeaseLostError, StoreError, StoreUnavailableError
from qlora_core.store.artifact import Artifact, StageKey
from qlora_core.store.backend import Backend, Record
from qlora_core.store.contents import seal
from qlora_core.store.layout import BLOBS, manifest_name
from qlora_core.store.lease import DEFAULT_TTL_S, HeldLease, Leases, finish
from qlora_core.store.local import LocalFolder
from qlora_core.store.manifest import Manifest, new_manifest, parse_manifest
from qlora_core.store.pool import BlobPool
from qlora_core.store.quarantine import set_record_aside

logger = logging.getLogger(__name__)

GC_LEASE = "store/gc"
_DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO})
_ATTEMPTS = 3
_LONGEST_PAUSE_S = 2.0


class Store:
    """Artifacts by key, over one backend. Safe for many processes at once.

    `lease_ttl_s` is how long a producer on another machine may be silent before it counts as dead.
    """

    def __init__(self, backend: Backend, *, lease_ttl_s: float = DEFAULT_TTL_S) -> None:
        self.backend = backend
        self.leases = Leases(backend, lease_ttl_s)

    @property
    def location(self) -> str:
        """The place as a user would write it."""
        return self.backend.location

    def find(self, key: StageKey) -> Manifest | None:
        """The manifest of the artifact if there is one; None on a miss. Reads no other file and changes nothing.

        A manifest that is unsound is logged and a miss.
        """
        try:
            return self.manifest_at(key.address)
        except CorruptArtifactError as fault:
            logger.warning("%s: %s; it will be built anew", self.location, fault)
            return None

    def get(self, key: StageKey) -> Artifact | None:
        """The artifact with every file verified during this call; None on a miss.

        A corrupt artifact is logged with each file's expected and found digest, moved to quarantine, and a miss.
        """
        return self.get_at(key.address)

    def get_at(self, address: str) -> Artifact | None:
        """`get` by address, `v1/stage/<stage>/<key>`."""
        for _ in range(_ATTEMPTS):
            record = self.backend.read(manifest_name(address))
            if record is None:
                return None
            try:
                return self._open(parse_manifest(record.data, address))
            except CorruptArtifactError as fault:
                # If it was changed by now, a producer may have put a sound one in its place.
                if self._is_out_of_the_way(address, record):
                    logger.warning("%s: corrupt artifact, a miss: %s", self.location, fault)
                    return None
        raise StoreError(f"{self.location}: {address} changes faster than it can be read; run the same command again")

    def get_or_build(self, key: StageKey, build: Callable[[Path], None]) -> tuple[Artifact, bool]:
        """The artifact, and whether it was there already: False means that `build` ran here.

        `build` fills an empty folder. If it raises, nothing is stored and the folder is removed. While another living
        producer builds the same key, this call waits for its artifact. Raises StoreError when the files cannot be
        stored.
        """
        pause_s = 0.05
        while True:
            artifact = self.get(key)
            if artifact is not None:
                return artifact, True
            with self.leases.attempt(_lease_of(key), key.inputs) as lease:
                # Looked at again with the lease in hand: its last holder may just have published.
                if lease is not None and self.find(key) is None:
                    try:
                        return self._build(key, lease, build), False
                    except LeaseLostError as lost:
                        logger.warning("%s", lost)
            time.sleep(pause_s)
            pause_s = min(pause_s * 1.5, _LONGEST_PAUSE_S)

    def check(self) -> None:
        """Prove that artifacts can be written and read. Raises StoreError: the place, the cause, the next step."""
        self.backend.check()

    def manifest_at(self, address: str) -> Manifest | None:
        """The manifest at an address; None where there is none. Raises CorruptArtifactError for an unsound one."""
        record = self.backend.read(manifest_name(address))
        return None if record is None else parse_manifest(record.data, address)

    def _open(self, manifest: Manifest) -> Artifact:
        """The artifact's files in a folder of this machine, verified. Raises CorruptArtifactError naming each fault."""
        for _ in range(_ATTEMPTS):
            try:
                self.backend.fetch(manifest.files.values(), BLOBS)
            except CorruptArtifactError as fault:
                raise CorruptArtifactError(f"{manifest.address}: {_with_paths(str(fault), manifest)}") from fault
            path = self.backend.pool.view(manifest.digest, manifest.files)
            if path is not None:
                return _artifact(manifest, path)
        raise StoreError(
            f"files of {manifest.address} vanish from {self.backend.pool.views.parent} as they are read; its size "
            "limit is too small for what runs here: raise store.cache_limit_gb"
        )

    def _build(self, key: StageKey, lease: HeldLease, build: Callable[[Path], None]) -> Artifact:
        with self.backend.staging() as folder:
            with _disk_errors_named(key, folder):
                build(folder)
                files = seal(folder)
            manifest = new_manifest(key.stage, key.version, key.config, key.inputs, files)
            lease.intend(manifest)
            # Said before it is asked: a collection that began since does not know what we are about to rely on.
            self.leases.wait_while_held(GC_LEASE, f"{key.stage}: garbage is being collected")
            self.backend.send(folder, files, BLOBS)
            lease.commit()
        return self._publish(manifest, lease)

    def _publish(self, manifest: Manifest, lease: HeldLease) -> Artifact:
        for _ in range(_ATTEMPTS):
            if finish(self.backend, manifest):
                lease.done()
                path = self.backend.pool.view(manifest.digest, manifest.files)
                if path is not None:
                    return _artifact(manifest, path)
            # Something stands there already. If it is sound, it is the artifact.
            artifact = self.get_at(manifest.address)
            if artifact is not None:
                lease.done()
                return artifact
        raise StoreError(
            f"{self.location}: {manifest.address} is taken by an artifact that cannot be read, {_ATTEMPTS} times in a "
            "row; look at the store's disk, then run the same command again"
        )

    def _is_out_of_the_way(self, address: str, record: Record) -> bool:
        """Set a corrupt artifact aside; one that cannot be moved, as on a read-only disk, is a miss where it lies."""
        try:
            return self.set_aside(address, record)
        except StoreUnavailableError:
            raise
        except StoreError as error:
            logger.warning("%s is not moved to quarantine: %s", address, error)
            return True

    def set_aside(self, address: str, record: Record) -> bool:
        """Move a manifest to quarantine: its artifact becomes a miss. False if it was changed or removed meanwhile."""
        return set_record_aside(self.backend, manifest_name(address), record)


def open_store(
    url: str,
    cache_dir: Path | str,
    *,
    cache_limit_gb: float | None = None,
    encryption: Literal["none", "AES256", "aws:kms"] = "none",
    kms_key_id: str | None = None,
    lease_ttl_s: float = DEFAULT_TTL_S,
) -> Store:
    """The store at a folder (a plain path or file://) or at s3://bucket/prefix. Writes nothing to a healthy store.

    Folders that died producers of this machine left behind are removed. `cache_dir` holds the local copies of remote
    artifacts, at most `cache_limit_gb` of them. Encryption is asked of the server. Raises ConfigError for any other
    address.
    """
    if not url.startswith("s3://"):
        return Store(LocalFolder(_local_root(url)), lease_ttl_s=lease_ttl_s)
    from qlora_core.store.s3.bucket import S3Bucket

    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    prefix = prefix.strip("/")
    limit = None if cache_limit_gb is None else int(cache_limit_gb * 1e9)
    pool = BlobPool(Path(cache_dir) / "s3" / bucket / prefix, limit)
    backend = S3Bucket(bucket, prefix, pool, encryption=encryption, kms_key_id=kms_key_id)
    return Store(backend, lease_ttl_s=lease_ttl_s)


def _lease_of(key: StageKey) -> str:
    return f"stage/{key.stage}/{key.key}"


def _local_root(url: str) -> Path:
    if "://" not in url and url:
        return Path(url).expanduser().absolute()
    parts = urlsplit(url)
    if parts.scheme != "file" or parts.netloc not in ("", "localhost") or not parts.path:
        raise ConfigError(
            f"store: {url!r} is not understood; give a folder, file:///absolute/folder or s3://bucket/prefix"
        )
    return Path(unquote(parts.path))


def _artifact(manifest: Manifest, path: Path) -> Artifact:
    return Artifact(manifest.stage, manifest.key, manifest.digest, path, manifest)


def _with_paths(faults: str, manifest: Manifest) -> str:
    """Faults that name blobs, with the files that are these blobs."""
    for sha256 in {entry.sha256 for entry in manifest.files.values()}:
        paths = ", ".join(path for path, entry in manifest.files.items() if entry.sha256 == sha256)
        faults = faults.replace(f"blob {sha256}", f"{paths} (blob {sha256})")
    return faults


@contextmanager
def _disk_errors_named(key: StageKey, folder: Path) -> Iterator[None]:
    # Only what the disk itself says: any other error in a builder is about the builder's own work.
    try:
        yield
    except Exception as error:
        if _os_error_number(error) not in _DISK_ERRORS:
            raise
        raise StoreError(
            f"stage {key.stage} could not write its files under {folder}: {error}; nothing was stored; free space or "
            "point `store` elsewhere, then run the same command again"
        ) from error


def _os_error_number(error: Exception) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    # Libraries in Rust, safetensors among them, keep the number in their text alone.
    told = re.search(r"\(os error (\d+)\)", str(error))
    return int(told[1]) if told else None
