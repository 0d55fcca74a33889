"""The body of an object as it comes: continued where it breaks, given up where it drips. Does not verify anything."""

import time
from collections.abc import Callable, Iterator
from typing import Any

from qlora_core.errors import StoreError
from qlora_core.store.s3.client import S3Client
from qlora_core.store.s3.explain import S3_FAULTS, SlowBodyError
from qlora_core.store.s3.outcome import Outcome, Refused
from qlora_core.store.s3.patience import Patience

_READ_BYTES = 256 << 10
_LEAST_PROGRESS_BYTES = 64 << 10

Consume = Callable[[bytes], object]


class ObjectStream:
    """The bytes of an object from `start`: `length` of them, or all.

    With `size_bytes`, an object of any other size is Refused with OTHER_SIZE before a byte is handed on.
    """

    def __init__(
        self,
        client: S3Client,
        key: str,
        patience: Patience,
        *,
        start: int = 0,
        length: int | None = None,
        size_bytes: int | None = None,
    ) -> None:
        self._client = client
        self._key = key
        self._patience = patience
        self._size_bytes = size_bytes
        self._ranged = length is not None
        self._at = start
        self._end = None if length is None else start + length
        self._etag: str | None = None

    def into(self, consume: Consume) -> str:
        """Hand on the bytes as they come; returns the object's ETag. Refused with CHANGED if it changes meanwhile."""
        attempt = 0
        while True:
            began_at = self._at
            try:
                return self._read_on(consume)
            except S3_FAULTS as error:
                attempt = 1 if self._at - began_at >= _LEAST_PROGRESS_BYTES else attempt + 1
                if not self._patience.pause(attempt):
                    self._client.fail("read", error)

    def _read_on(self, consume: Consume) -> str:
        answer = self._client.ask("get_object", self._patience, Key=self._key, **self._conditions())
        with answer["Body"] as raw:
            total = self._total_bytes(answer)
            if self._size_bytes is not None and total != self._size_bytes:
                raise Refused(Outcome.OTHER_SIZE)
            # From now on only this very object, so that two are never mixed.
            self._etag = answer["ETag"]
            self._end = total if self._end is None else self._end
            for chunk in self._chunks(raw):
                consume(chunk)
                self._at += len(chunk)
        if self._at != self._end:
            raise SlowBodyError(f"the answer ended {self._end - self._at} bytes early")
        self._patience.moved()
        return answer["ETag"]

    def _chunks(self, raw: Any) -> Iterator[bytes]:
        since, moved = time.monotonic(), 0
        # Not through botocore's reader, which waits for whole chunks: an answer that drips would never end.
        while chunk := raw.read1(_READ_BYTES):
            yield chunk
            moved += len(chunk)
            if moved >= _LEAST_PROGRESS_BYTES:
                since, moved = time.monotonic(), 0
                self._patience.moved()
            if self._patience.is_out or time.monotonic() - since > self._client.read_timeout_s:
                raise SlowBodyError(f"only {moved} bytes came in {time.monotonic() - since:.1f} s")

    @property
    def _is_partial(self) -> bool:
        return self._ranged or self._at > 0

    def _conditions(self) -> dict[str, str]:
        conditions = {"IfMatch": self._etag} if self._etag else {}
        if self._is_partial:
            conditions["Range"] = f"bytes={self._at}-{'' if self._end is None else self._end - 1}"
        return conditions

    def _total_bytes(self, answer: dict[str, Any]) -> int:
        if not self._is_partial:
            return int(answer["ContentLength"])
        if "ContentRange" not in answer:
            raise StoreError(
                f"{self._client.place} ignores the header `Range`; use another server, or a folder as store"
            )
        return int(answer["ContentRange"].rpartition("/")[2])
