"""Artifacts as one file, to carry from store to store: a plain tar of manifests and blobs under their names in a store.

What comes in is believed in nothing: names, digests, sizes and pieces are verified before anything is published. The
one thing it cannot tell is whether files are what their manifest says made them: import what people you trust exported.
"""

import errno
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from qlora_core.errors import ConfigError, CorruptArtifactError, StoreError
from qlora_core.progress import progress_bar
from qlora_core.store.artifact import Artifact
from qlora_core.store.catalog import read_catalog
from qlora_core.store.contents import seal, sync_to_disk
from qlora_core.store.disk import NO_LINKS, named_os_errors
from qlora_core.store.layout import BLOBS, MANIFEST_FILE, STAGES, VERSION, blob_name, manifest_name
from qlora_core.store.lease import HeldLease, finish
from qlora_core.store.manifest import STAGE_NAME, Manifest, parse_manifest
from qlora_core.store.store import GC_LEASE, Store
from qlora_core.store.tar import TarReader, TarWriter

_BLOB = re.compile(rf"{BLOBS}/([0-9a-f]{{2}})/(\1[0-9a-f]{{62}})")
_MANIFEST = re.compile(rf"({STAGES}/{STAGE_NAME}/[0-9a-f]{{64}})/{re.escape(MANIFEST_FILE)}")
_LARGEST_MANIFEST = 64 << 20
_WRONG_PATHS = {
    errno.ENOENT: "look at the path, or make the folder first",
    errno.ENOTDIR: "a file stands where a folder is needed: give another path",
    errno.EISDIR: "it is a folder: give the path of a file",
}


def export_artifacts(
    store: Store, address: str, file: Path, *, with_inputs: bool = False, force: bool = False
) -> dict[str, Any]:
    """Write an artifact, with what it was made from if asked, to `file`: whole or not at all, equal bytes each time.

    Every blob is verified on the way. Raises CorruptArtifactError for one that does not match, ConfigError for a path
    that cannot be written to, or is there already unless `force` replaces it.
    """
    if not force and os.path.lexists(file):
        raise _taken(file)
    addresses = [address]
    if with_inputs:
        addresses = sorted({address, *read_catalog(store.backend).with_inputs([address])})
    artifacts = [_open(store, each) for each in addresses]
    blobs = {
        entry.sha256: (entry.size_bytes, artifact.path / path)
        for artifact in artifacts
        for path, entry in artifact.manifest.files.items()
    }
    fresh = file.with_name(f".{file.name}.{secrets.token_hex(6)}.part")
    with _path_errors("write", file):
        try:
            with fresh.open("xb") as stream:
                _write(stream, artifacts, blobs)
                stream.flush()
                os.fsync(stream.fileno())
            _put(fresh, file, force=force)
            sync_to_disk(file.parent)
        finally:
            fresh.unlink(missing_ok=True)
    return {
        "file": str(file),
        "artifacts": [_name(artifact.manifest) for artifact in artifacts],
        "blobs": len(blobs),
        "size_bytes": file.stat().st_size,
    }


def import_artifacts(store: Store, file: Path) -> dict[str, Any]:
    """Publish the artifacts in `file`, once all of it is verified; those that are there already are skipped.

    Raises StoreError for a file that is no export or a damaged one, naming what is wrong, and ConfigError where there
    is no such file; then nothing is published.
    """
    with ExitStack() as opened:
        with _path_errors("read", file):
            stream = opened.enter_context(file.open("rb"))
        # After the file: a wrong path leaves nothing in a store, nor makes one.
        stage = opened.enter_context(store.backend.staging())
        with named_os_errors(f"unpack {file} into", stage):
            incoming = _Incoming(file, stream, stage / "blob")
        found: list[tuple[Manifest, Path]] = []
        for number, manifest in enumerate(incoming.manifests):
            found.append((manifest, stage / f"artifact-{number}"))
            with named_os_errors("write", stage):
                incoming.lay_out(*found[-1])
        published = _publish(store, found)
    skipped = [manifest for manifest, _ in found if manifest not in published]
    return {"imported": [_name(each) for each in published], "skipped": [_name(each) for each in skipped]}


