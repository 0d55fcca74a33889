"""Tag segments in a store, so that every machine finds what one of them has tagged. Knows nothing of their content.

They lie beside artifacts, in `layout.TAGS`: garbage collection, which goes by manifests, neither needs nor touches
them. A tagger that changed has another fingerprint, under which nothing is yet. Whatever lies there can be removed at
any time, at the price of tagging anew.
"""

import logging

from qlora_core.digest import digest_bytes
from qlora_core.errors import CorruptArtifactError, StoreError, StoreUnavailableError
from qlora_core.store.backend import Backend, Record
from qlora_core.store.layout import TAGS
from qlora_core.store.quarantine import set_record_aside

logger = logging.getLogger(__name__)


class StoreTagShelf:
    """The segments of a store, as `qlora_core.data.tags.cache.SegmentShelf` wants them. Safe for many processes."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    @property
    def location(self) -> str:
        """The store's place."""
        return self._backend.location

    def sizes(self, fingerprint: str) -> dict[str, int]:
        """By a listing of the place."""
        prefix = f"{TAGS}/{fingerprint}/"
        return {each.name.removeprefix(prefix): each.size_bytes for each in self._backend.list(prefix)}

    def read(self, fingerprint: str, name: str) -> bytes | None:
        """The record's bytes."""
        record = self._backend.read(_name(fingerprint, name))
        return None if record is None else record.data

    def write(self, fingerprint: str, name: str, data: bytes) -> None:
        """Write the record where none is."""
        self._backend.create(_name(fingerprint, name), data)

    def remove(self, fingerprint: str, name: str) -> None:
        """Delete the record."""
        self._backend.remove(_name(fingerprint, name))

    def set_aside(self, fingerprint: str, name: str) -> None:
        """Move the record to quarantine; where nothing can be written there it stays, and that is logged."""
        whole = _name(fingerprint, name)
        record = self._backend.read(whole)
        if record is None:
            return
        try:
            set_record_aside(self._backend, whole, record)
        except StoreUnavailableError:
            raise
        except StoreError as error:
            logger.warning("%s is not moved to quarantine: %s", whole, error)


def check_segment(record: Record, name: str) -> None:
    """Raises CorruptArtifactError unless the record has the digest that its name says."""
    if digest_bytes(record.data) != name.rpartition("/")[2].partition(".")[0]:
        raise CorruptArtifactError(f"{name} is damaged")


def _name(fingerprint: str, name: str) -> str:
    return f"{TAGS}/{fingerprint}/{name}"
