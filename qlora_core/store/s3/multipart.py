"""One large file on its way into a bucket, a part for each of its pieces; what a killed upload has left is continued.

The parts of an unfinished upload are on the server, which says what they hold: by the SHA-256 that stands in the file's
entry, or where a server keeps none, by the MD5 in the part's ETag. Whoever uploads the same blob at the same time sends
the same bytes, so that it does not matter whose part or whose completion is first.
"""

import hashlib
import logging
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from qlora_core.errors import StoreError, StoreUnavailableError
from qlora_core.store.manifest import PIECE_BYTES
from qlora_core.store.s3.body import FileSlice
from qlora_core.store.s3.outcome import Outcome, Refused
from qlora_core.store.s3.sending import Blob, Sending, checksum, in_base64
from qlora_core.store.s3.unfinished import abort_upload, list_parts, list_uploads

logger = logging.getLogger(__name__)

_MOST_PARTS = 10_000


class MultipartUpload:
    """The upload of one blob."""

    def __init__(self, sending: Sending, blob: Blob) -> None:
        self._sending = sending
        self._blob = blob
        self._digests = blob.entry.piece_digests
        self._upload_id = ""
        self._surplus: list[str] = []
        self._listed: dict[int, dict[str, Any]] = {}
        self._parts: dict[int, str] = {}
        self._ended = False
        self._changing = threading.Lock()

    def tasks(self) -> Iterator[Callable[[], object]]:
        """One piece of work for each part, in any order; the last to end completes the upload. None if it is there."""
        if len(self._digests) > _MOST_PARTS:
            raise StoreError(
                f"{self._blob.file} is {self._blob.entry.size_bytes} bytes long, and S3 takes {_MOST_PARTS} parts of "
                f"{PIECE_BYTES}; write it as several files"
            )
        unfinished = self._unfinished()
        if self._sending.is_there(self._blob):
            self._abort(unfinished)
            self._sending.advance(self._blob.entry.size_bytes)
            return
        self._begin(unfinished)
        for number in range(1, len(self._digests) + 1):
            yield partial(self._store_part, number)

    def _begin(self, unfinished: list[str]) -> None:
        if unfinished:
            self._upload_id, *self._surplus = unfinished
            try:
                parts = list_parts(self._sending.client, self._blob.key, self._upload_id, self._sending.patience)
                self._listed = {part["PartNumber"]: part for part in parts}
            except Refused:
                self._upload_id = ""
            else:
                logger.info("continuing the upload of %s: %d parts are there", self._blob.key, len(self._listed))
        if not self._upload_id:
            answer = self._ask("create_multipart_upload", ChecksumAlgorithm="SHA256", **self._sending.encryption)
            self._upload_id = answer["UploadId"]

    def _store_part(self, number: int) -> None:
        if self._ended:
            return
        try:
            etag = self._etag_there(number) or self._send_part(number)
        except Refused as no:
            self._on_ended(no)
            return
        except StoreUnavailableError as fault:
            self._on_fault(fault)
            return
        self._sending.advance(self._length(number))
        with self._changing:
            self._parts[number] = etag
            is_last = len(self._parts) == len(self._digests)
        if is_last:
            self._complete()

    def _etag_there(self, number: int) -> str | None:
        """The ETag of a part that an earlier upload has left, if it holds our bytes."""
        part = self._listed.get(number)
        if part is None or part["Size"] != self._length(number):
            return None
        if "ChecksumSHA256" in part:
            return part["ETag"] if part["ChecksumSHA256"] == in_base64(self._digests[number - 1]) else None
        with self._slice(number) as body:
            md5 = hashlib.md5(usedforsecurity=False)
            while block := body.read(1 << 20):
                md5.update(block)
        return part["ETag"] if part["ETag"].strip('"') == md5.hexdigest() else None

    def _send_part(self, number: int) -> str:
        with self._slice(number) as body:
            answer = self._ask(
                "upload_part",
                UploadId=self._upload_id,
                PartNumber=number,
                Body=body,
                **checksum(self._digests[number - 1]),
            )
        wanted = self._sending.encryption.get("ServerSideEncryption")
        if wanted and answer.get("ServerSideEncryption", wanted) != wanted:
            # Begun before the settings changed.
            self._abort([self._upload_id])
            raise Refused(Outcome.UPLOAD_ENDED)
        return answer["ETag"]

    def _complete(self) -> None:
        if self._sending.is_there(self._blob):
            self._abort([self._upload_id])
        else:
            parts = [
                {"PartNumber": number, "ETag": etag, "ChecksumSHA256": in_base64(self._digests[number - 1])}
                for number, etag in sorted(self._parts.items())
            ]
            try:
                self._ask("complete_multipart_upload", UploadId=self._upload_id, MultipartUpload={"Parts": parts})
            except Refused as no:
                self._on_ended(no)
            except StoreUnavailableError as fault:
                self._on_fault(fault)
        self._abort(self._surplus)

    def _on_ended(self, no: Refused) -> None:
        """Somebody has completed the upload, perhaps we ourselves with a lost answer; or aborted it."""
        if no.outcome is not Outcome.UPLOAD_ENDED:
            raise no
        with self._changing:
            was_ended, self._ended = self._ended, True
        if not was_ended and not self._sending.is_there(self._blob):
            self._sending.again.append(self._blob)

    def _on_fault(self, fault: StoreUnavailableError) -> None:
        """Some servers stumble over an upload that another machine has completed, each time they are asked for it."""
        if not self._sending.is_there(self._blob):
            raise fault
        with self._changing:
            was_ended, self._ended = self._ended, True
        if not was_ended:
            self._abort([self._upload_id])

    def _unfinished(self) -> list[str]:
        """Uploads of this blob that were begun and not completed, the newest first."""
        key, sending = self._blob.key, self._sending
        uploads = list_uploads(sending.client, key, sending.patience)
        return [upload["UploadId"] for upload in uploads if upload["Key"] == key]

    def _abort(self, upload_ids: list[str]) -> None:
        for upload_id in upload_ids:
            abort_upload(self._sending.client, self._blob.key, upload_id, self._sending.patience)

    def _ask(self, operation: str, **parameters: Any) -> dict[str, Any]:
        return self._sending.client.ask(operation, self._sending.patience, Key=self._blob.key, **parameters)

    def _slice(self, number: int) -> FileSlice:
        offset = (number - 1) * PIECE_BYTES
        return FileSlice(self._blob.file, offset, self._length(number), self._sending.patience)

    def _length(self, number: int) -> int:
        return min(PIECE_BYTES, self._blob.entry.size_bytes - (number - 1) * PIECE_BYTES)
