"""Sources that are not on this machine, made into local files: objects in S3 and data sets of the Hugging Face hub.

Object storage is reached through what the caller hands in (`Objects`). No code of a data set is ever run. Rows are not
looked at: a fetched file is recognised by its content like any other.
"""

import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from qlora_core.data.source_files import DATA_SUFFIXES
from qlora_core.digest import digest_bytes
from qlora_core.errors import DataError

S3_SCHEME = "s3://"
HUB_SCHEME = "hf://"
_HUB_FORM = "hf://owner/name@<commit of 40 hex digits>, or that with :split or :config/split behind it"
_HUB = re.compile(
    r"(?P<name>[\w.-]+/[\w.-]+)@(?P<revision>[0-9a-f]{40})(?::(?:(?P<config>[\w.-]+)/)?(?P<split>[\w.-]+))?"
)


class Objects(Protocol):
    """Object storage, as far as sources need it."""

    def list(self, bucket: str, prefix: str) -> Sequence[str]:
        """The keys under a prefix, sorted."""
        ...

    def fetch(self, bucket: str, key: str, path: Path) -> None:
        """Write an object to a file, whole or not at all."""
        ...


@dataclass(frozen=True, slots=True)
class HubName:
    """A data set of the hub at one commit; without `split`, all of them."""

    name: str
    revision: str
    config: str | None
    split: str | None


def is_remote(source: str) -> bool:
    """Whether a source of the config lies elsewhere."""
    return source.startswith((S3_SCHEME, HUB_SCHEME))


def localize_sources(
    sources: Sequence[str], folder: Path, config_path: Callable[[str], Path], objects: Callable[[], Objects]
) -> list[Path]:
    """A local path for every source, in order; remote ones are fetched into `folder` first.

    `config_path` makes a local source a path; `objects` is called once something in S3 is named. `s3://bucket/key` is
    that object; if there is none, it is the folder `s3://bucket/key/`, of which the objects with a suffix of a dataset
    (`DATA_SUFFIXES`) are fetched. A fetched source lies in a folder of its own, which has a name that depends on
    the source alone and is filled anew; its files keep their names.

    Raises DataError for a source that is not understood, is not there, or cannot be loaded; StoreError, from `objects`,
    where S3 does not answer.
    """
    store: Objects | None = None
    paths: list[Path] = []
    for source in sources:
        place = folder / digest_bytes(source.encode())[:16]
        if place.exists():
            shutil.rmtree(place)
        if source.startswith(S3_SCHEME):
            store = store or objects()
            paths.append(_fetch(store, source, place))
        elif source.startswith(HUB_SCHEME):
            paths.append(_load_hub(parse_hub_name(source), place))
        else:
            paths.append(config_path(source))
    return paths


def parse_hub_name(source: str) -> HubName:
    """The parts of `hf://owner/name@commit:config/split`. Raises DataError for any other text, a branch above all."""
    found = _HUB.fullmatch(source.removeprefix(HUB_SCHEME))
    if found is None:
        raise DataError(
            f"data source {source!r} is not understood; allowed is {_HUB_FORM}. The commit is on the data set's page "
            "under Files, History: a branch would give other rows tomorrow"
        )
    return HubName(found["name"], found["revision"], found["config"], found["split"])


def _fetch(objects: Objects, source: str, place: Path) -> Path:
    bucket, _, key = source.removeprefix(S3_SCHEME).partition("/")
    if not bucket:
        raise DataError(f"data source {source!r} names no bucket; give s3://bucket/key or s3://bucket/folder/")
    if key and not key.endswith("/") and key in objects.list(bucket, key):
        path = place / _checked(source, PurePosixPath(key).name)
        path.parent.mkdir(parents=True, exist_ok=True)
        objects.fetch(bucket, key, path)
        return path
    prefix = f"{key.rstrip('/')}/" if key else ""
    inner = [found.removeprefix(prefix) for found in objects.list(bucket, prefix)]
    chosen = [name for name in inner if name.lower().endswith(DATA_SUFFIXES)]
    if not chosen:
        raise DataError(
            f"data source {source!r}: there is no such object, and no dataset file ({', '.join(DATA_SUFFIXES)}) under "
            f"{S3_SCHEME}{bucket}/{prefix}; {len(inner)} other objects are there. Correct the name, or put one there"
        )
    root = place / (PurePosixPath(prefix).name or bucket)
    for name in chosen:
        path = root / _checked(source, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        objects.fetch(bucket, prefix + name, path)
    return root


def _checked(source: str, name: str) -> str:
    """A key may hold what leads out of a folder, or what no file system takes. Raises DataError for one that does."""
    parts = name.split("/")
    if any(part in ("", ".", "..") or "\0" in part or "\\" in part for part in parts):
        raise DataError(f"data source {source!r}: the key {name!r} is no name for a file. Rename the object")
    return name


def _load_hub(hub: HubName, place: Path) -> Path:
    if Path(hub.name).exists():
        # The library would read this folder in place of the hub's data set, whatever the commit.
        raise DataError(
            f"data source {HUB_SCHEME}{hub.name}: a folder of that name lies in the current folder and would be read "
            "instead. Name the folder itself in data.sources, or run from elsewhere"
        )
    root = place / PurePosixPath(hub.name).name
    root.mkdir(parents=True, exist_ok=True)
    for split, rows in _hub_splits(hub).items():
        rows.to_parquet(root / f"{_checked(hub.name, split)}.parquet")
    return root


def _hub_splits(hub: HubName) -> dict[str, Any]:
    import datasets  # seconds to import

    label = f"{HUB_SCHEME}{hub.name}@{hub.revision}"
    try:
        loaded: Any = datasets.load_dataset(hub.name, hub.config, split=hub.split, revision=hub.revision)
    except Exception as error:
        # Its faults have no common root: they come from the network, three libraries below it, and the files.
        raise DataError(
            f"data source {label} cannot be loaded: {type(error).__name__}: {error}. Check the name, commit, config "
            "and split, the network, HF_HUB_OFFLINE, and HF_TOKEN for a private one; or download it and name the files"
        ) from error
    return {hub.split: loaded} if hub.split else dict(loaded)
