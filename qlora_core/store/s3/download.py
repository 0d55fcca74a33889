"""Blobs on their way to this machine: many at once, large ones in pieces, each compared with its digest as it comes.

What is wrong twice in a row, read anew, is wrong at the place itself, and said to be so. It does not repair anything.
"""

import hashlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial

from qlora_core.errors import StoreUnavailableError
from qlora_core.progress import progress_bar
from qlora_core.store.manifest import FileEntry
from qlora_core.store.pool import BlobPool
from qlora_core.store.s3.client import REQUESTS_AT_ONCE, S3Client
from qlora_core.store.s3.inspection import inspect_blob
from qlora_core.store.s3.outcome import Outcome, Refused
from qlora_core.store.s3.parallel import run_all
from qlora_core.store.s3.partial import PartialBlob
from qlora_core.store.s3.stream import ObjectStream

logger = logging.getLogger(__name__)

_ROUNDS = 3
_POLL_S = 0.1


class Download:
    """Fetches blobs into a pool. After `run`, `faults` has by key what is wrong at the place, and the ETag of that."""

    def __init__(self, client: S3Client, pool: BlobPool, area: str) -> None:
        self._client = client
        self._pool = pool
        self._area = area
        self._patience = client.patience()
        self._advance: Callable[[float], None] = lambda amount: None
        self._open: set[PartialBlob] = set()
        self._suspects: dict[str, FileEntry] = {}
        self.faults: dict[str, tuple[str, str | None]] = {}

    def run(self, blobs: Mapping[str, FileEntry]) -> None:
        """Fetch the blobs, by key, and adopt the sound ones. Raises StoreError where the way to them is at fault."""
        spoiled: Counter[str] = Counter()
        waiting, seen_busy = dict(blobs), set()
        with progress_bar("Downloading", sum(entry.size_bytes for entry in blobs.values())) as self._advance:
            while waiting:
                busy: dict[str, FileEntry] = {}
                self._run_all(self._tasks(waiting, seen_busy, busy))
                self._inspect(spoiled)
                if len(busy) == len(waiting):
                    self._wait_for_others(busy)
                seen_busy |= set(busy)
                waiting = {**busy, **self._suspects}
                self._suspects = {}

    def _tasks(
        self, blobs: Mapping[str, FileEntry], seen_busy: set[str], busy: dict[str, FileEntry]
    ) -> Iterator[Callable[[], object]]:
        for key, entry in sorted(blobs.items(), key=lambda item: item[1].size_bytes, reverse=True):
            part = PartialBlob.open(self._pool.root, entry)
            if part is None:
                # Never waited for with other blobs in hand: two processes could wait for each other.
                busy[key] = entry
            elif key in seen_busy and self._pool.fault(entry, self._area) is None:
                part.close(done=True)
            else:
                self._open.add(part)
                for index in range(len(entry.piece_digests)):
                    yield partial(self._receive, part, key, index)

    def _receive(self, part: PartialBlob, key: str, index: int) -> None:
        if key in self._suspects or key in self.faults:
            return
        if not part.has(index) and not self._fetched(part, key, index):
            self._suspects[key] = part.entry
            if not part.entry.pieces:
                self._let_go(part)
            return
        self._advance(part.bounds(index)[1])
        if not part.piece_is_sound(index):
            return
        if part.is_sound:
            part.cut()
            # A copy that a power cut spoils is found when it is next compared.
            self._pool.adopt(part.path, part.entry.sha256, self._area, durable=False)
        else:
            self._suspects[key] = part.entry
        self._let_go(part)

    def _let_go(self, part: PartialBlob) -> None:
        self._open.discard(part)
        part.close(done=True)

    def _fetched(self, part: PartialBlob, key: str, index: int) -> bool:
        """Whether a piece came as it should."""
        start, length = part.bounds(index)
        found, at = hashlib.sha256(), start

        def consume(data: bytes) -> None:
            nonlocal at
            found.update(data)
            part.write(data, at)
            at += len(data)

        bounds = {"start": start, "length": length} if part.entry.pieces else {}
        stream = ObjectStream(self._client, key, self._patience, size_bytes=part.entry.size_bytes, **bounds)
        try:
            stream.into(consume)
        except Refused as no:
            if no.outcome is Outcome.MISSING:
                self.faults[key] = (f"blob {part.entry.sha256} is missing", None)
            return False
        return found.hexdigest() == part.entry.piece_digests[index]

    def _inspect(self, spoiled: Counter[str]) -> None:
        """Read the suspects anew: what is wrong again is a fault, the others came damaged and are fetched once more."""
        again: dict[str, FileEntry] = {}

        def look(key: str, entry: FileEntry) -> None:
            fault, etag = inspect_blob(self._client, key, entry, self._patience)
            if fault:
                self.faults[key] = (fault, etag)
            else:
                again[key] = entry

        suspects = [(key, entry) for key, entry in self._suspects.items() if key not in self.faults]
        self._run_all(partial(look, key, entry) for key, entry in suspects)
        self._suspects = again
        for key in again:
            logger.warning("%s: %s came damaged, but is sound there; fetching it again", self._client.place, key)
            spoiled[key] += 1
            if spoiled[key] >= _ROUNDS:
                raise StoreUnavailableError(
                    f"{self._client.place}: {key} came damaged {_ROUNDS} times in a row and is sound there; something "
                    "on the way changes what it carries; run the same command again"
                )

    def _run_all(self, tasks: Iterator[Callable[[], object]]) -> None:
        try:
            run_all(tasks, at_once=REQUESTS_AT_ONCE, patience=self._patience)
        finally:
            for part in self._open:
                part.close(done=False)
            self._open.clear()

    def _wait_for_others(self, busy: Mapping[str, FileEntry]) -> None:
        """A moment's wait while other processes fetch all that is left; their progress is ours."""
        before = self._last_changes(busy)
        time.sleep(_POLL_S)
        if self._last_changes(busy) != before:
            self._patience.moved()
        if self._patience.is_out:
            raise StoreUnavailableError(
                f"another process fetches blob {min(entry.sha256 for entry in busy.values())} into {self._pool.root} "
                "and does not get on, it may be stopped; continue or end it, then run the same command again"
            )

    def _last_changes(self, busy: Mapping[str, FileEntry]) -> list[int]:
        paths = (PartialBlob.path_of(self._pool.root, entry.sha256) for entry in busy.values())
        return [path.stat().st_mtime_ns if path.exists() else 0 for path in paths]
