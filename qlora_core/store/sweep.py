"""Removing what was found to be garbage, as long as the collector holds its lease. Decides nothing itself."""

import threading
import time
from collections.abc import Container, Iterable, Mapping
from contextlib import nullcontext
from datetime import datetime

from qlora_core.store.contents import in_parallel
from qlora_core.store.lease import HeldLease, lease_name
from qlora_core.store.roots import StoredWork, read_leases
from qlora_core.store.store import Store

_BATCH = 64
_AT_ONCE = 8
_RENEWALS_PER_TTL = 6


class Sweep:
    """Deletions under a lease. Each method raises LeaseLostError, before it removes more, once the lease is lost."""

    def __init__(self, store: Store, lease: HeldLease) -> None:
        self._store = store
        self._lease = lease
        self._looking = threading.Lock()
        self._looked = 0.0

    def remove(self, names: Mapping[str, str | None]) -> set[str]:
        """Remove records and blobs, each only if it still has its tag, if it has one here; returns which went."""
        gone: set[str] = set()

        def remove_one(name: str) -> None:
            self._still_held()
            if self._store.backend.remove(name, names[name]):
                gone.add(name)

        waiting = list(names)
        for start in range(0, len(waiting), _BATCH):
            self._lease.renew()
            in_parallel(remove_one, waiting[start : start + _BATCH], at_once=_AT_ONCE)
        return gone

    def remove_views(self, digests: Iterable[str]) -> int:
        """Remove folders of links on this machine that no living process was given."""
        removed = 0
        for digest in digests:
            self._still_held()
            removed += self._store.backend.pool.remove_view(digest)
        return removed

    def remove_work(self, piece: StoredWork) -> bool:
        """Remove a piece of work, unless somebody has taken it up again meanwhile."""
        name = piece.snapshot.lease if piece.snapshot else ""
        # Held while it goes, so that nobody starts on it again and relies on what is about to be removed.
        with self._store.leases.attempt(name) if name else nullcontext(self._lease) as held:
            if held is None:
                return False
            # First, and only if unchanged: a writer who has lost it is refused, and stops.
            if piece.tag and not self.remove({piece.snapshot_name: piece.tag}):
                return False
            self.remove({thing.name: None for thing in piece.things if thing.name != piece.snapshot_name})
        return True

    def remove_free_leases(self, kept: Container[str], now: datetime) -> int:
        """Remove the leases that nobody holds and whose artifact is none of `kept`."""
        leases = read_leases(self._store.backend, now)
        over = [seen for seen in leases if seen.lease.state == "free" and seen.is_over(kept)]
        return len(self.remove({lease_name(seen.name): seen.record.tag for seen in over}))

    def remove_others(self, older_than_s: float) -> int:
        """What the place itself knows to be left over by the dead."""
        self._lease.renew()
        return self._store.backend.sweep_leftovers(older_than_s)

    def _still_held(self) -> None:
        """Renew the lease if that was not done just now. By the wall clock, which goes on while a machine sleeps."""
        with self._looking:
            if abs(time.time() - self._looked) > self._lease.ttl_s / _RENEWALS_PER_TTL:
                self._lease.renew()
                self._looked = time.time()
