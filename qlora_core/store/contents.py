"""The files of an artifact's folder: listing, hashing, verifying, bringing them to disk. Knows no store layout."""

import os
from collections.abc import Iterator
from pathlib import Path

from qlora_core.digest import digest_file
from qlora_core.errors import CorruptArtifactError, StoreError
from qlora_core.store.manifest import FileEntry, Manifest, inside_path

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
    entries = {
        path: FileEntry(sha256=digest_file(file), size_bytes=file.stat().st_size) for path, file in files.items()
    }
    for file in files.values():
        sync_to_disk(file)
    for parent, _, _ in os.walk(folder, topdown=False):
        if parent != str(folder) and not any(Path(parent).iterdir()):
            Path(parent).rmdir()
        else:
            sync_to_disk(Path(parent))
    return entries


def verify(folder: Path, manifest: Manifest) -> None:
    """Compare every file under `folder` with the manifest, sizes and SHA-256s.

    Raises CorruptArtifactError naming each file that is missing, changed, or not in the manifest. A file nobody
    published is as wrong as a changed one: loaders look for files by name.
    """
    found = dict(list_files(folder)) if folder.is_dir() else {}
    faults = [f"{path} is not in the manifest" for path in sorted(found.keys() - manifest.files.keys())]
    for path, entry in manifest.files.items():
        fault = f"{path} is missing" if path not in found else file_fault(path, found[path], entry)
        if fault:
            faults.append(fault)
    if faults:
        raise CorruptArtifactError(f"{manifest.address}: {'; '.join(faults)}")


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
    """Every entry under `folder` that is not a folder, by its path with /. Links are listed, never followed."""
    for parent, subfolders, names in os.walk(folder, followlinks=False):
        links = [name for name in subfolders if (Path(parent) / name).is_symlink()]
        for name in [*names, *links]:
            file = Path(parent) / name
            yield file.relative_to(folder).as_posix(), file


def sync_to_disk(path: Path) -> None:
    """Return only when the file or folder `path` would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
