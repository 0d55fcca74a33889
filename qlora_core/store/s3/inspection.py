"""What an object really holds, read in full and written nowhere."""

import hashlib

from qlora_core.errors import StoreUnavailableError
from qlora_core.store.contents import mismatch
from qlora_core.store.manifest import FileEntry
from qlora_core.store.s3.client import S3Client
from qlora_core.store.s3.outcome import Outcome, Refused
from qlora_core.store.s3.patience import Patience
from qlora_core.store.s3.stream import ObjectStream

_ATTEMPTS = 3


def inspect_blob(client: S3Client, key: str, entry: FileEntry, patience: Patience) -> tuple[str | None, str | None]:
    """What is wrong with a blob in words, None if it matches its entry; and its ETag, None if it is missing."""
    for _ in range(_ATTEMPTS):
        sha256, size_bytes = hashlib.sha256(), 0

        def consume(data: bytes, sha256: "hashlib._Hash" = sha256) -> None:
            nonlocal size_bytes
            sha256.update(data)
            size_bytes += len(data)

        try:
            etag = ObjectStream(client, key, patience).into(consume)
        except Refused as no:
            if no.outcome is Outcome.MISSING:
                return f"blob {entry.sha256} is missing", None
            continue  # it was replaced while it was read
        return mismatch(f"blob {entry.sha256}", entry, sha256.hexdigest(), size_bytes), etag
    raise StoreUnavailableError(
        f"{client.place}: {key} changes all the time; find out who writes there, then try again"
    )
