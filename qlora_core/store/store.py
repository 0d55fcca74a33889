"""The artifact store: what was built once is never built again, and what is read is what was written.

Knows keys, manifests and the order of steps. Where the bytes are is the backend's business.
"""

import errno
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

from qlora_core.errors import ConfigError, CorruptArtifactError, StoreError
from qlora_core.store.artifact import Artifact, StageKey
from qlora_core.store.backend import Backend, read_or_set_aside
from qlora_core.store.contents import seal
from qlora_core.store.local import LocalFolder
from qlora_core.store.manifest import Manifest, new_manifest, parse_manifest

logger = logging.getLogger(__name__)

_DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO})
_PUBLISH_ATTEMPTS = 3


class Store:
    """Artifacts by key, over one backend. Safe for many processes at once."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    @property
    def location(self) -> str:
        """The place as a user would write it."""
        return self._backend.location

    def find(self, key: StageKey) -> Manifest | None:
        """The manifest of the artifact if there is one; None on a miss. Reads no other file and changes nothing.

        A manifest that is unsound is logged and a miss.
        """
        try:
            return self._read_manifest(key)
        except CorruptArtifactError as fault:
            logger.warning("%s: %s; it will be built anew", self.location, fault)
            return None

    def get(self, key: StageKey) -> Artifact | None:
        """The artifact with every file verified during this call; None on a miss.

        A corrupt artifact is logged with each file's expected and found digest, moved to quarantine, and a miss.
        """
        return read_or_set_aside(self._backend, key.address, lambda: self._read(key))

    def get_or_build(self, key: StageKey, build: Callable[[Path], None]) -> tuple[Artifact, bool]:
        """The artifact, and whether it was there already: False means that `build` ran.

        `build` fills an empty folder. If it raises, nothing is stored and the folder is removed. When another producer
        of the same key is first, its artifact is the one returned. Raises StoreError when the files cannot be stored.
        """
        artifact = self.get(key)
        if artifact is not None:
            return artifact, True
        with self._backend.staging() as folder:
            with _disk_errors_named(key, folder):
                build(folder)
                files = seal(folder)
            manifest = new_manifest(key.stage, key.version, key.config, key.inputs, files)
            return self._publish(key, folder, manifest), False

    def check(self) -> None:
        """Prove that artifacts can be written and read. Raises StoreError: the place, the cause, the next step."""
        self._backend.check()

    def _read_manifest(self, key: StageKey) -> Manifest | None:
        address = key.address
        raw = self._backend.read_manifest(address)
        return None if raw is None else parse_manifest(raw, address)

    def _read(self, key: StageKey) -> Artifact | None:
        manifest = self._read_manifest(key)
        return None if manifest is None else _artifact(manifest, self._backend.fetch(manifest))

    def _publish(self, key: StageKey, folder: Path, manifest: Manifest) -> Artifact:
        for _ in range(_PUBLISH_ATTEMPTS):
            published = self._backend.publish(folder, manifest)
            if published is not None:
                return _artifact(manifest, published)
            winner = self.get(key)
            if winner is not None:
                logger.info("%s: another producer of %s was first; taking its artifact", self.location, key.address)
                return winner
        raise StoreError(
            f"{self.location}: {key.address} is taken by an artifact that cannot be read, {_PUBLISH_ATTEMPTS} times in "
            "a row; look at the store's disk, then run the same command again"
        )


def open_store(url: str, cache_dir: Path) -> Store:
    """The store at a folder (a plain path or file://) or at s3://bucket/prefix. Writes nothing to a healthy store.

    Folders that died producers of this machine left behind are removed. `cache_dir` holds the local copies of remote
    artifacts. Raises ConfigError for any other address.
    """
    if url.startswith("s3://"):
        from qlora_core.store.s3 import S3Bucket

        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        backend: Backend = S3Bucket(bucket, prefix.strip("/"), cache_dir)
    else:
        backend = LocalFolder(_local_root(url))
    return Store(backend)


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
