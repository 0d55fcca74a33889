"""What the sources of a config hold at the moment, without fetching them: how new data is noticed.

A local file is known by the digest of its bytes, an object in S3 by its size and ETag as the listing states them, a
data set of the hub by its name, which holds the commit. Rows are not looked at.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from qlora_core.data.remote_sources import HUB_SCHEME, S3_SCHEME, parse_hub_name
from qlora_core.data.source_files import DATA_SUFFIXES, list_source_files
from qlora_core.errors import DataError


class Seen(Protocol):
    """An object as a listing shows it."""

    @property
    def key(self) -> str:
        """Its key in the bucket."""
        ...

    @property
    def size_bytes(self) -> int:
        """Its size."""
        ...

    @property
    def etag(self) -> str:
        """Other bytes, another one."""
        ...


class Listing(Protocol):
    """Object storage, as far as it can be looked at."""

    def look(self, bucket: str, prefix: str) -> Sequence[Seen]:
        """The objects under a prefix, sorted by key."""
        ...


def fingerprint_sources(
    sources: Sequence[str],
    config_path: Callable[[str], Path],
    listing: Callable[[], Listing],
    digest: Callable[[Path], str],
    *,
    setting: str = "data.sources",
) -> dict[str, str]:
    """Every file of `sources` with what tells its content from any other; no sources give an empty mapping.

    The same files are meant as a run would read: of folders and prefixes those with a suffix of a dataset. A file that
    was added, removed, renamed or changed changes the mapping, and so does the order of the sources, which decides
    which of two like rows stays. `listing` is called once something in S3 is named. Raises DataError for a source that
    is not there, StoreError, from `listing`, where S3 does not answer.
    """
    found: dict[str, str] = {}
    store: Listing | None = None
    for number, source in enumerate(sources):
        if source.startswith(S3_SCHEME):
            store = store or listing()
            entries = _in_bucket(store, source)
        elif source.startswith(HUB_SCHEME):
            parse_hub_name(source)
            entries = {source: "pinned"}
        else:
            files = list_source_files([config_path(source)], setting=setting)
            entries = {file.name: f"sha256:{digest(file.path)}" for file in files}
        found |= {f"{number}/{name}": content for name, content in entries.items()}
    return found


def _in_bucket(store: Listing, source: str) -> dict[str, str]:
    bucket, _, key = source.removeprefix(S3_SCHEME).partition("/")
    if not bucket:
        raise DataError(f"data source {source!r} names no bucket; give s3://bucket/key or s3://bucket/folder/")
    if key and not key.endswith("/"):
        exact = [seen for seen in store.look(bucket, key) if seen.key == key]
        if exact:
            return {source: _content(exact[0])}
    prefix = f"{key.rstrip('/')}/" if key else ""
    chosen = [seen for seen in store.look(bucket, prefix) if seen.key.lower().endswith(DATA_SUFFIXES)]
    if not chosen:
        raise DataError(
            f"data source {source!r}: there is no such object, and no dataset file ({', '.join(DATA_SUFFIXES)}) under "
            f"{S3_SCHEME}{bucket}/{prefix}. Correct the name, or put one there"
        )
    return {f"{S3_SCHEME}{bucket}/{seen.key}": _content(seen) for seen in chosen}


def _content(seen: Seen) -> str:
    return f"etag:{seen.etag}:{seen.size_bytes}"
