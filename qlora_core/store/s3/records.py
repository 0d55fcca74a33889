"""Small objects with conditional writes: what a store keeps apart its writers by. Does not know what they say."""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from qlora_core.digest import digest_bytes
from qlora_core.errors import StoreUnavailableError
from qlora_core.store.backend import Listed, Record, checked_name, is_name
from qlora_core.store.s3.client import S3Client
from qlora_core.store.s3.outcome import Outcome, Refused
from qlora_core.store.s3.sending import checksum
from qlora_core.store.s3.stream import ObjectStream

logger = logging.getLogger(__name__)

_READ_ATTEMPTS = 3


class S3Records:
    """The objects under a prefix, by their names without it. A record's tag is its ETag."""

    def __init__(self, client: S3Client, prefix: str, encryption: Mapping[str, str]) -> None:
        self._client = client
        self._prefix = prefix
        self._encryption = encryption

    def read(self, name: str) -> Record | None:
        """The object's bytes, in one request."""
        key = self._prefix + checked_name(name)
        for _ in range(_READ_ATTEMPTS):
            chunks: list[bytes] = []
            try:
                tag = ObjectStream(self._client, key, self._client.patience()).into(chunks.append)
            except Refused as no:
                if no.outcome is Outcome.MISSING:
                    return None
                continue  # it was replaced while it was read
            return Record(b"".join(chunks), tag)
        raise StoreUnavailableError(f"{self._client.place}: {name} changes all the time; run the same command again")

    def create(self, name: str, data: bytes) -> str | None:
        """Write an object where none is."""
        return self._write(name, data, IfNoneMatch="*")

    def replace(self, name: str, data: bytes, tag: str) -> str | None:
        """Overwrite an object that still has this ETag."""
        return self._write(name, data, IfMatch=tag)

    def remove(self, name: str, tag: str | None = None) -> bool:
        """Delete an object, with `tag` only if it still has this ETag."""
        key = self._prefix + checked_name(name)
        try:
            found = self._client.ask("head_object", Key=key)
            if tag is not None and found["ETag"] != tag:
                return False
            # A server that ignores `If-Match` here also deletes what is written between these two requests. AWS does
            # not; a probe could not tell, since the first request alone answers right.
            self._client.ask("delete_object", Key=key, **({"IfMatch": tag} if tag is not None else {}))
        except Refused as no:
            # Gone by our own hand, if an earlier try had its effect and its answer was lost.
            return no.uncertain and self.read(name) is None
        return True

    def list(self, prefix: str) -> Iterator[Listed]:
        """Everything under a prefix, sorted by name. Others may have put keys there that are no names in a store."""
        marker: dict[str, Any] = {}
        while True:
            page = self._client.ask("list_objects_v2", Prefix=self._prefix + prefix, **marker)
            for found in page.get("Contents", []):
                name = found["Key"].removeprefix(self._prefix)
                if is_name(name):
                    yield Listed(name, found["Size"], found["LastModified"])
                else:
                    logger.warning("%s: the key %r is no name in a store and left alone", self._client.place, name)
            if not page.get("IsTruncated"):
                return
            marker = {"ContinuationToken": page["NextContinuationToken"]}

    def _write(self, name: str, data: bytes, **condition: str) -> str | None:
        key, sum_ = self._prefix + checked_name(name), checksum(digest_bytes(data))
        try:
            return self._client.ask("put_object", Key=key, Body=data, **sum_, **condition, **self._encryption)["ETag"]
        except Refused as no:
            if no.outcome is Outcome.MISSING:
                return None
        # The write that is in the way may be this very one: its answer was lost, and it was sent again.
        found = self.read(name)
        return found.tag if found is not None and found.data == data else None
