"""What a store needs of the place where it keeps things: small records with conditional writes, and blobs by content.

Everything else (artifacts, leases, pins, garbage collection) is written once, on top of this protocol. Adding a place
means writing it once more, and passing `tests/qlora_core/store`.

*Names* are relative, with `/`, as in `layout`. *Records* are small documents under a name. *Blobs* are files named by
their SHA-256 in an *area* (`layout.BLOBS`, shared by all artifacts, or one of a piece of work in progress).
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol

from qlora_core.errors import StoreError
from qlora_core.store.manifest import FileEntry, inside_path
from qlora_core.store.pool import BlobPool


@dataclass(frozen=True)
class Record:
    """A record's bytes, and the tag that a conditional write of it names. Equal tags mean equal bytes."""

    data: bytes
    tag: str


@dataclass(frozen=True)
class Listed:
    """One thing in a listing, record or blob. `modified` is by the clock of the place."""

    name: str
    size_bytes: int
    modified: datetime


def is_name(text: str) -> bool:
    """Whether a name read from outside leads to something inside the store."""
    try:
        inside_path(text)
    except ValueError:
        return False
    return True


def checked_name(name: str) -> str:
    """`name`, if it leads to something inside the store. Raises StoreError for any other."""
    if not is_name(name):
        raise StoreError(
            f"{name!r} is no name in a store: relative, with /, without . or .. or odd characters; remove what has "
            "that name with the tools of the place itself"
        )
    return name


class Backend(Protocol):
    """A place for records and blobs. Failures are StoreError with a next step; outages StoreUnavailableError.

    A name that would lead out of the store is refused with StoreError, and left out of listings.
    """

    @property
    def location(self) -> str:
        """The place as a user would write it."""
        ...

    @property
    def pool(self) -> BlobPool:
        """The blobs of this place that are on this machine, and the folders made of them."""
        ...

    @property
    def pool_is_copies(self) -> bool:
        """Whether the pool holds copies of what is kept elsewhere, so that nothing is lost with them."""
        ...

    def read(self, name: str) -> Record | None:
        """The record; None where there is none."""
        ...

    def create(self, name: str, data: bytes) -> str | None:
        """Write a record where none is: its tag, or None if the name is taken. Durable on return."""
        ...

    def replace(self, name: str, data: bytes, tag: str) -> str | None:
        """Overwrite a record that still has `tag`: the new tag, or None if it was changed or removed meanwhile."""
        ...

    def remove(self, name: str, tag: str | None = None) -> bool:
        """Delete a record or blob, with `tag` only if it is unchanged; False if it was changed or is not there."""
        ...

    def list(self, prefix: str) -> Iterator[Listed]:
        """Everything whose name starts with `prefix` (which ends in `/`), sorted by name."""
        ...

    def staging(self) -> AbstractContextManager[Path]:
        """An empty folder to build in; however the block ends, what is left of it is removed."""
        ...

    def send(self, folder: Path, files: Mapping[str, FileEntry], area: str) -> None:
        """Store sealed files of a staging folder as blobs in `area`; what is there already is not sent.

        The folder may be emptied by it. Each blob is visible whole or not at all.
        """
        ...

    def fetch(self, entries: Iterable[FileEntry], area: str) -> None:
        """Bring blobs into `pool`, each compared with its entry during this very call.

        Raises CorruptArtifactError naming the digest of each blob that is missing or wrong, here and at the place
        itself; a wrong one is moved to quarantine first, so that it is sent anew when its artifact is rebuilt.
        """
        ...

    def read_range(self, entry: FileEntry, offset: int, length: int, area: str) -> bytes:
        """`length` bytes of a blob from `offset`, without fetching the rest; whole pieces are read and verified.

        Raises CorruptArtifactError where a piece does not match `entry.pieces`, StoreError for a range outside it.
        """
        ...

    def blob_fault(self, entry: FileEntry, area: str) -> str | None:
        """What is wrong with a blob at the place itself, read in full: None if it matches its entry."""
        ...

    def set_aside(self, name: str) -> None:
        """Move a record or blob to quarantine: it becomes a miss and can be looked at. Nothing there: no effect."""
        ...

    def sweep_leftovers(self, older_than_s: float) -> int:
        """Remove what the dead left unfinished and no listing shows, if it is older; returns how many things went.

        What may be a living process's stays, however old.
        """
        ...

    def check(self) -> None:
        """Prove that things can be written, read and removed here, and that conditional writes are honoured.

        Leaves nothing behind. Raises StoreError naming the place and what it does wrong.
        """
        ...
