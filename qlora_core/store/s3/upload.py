"""Files on their way into a bucket: what is there is not sent, large files go in parts, many at once.

It does not know what the files are.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial

from qlora_core.errors import StoreUnavailableError
from qlora_core.progress import progress_bar
from qlora_core.store.disk import named_os_errors
from qlora_core.store.manifest import PIECE_BYTES
from qlora_core.store.s3.body import FileSlice
from qlora_core.store.s3.client import REQUESTS_AT_ONCE, S3Client
from qlora_core.store.s3.multipart import MultipartUpload
from qlora_core.store.s3.parallel import run_all
from qlora_core.store.s3.sending import Blob, Sending, checksum

_ROUNDS = 3
_SMALL_BYTES = 1 << 20


def upload_blobs(client: S3Client, blobs: list[Blob], encryption: Mapping[str, str]) -> None:
    """Store each file under its key unless an object of its size is there. Raises StoreError."""
    patience = client.patience()
    # Large ones first: the small ones fill the gaps at the end.
    waiting = sorted(blobs, key=lambda blob: blob.entry.size_bytes, reverse=True)
    with progress_bar("Uploading", sum(blob.entry.size_bytes for blob in blobs)) as advance:
        for _ in range(_ROUNDS):
            sending = Sending(client, encryption, patience, advance)
            run_all(_tasks(sending, waiting), at_once=REQUESTS_AT_ONCE, patience=patience)
            waiting = sending.again
            if not waiting:
                return
    raise StoreUnavailableError(
        f"{client.place}: the upload of {', '.join(sorted(blob.key for blob in waiting))} was aborted by others "
        f"{_ROUNDS} times in a row; run the same command again"
    )


def _tasks(sending: Sending, blobs: list[Blob]) -> Iterator[Callable[[], object]]:
    for blob in blobs:
        if blob.entry.size_bytes <= PIECE_BYTES:
            yield partial(_put, sending, blob)
        else:
            yield from MultipartUpload(sending, blob).tasks()


def _put(sending: Sending, blob: Blob) -> None:
    size_bytes = blob.entry.size_bytes
    if not sending.is_there(blob):
        parameters = {"Key": blob.key, **checksum(blob.entry.sha256), **sending.encryption}
        if size_bytes <= _SMALL_BYTES:
            # Bytes go together with their headers; before a stream the server is asked whether it wants it.
            with named_os_errors("read", blob.file):
                data = blob.file.read_bytes()
            sending.client.ask("put_object", sending.patience, Body=data, **parameters)
        else:
            with FileSlice(blob.file, 0, size_bytes, sending.patience) as body:
                sending.client.ask("put_object", sending.patience, Body=body, **parameters)
    sending.advance(size_bytes)
