"""Small JSON documents under digests, written once: what was paid for once is found again by every machine.

Each document carries a digest over itself and its name. It does not know what the documents say.
"""

import json
import logging
from collections.abc import Iterable, Mapping
from typing import Any

from qlora_core.digest import digest_json
from qlora_core.errors import CorruptArtifactError, StoreError, StoreUnavailableError
from qlora_core.store.backend import Backend
from qlora_core.store.contents import in_parallel
from qlora_core.store.quarantine import set_record_aside

logger = logging.getLogger(__name__)

_READS_AT_ONCE = 8


class Shelf:
    """The documents of one kind, such as `layout.VERDICTS`, by 64 hex digits each. Safe for many processes at once."""

    def __init__(self, backend: Backend, kind: str) -> None:
        self._backend = backend
        self._kind = kind

    def put(self, digest: str, document: Mapping[str, Any]) -> None:
        """Keep a document of plain JSON data, durable on return. The first one under a digest stays."""
        body = {"sha256": digest_json([digest, dict(document)]), "document": dict(document)}
        self._backend.create(self._name(digest), json.dumps(body, sort_keys=True, allow_nan=False).encode())

    def get(self, digest: str) -> dict[str, Any] | None:
        """The document; None where there is none. A damaged one is logged by name, moved to quarantine, and None."""
        name = self._name(digest)
        record = self._backend.read(name)
        if record is None:
            return None
        try:
            return parse_document(record.data, name)
        except CorruptArtifactError as fault:
            logger.warning("%s: %s; it is moved to quarantine", self._backend.location, fault)
        try:
            set_record_aside(self._backend, name, record)
        except StoreUnavailableError:
            raise
        except StoreError as error:
            logger.warning("%s is not moved to quarantine: %s", name, error)
        return None

    def get_many(self, digests: Iterable[str]) -> dict[str, dict[str, Any]]:
        """The documents that are there, several read at once."""
        found: dict[str, dict[str, Any]] = {}

        def look(digest: str) -> None:
            document = self.get(digest)
            if document is not None:
                found[digest] = document

        in_parallel(look, dict.fromkeys(digests), at_once=_READS_AT_ONCE)
        return found

    def _name(self, digest: str) -> str:
        return f"{self._kind}/{digest[:2]}/{digest}.json"


def parse_document(data: bytes, name: str) -> dict[str, Any]:
    """The document found under `name`. Raises CorruptArtifactError for anything but a sound one of that name."""
    digest = name.rpartition("/")[2].removesuffix(".json")
    try:
        body = json.loads(data)
        if body["sha256"] == digest_json([digest, body["document"]]):
            return body["document"]
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise CorruptArtifactError(f"{name} is damaged")
