"""The files of an artifact's folder: listing, hashing, verifying, bringing them to disk. Knows no store layout."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TypeVar

from qlora_core.digest import digest_file
from qlora_core.errors import StoreError
from qlora_core.store.manifest import PIECE_BYTES, FileEntry, inside_path

Name = TypeVar("Name")

SYNCS_AT_ONCE = 16
_BLOCK_BYTES = 256 << 10

# What may cross from one stage to the next. Nothing here can carry code; `.model` and `.tiktoken` are vocabularies.
ALLOWED_SUFFIXES = frozenset(
    {".safetensors", ".json", ".jsonl", ".parquet", ".csv", ".tsv", ".yaml", ".txt", ".md", ".html", ".jinja"}
    | {".model", ".tiktoken", ".svg", ".png"}
)
ALLOWED_NAMES = frozenset({"LICENSE", "NOTICE", "README"})


def seal(folder: Path) -> dict[str, FileEntry]:
    """Hash every file under `folder` and bring all to disk; returns the entries by path, sorted.

    Empty folders are removed, since a manifest cannot hold them. Raises StoreError for an empty artifact and for files
    that must not be published: pickles, unknown kinds, links, names that other systems cannot hold.
    """
    files = dict(sorted(list_files(folder)))
    if not files:
        raise StoreError("the stage wrote no files, and an empty artifact would hide that; nothing was stored")
    for path, file in files.items():
        _check_publishable(path, file)
    entries: dict[str, FileEntry] = {}

    def hash_file(path: str) -> None:
        entries[path] = fingerprint(files[path])

    # The disk writes while the processor hashes, and takes many small files in one go.
    with ThreadPoolExecutor(max_workers=SYNCS_AT_ONCE, thread_name_prefix="sync") as disk:
        synced = [disk.submit(sync_to_disk, file) for file in files.values()]
        in_parallel(hash_file, files, at_once=os.cpu_count() or 1)
        for one in synced:
            one.result()
    for parent, _, _ in os.walk(folder, topdown=False):
        if parent != str(folder) and not any(Path(parent).iterdir()):
            Path(parent).rmdir()
        else:
            sync_to_disk(Path(parent))
    return dict(sorted(entries.items()))


def fingerprint(file: Path) -> FileEntry:
    """Size, SHA-256 and, for a file longer than a piece, the SHA-256 of every piece; the file is read once."""
    size_bytes = file.stat().st_size
    if size_bytes <= PIECE_BYTES:
        return FileEntry(sha256=digest_file(file), size_bytes=size_bytes)
    whole, piece, pieces, left = hashlib.sha256(), hashlib.sha256(), [], PIECE_BYTES
    # Small enough to be in the processor's cache still when it is hashed for the second time.
    block = memoryview(bytearray(_BLOCK_BYTES))
    with file.open("rb", buffering=0) as stream:
        while count := stream.readinto(block[:left]):
            whole.update(block[:count])
            if pieces:  # the first piece is what the whole begins with
                piece.update(block[:count])
            left -= count
            if left == 0:
                pieces.append((piece if pieces else whole).hexdigest())
                piece, left = hashlib.sha256(), PIECE_BYTES
    if left < PIECE_BYTES:
        pieces.append(piece.hexdigest())
    return FileEntry(sha256=whole.hexdigest(), size_bytes=size_bytes, pieces=tuple(pieces))


def file_fault(path: str, file: Path, entry: FileEntry) -> str | None:
    """What is wrong with one file: None if its size and SHA-256 are those of `entry`."""
    if file.is_symlink():
        return f"{path} is a link"
    try:
        size_bytes, sha256 = file.stat().st_size, digest_file(file)
    except FileNotFoundError:
        return f"{path} is missing"
    except IsADirectoryError:
        return f"{path} is a folder"
    return mismatch(path, entry, sha256, size_bytes)


def mismatch(path: str, entry: FileEntry, sha256: str, size_bytes: int) -> str | None:
    """How the found digest and size differ from the expected ones, in words; None if they do not."""
    if (sha256, size_bytes) == (entry.sha256, entry.size_bytes):
        return None
    return (
        f"{path}: expected sha256 {entry.sha256} ({entry.size_bytes} bytes), found sha256 {sha256} ({size_bytes} bytes)"
    )


def list_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Every entry under `folder` that is not a folder, by its path with /. Links are listed, never followed.

    What vanishes meanwhile is left out; a folder that cannot be read raises OSError.
    """
    for parent, subfolders, names in os.walk(folder, followlinks=False, onerror=_raise_unless_gone):
        links = [name for name in subfolders if (Path(parent) / name).is_symlink()]
        for name in [*names, *links]:
            file = Path(parent) / name
            yield file.relative_to(folder).as_posix(), file


def in_parallel(work: Callable[[Name], None], names: Iterable[Name], *, at_once: int) -> None:
    """`work` on every name, several at once; the first error cancels what has not begun and is raised."""
    pool = ThreadPoolExecutor(max_workers=at_once, thread_name_prefix="store")
    try:
        for done in as_completed([pool.submit(work, name) for name in names]):
            done.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def sync_to_disk(path: Path) -> None:
    """Return only when the file or folder `path` would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _raise_unless_gone(error: OSError) -> None:
    # A listing that is silently short would make garbage of what it left out.
    if not isinstance(error, FileNotFoundError):
        raise error


def _check_publishable(path: str, file: Path) -> None:
    try:
        inside_path(path)
    except ValueError as error:
        raise StoreError(f"the stage wrote a file that cannot be stored: {error}") from error
    if file.is_symlink() or not file.is_file():
        raise StoreError(f"the stage wrote {path}, which is no regular file; write its content instead of a link to it")
    if file.name not in ALLOWED_NAMES and file.suffix.lower() not in ALLOWED_SUFFIXES:
        allowed = " ".join(sorted(ALLOWED_SUFFIXES))
        raise StoreError(
            f"the stage wrote {path}, which must not be stored: pickles and unknown kinds of files can run code when "
            f"they are loaded; allowed are {allowed}"
        )
