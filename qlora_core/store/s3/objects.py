"""Objects that others put into a bucket, to be read as they are. Knows nothing of stores and their layout."""

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from qlora_core.errors import StoreError
from qlora_core.store.s3.client import S3Client
from qlora_core.store.s3.outcome import Outcome, Refused
from qlora_core.store.s3.stream import ObjectStream

_CONNECT_TIMEOUT_S = 5.0
_READ_TIMEOUT_S = 60.0
_DEADLINE_S = 120.0


class SeenObject(NamedTuple):
    """An object as a listing shows it."""

    key: str
    size_bytes: int
    etag: str


class S3Objects:
    """Any bucket that boto3's credentials open. Connects when something is asked for.

    Every method raises StoreError in words where the bucket or the way to it is at fault.
    """

    def __init__(self, *, deadline_s: float = _DEADLINE_S) -> None:
        self._deadline_s = deadline_s
        self._client = lru_cache(maxsize=None)(self._new_client)

    def list(self, bucket: str, prefix: str) -> list[str]:
        """The keys under a prefix, sorted; those that end with a slash, which stand for folders, are left out."""
        return [found.key for found in self.look(bucket, prefix)]

    def look(self, bucket: str, prefix: str) -> Sequence[SeenObject]:
        """What `list` lists, with size and ETag: an object written anew has another ETag, and nothing is read."""
        seen: list[SeenObject] = []
        marker: dict[str, Any] = {}
        while True:
            page = self._client(bucket).ask("list_objects_v2", Prefix=prefix, **marker)
            seen += [
                SeenObject(found["Key"], found["Size"], found["ETag"].strip('"'))
                for found in page.get("Contents", [])
                if not found["Key"].endswith("/")
            ]
            if not page.get("IsTruncated"):
                return sorted(seen)
            marker = {"ContinuationToken": page["NextContinuationToken"]}

    def fetch(self, bucket: str, key: str, path: Path) -> None:
        """Write an object to `path`, which holds it whole or is left as it was. Its folder must exist.

        Raises StoreError if there is no such object or if it is replaced while it is read.
        """
        client = self._client(bucket)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            with partial.open("wb") as file:
                ObjectStream(client, key, client.patience()).into(file.write)
            partial.replace(path)
        except Refused as no:
            what = "there is no such object" if no.outcome is Outcome.MISSING else "it was replaced while it was read"
            raise StoreError(f"s3://{bucket}/{key}: {what}; check the name, then run the same command again") from no
        except OSError as error:
            if isinstance(error, StoreError):
                raise
            raise StoreError(f"s3://{bucket}/{key} cannot be written to {str(path)!r}: {error}; make room") from error
        finally:
            partial.unlink(missing_ok=True)

    def _new_client(self, bucket: str) -> S3Client:
        return S3Client(
            bucket,
            f"s3://{bucket}",
            connect_timeout_s=_CONNECT_TIMEOUT_S,
            read_timeout_s=_READ_TIMEOUT_S,
            deadline_s=self._deadline_s,
        )
