"""Which files a list of sources stands for. Knows nothing of what is in them."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_core.errors import DataError

logger = logging.getLogger(__name__)

_PLAIN_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
DATA_SUFFIXES = (*_PLAIN_SUFFIXES, *(f"{suffix}.gz" for suffix in _PLAIN_SUFFIXES))


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A dataset file. `name` says which one in reports and does not depend on the machine; `path` is where it lies."""

    name: str
    path: Path


def list_source_files(
    sources: Sequence[Path], *, announce: bool = False, setting: str = "data.sources"
) -> list[SourceFile]:
    """Every dataset file of `sources`, in their order; a folder gives its files (and its folders') sorted by name.

    In a folder only the suffixes in `DATA_SUFFIXES` count, and with `announce` what is passed over is logged; a file
    named directly is taken whatever its name. Hidden files and folders are left alone. A file reached twice is listed
    once. Names: a file's own, or `folder/inner/file.json`; a name already taken gets `#2`. `setting` says in messages
    which entry of the config lists `sources`.

    Raises DataError for a source that does not exist and for a folder without dataset files.
    """
    files: list[SourceFile] = []
    seen: set[Path] = set()
    taken: set[str] = set()
    for source in sources:
        for inner_name, path in _files_of(source, announce, setting):
            if path.resolve() in seen:
                if announce:
                    logger.info("%s is named by two sources; it is read once", inner_name)
                continue
            seen.add(path.resolve())
            name = _free_name(inner_name, taken)
            taken.add(name)
            files.append(SourceFile(name, path))
    return files


def _files_of(source: Path, announce: bool, setting: str) -> list[tuple[str, Path]]:
    if source.is_file():
        return [(source.name, source)]
    if not source.is_dir():
        raise DataError(
            f"{str(source)!r}, named in {setting}, does not exist. Relative paths there start at the folder of the "
            "config file; correct the path, or put the file there"
        )
    visible = sorted(
        (path.relative_to(source).as_posix(), path)
        for path in source.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(source).parts)
    )
    chosen = [(name, path) for name, path in visible if name.lower().endswith(DATA_SUFFIXES)]
    passed_over = [name for name, _ in visible if not name.lower().endswith(DATA_SUFFIXES)]
    if passed_over and announce:
        logger.info("in %s not read, because not named like a dataset: %s", source.name, ", ".join(passed_over))
    if not chosen:
        raise DataError(
            f"{str(source)!r}, named in {setting}, is a folder without dataset files ({', '.join(DATA_SUFFIXES)}). "
            f"Put one there, or name a file directly in {setting}"
        )
    return [(f"{source.resolve().name}/{name}", path) for name, path in chosen]


def _free_name(name: str, taken: set[str]) -> str:
    if name not in taken:
        return name
    number = 2
    while f"{name}#{number}" in taken:
        number += 1
    return f"{name}#{number}"
