"""What everything on its way into a bucket has in common: what goes where, with which digest, under whose patience."""

import logging
from base64 import b64encode
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from qlora_core.store.manifest import FileEntry
from qlora_core.store.s3.client import S3Client
from qlora_core.store.s3.outcome import Outcome, Refused
from qlora_core.store.s3.patience import Patience

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Blob:
    """A file, and the key it is to be stored under."""

    key: str
    file: Path
    entry: FileEntry


@dataclass(frozen=True)
class Sending:
    """One operation that sends blobs. `encryption` are parameters of every write; `again` is to be sent once more."""

    client: S3Client
    encryption: Mapping[str, str]
    patience: Patience
    advance: Callable[[float], None]
    again: list[Blob] = field(default_factory=list)

    def is_there(self, blob: Blob) -> bool:
        """Whether an object of the blob's size is at its key, and of its digest where the server keeps that."""
        try:
            answer = self.client.ask("head_object", self.patience, Key=blob.key, ChecksumMode="ENABLED")
        except Refused as no:
            if no.outcome is not Outcome.MISSING:
                raise
            return False
        told = answer.get("ChecksumSHA256", "")
        # That of an object in parts is over the digests of its parts, and says so.
        is_whole = told and "-" not in told and answer.get("ChecksumType", "FULL_OBJECT") == "FULL_OBJECT"
        if is_whole and not blob.entry.pieces and told != in_base64(blob.entry.sha256):
            logger.warning("%s: %s is not what its name says; it is sent anew", self.client.place, blob.key)
            return False
        return answer["ContentLength"] == blob.entry.size_bytes


def checksum(sha256: str) -> dict[str, str]:
    """The parameters by which the server compares what arrives with its digest."""
    # Some servers look at the digest only where the algorithm is named as well.
    return {"ChecksumAlgorithm": "SHA256", "ChecksumSHA256": in_base64(sha256)}


def in_base64(sha256: str) -> str:
    """A digest as S3 writes it."""
    return b64encode(bytes.fromhex(sha256)).decode()