@contextmanager
def _path_errors(action: str, file: Path) -> Iterator[None]:
    """Turn what the operating system refuses into the path, the cause and the next step; ConfigError: a wrong path."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            # Not the operating system's: our own errors, and those of network libraries.
            raise
        told = f"cannot {action} {file}: {error.strerror or error}"
        if error.errno in _WRONG_PATHS:
            raise ConfigError(f"{told}; {_WRONG_PATHS[error.errno]}") from error
        raise StoreError(f"{told}; look at that disk and its permissions, or give another path") from error


def _taken(file: Path) -> ConfigError:
    return ConfigError(f"{file} is there already; give another name, or --force to replace it")


def _put(fresh: Path, file: Path, *, force: bool) -> None:
    if not force:
        try:
            os.link(fresh, file)  # refuses a file that somebody has put there meanwhile
        except FileExistsError as error:
            raise _taken(file) from error
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
        else:
            return
    fresh.replace(file)


def _open(store: Store, address: str) -> Artifact:
    artifact = store.get_at(address)
    if artifact is None:
        raise StoreError(
            f"{store.location} holds no sound artifact {address} (any more); run the pipeline again to build it anew, "
            "then export it"
        )
    return artifact


def _write(stream: BinaryIO, artifacts: Iterable[Artifact], blobs: dict[str, tuple[int, Path]]) -> None:
    tar = TarWriter(stream)
    for artifact in artifacts:
        tar.add_bytes(manifest_name(artifact.manifest.address), artifact.manifest.to_json())
    with progress_bar("exporting", sum(size for size, _ in blobs.values())) as advance:
        for sha256, (size_bytes, path) in sorted(blobs.items()):
            with path.open("rb") as source:
                found = tar.add_stream(blob_name(sha256), source, size_bytes, advance)
            if found != sha256:
                raise CorruptArtifactError(f"{path} has changed as it was exported: sha256 {found}, not {sha256}")
    tar.finish()


class _Incoming:
    """A tar file's manifests, and its blobs as files in a staging folder. Each is known to be what its name says."""

    def __init__(self, file: Path, stream: BinaryIO, folder: Path) -> None:
        self._file = file
        self._folder = folder
        self._seen: set[str] = set()
        found: list[Manifest] = []
        folder.mkdir()
        with progress_bar("importing", os.fstat(stream.fileno()).st_size) as advance:
            tar = TarReader(stream, file)
            for name, size_bytes in tar:
                if blob := _BLOB.fullmatch(name):
                    self._once(name)
                    self._take_blob(tar, blob[2], advance)
                elif manifest := _MANIFEST.fullmatch(name):
                    self._once(name)
                    found.append(self._take_manifest(tar, manifest[1], size_bytes))
                else:
                    raise self._refused(f"it holds {name!r}, and nothing but blobs and manifests is taken")
        self._check_complete(found)
        # What others were made from comes first, so that none is there without its inputs for long.
        self.manifests = sorted(found, key=lambda manifest: (manifest.created, manifest.address))

    def lay_out(self, manifest: Manifest, folder: Path) -> None:
        """Make the artifact's folder, and compare every file in it, and every piece, with the manifest."""
        for path, entry in manifest.files.items():
            target = folder / path
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                _link_or_copy(self._folder / entry.sha256, target)
            except (FileExistsError, NotADirectoryError) as error:
                raise self._refused(f"{manifest.address}: {path} is a file and a folder in one") from error
        try:
            sealed = seal(folder)
        except StoreError as fault:
            raise self._refused(f"{manifest.address}: {fault}") from fault
        wrong = [path for path, entry in manifest.files.items() if sealed.get(path) != entry]
        if wrong or len(sealed) != len(manifest.files):
            raise self._refused(f"{manifest.address}: size or pieces of {', '.join(wrong)} differ from the manifest")

    def _take_blob(self, tar: TarReader, sha256: str, advance: Callable[[float], None]) -> None:
        digest = hashlib.sha256()
        with (self._folder / sha256).open("xb") as target:
            for chunk in tar.chunks():
                digest.update(chunk)
                target.write(chunk)
                advance(len(chunk))
        if digest.hexdigest() != sha256:
            raise self._refused(f"blob {sha256} is damaged: its sha256 is {digest.hexdigest()}")

    def _take_manifest(self, tar: TarReader, address: str, size_bytes: int) -> Manifest:
        if size_bytes > _LARGEST_MANIFEST:
            raise self._refused(f"{manifest_name(address)} has {size_bytes} bytes, more than any manifest")
        try:
            return parse_manifest(b"".join(tar.chunks()), address)
        except CorruptArtifactError as fault:
            raise self._refused(str(fault)) from fault

    def _check_complete(self, manifests: Iterable[Manifest]) -> None:
        wanted = {entry.sha256: manifest for manifest in manifests for entry in manifest.files.values()}
        there = {name.rpartition("/")[2] for name in self._seen if _BLOB.fullmatch(name)}
        for sha256 in sorted(wanted.keys() - there):
            raise self._refused(f"blob {sha256} of {wanted[sha256].address} is missing from it")
        for sha256 in sorted(there - wanted.keys()):
            raise self._refused(f"blob {sha256} belongs to no manifest in it")
        if not wanted:
            raise self._refused("it holds no artifact")

    def _once(self, name: str) -> None:
        if name in self._seen:
            raise self._refused(f"it holds {name} twice")
        self._seen.add(name)

    def _refused(self, why: str) -> StoreError:
        return StoreError(f"{self._file} is not imported: {why}; export it again, and nothing of it was published")


def _publish(store: Store, found: Iterable[tuple[Manifest, Path]]) -> list[Manifest]:
    """Publish what is not there yet, as a producer does; returns these."""
    with ExitStack() as leases:
        held: list[tuple[Manifest, Path, HeldLease]] = []
        for manifest, folder in found:
            name = manifest.address.removeprefix(f"{VERSION}/")
            lease = leases.enter_context(store.leases.attempt(name, manifest.inputs))
            if lease is None:
                raise StoreError(
                    f"{_name(manifest)} is being built for {store.location} at this moment, so nothing was imported; "
                    "wait for it, then import again"
                )
            if not _is_there(store, manifest):
                held.append((manifest, folder, lease))
        for manifest, _, lease in held:
            lease.intend(manifest)
        # Said before it is asked, as in a build: a collection that began since does not know of these.
        store.leases.wait_while_held(GC_LEASE, "import: garbage is being collected")
        for manifest, folder, _ in held:
            store.backend.send(folder, manifest.files, BLOBS)
        for manifest, _, lease in held:
            lease.commit()
            finish(store.backend, manifest)
            lease.done()
    return [manifest for manifest, _, _ in held]


def _is_there(store: Store, manifest: Manifest) -> bool:
    try:
        return store.manifest_at(manifest.address) is not None
    except CorruptArtifactError as fault:
        raise StoreError(
            f"{store.location}: {fault}; nothing was imported; `qlora store verify --repair` moves it out of the way"
        ) from fault


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        shutil.copyfile(source, target)


def _name(manifest: Manifest) -> str:
    return f"{manifest.stage}/{manifest.key}"
