"""Who builds what: leases by compare-and-swap, with a fencing token, a heartbeat and an expiry.

A lease is one record, and every write of it names the tag of the one before: who has lost it can write it no more. Its
token grows with every holder for as long as the record stands; garbage collection deletes free leases of artifacts
that are gone, and the next begins at 1 again, under a tag that nobody had. It passes through

    held ─► publishing (names the manifest) ─► committed ─► free

and the step to `committed` is the publication: whoever has lost the lease fails there, however long he slept, and
whoever finds a committed lease may finish what is left, which is to write the manifest that stands in it. Until that
manifest is known to be there, nobody frees it, its own holder neither: an error on his way leaves it committed.

Expiry is judged by the observer's own clock: a record that has not changed for its `ttl_s` seconds is dead. Clocks of
different machines are never compared. A holder on this machine that has ended is dead at once.

It does not know what is built.
"""

import contextlib
import logging
import secrets
import threading
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from qlora_core.errors import CorruptArtifactError, LeaseLostError, StoreError
from qlora_core.store.backend import Backend, Record
from qlora_core.store.holder import Holder
from qlora_core.store.layout import LEASES, manifest_name
from qlora_core.store.manifest import Manifest
from qlora_core.store.quarantine import set_record_aside

logger = logging.getLogger(__name__)

DEFAULT_TTL_S = 60.0
_BEATS_PER_TTL = 4
_TOLD_AGAIN_S = 60.0


class LeaseRecord(BaseModel):
    """What a lease's record says. `nonce` makes every write of it different from every other."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    token: int = Field(ge=1)
    state: Literal["held", "publishing", "committed", "free"]
    holder: Holder
    nonce: str
    ttl_s: float = Field(gt=0)
    since: AwareDatetime
    inputs: dict[str, str] = {}
    manifest: Manifest | None = None

    def to_json(self) -> bytes:
        """The record's bytes."""
        return self.model_dump_json().encode()


def parse_lease(record: Record, name: str) -> LeaseRecord:
    """The lease in a record. Raises CorruptArtifactError for anything but a sound one."""
    try:
        return LeaseRecord.model_validate_json(record.data)
    except ValidationError as error:
        raise CorruptArtifactError(f"{lease_name(name)} is no sound lease: {error.errors()[0]['msg']}") from error


def lease_name(name: str) -> str:
    """The record of the lease called `name`, such as `stage/curate/<key>`."""
    return f"{LEASES}/{name}.json"


class Leases:
    """The leases of one store, as one process sees them. Safe to use from several threads."""

    def __init__(self, backend: Backend, ttl_s: float = DEFAULT_TTL_S) -> None:
        self._backend = backend
        self._ttl_s = ttl_s
        self._seen: dict[str, tuple[str, float]] = {}
        self._told: dict[str, float] = {}

    @contextlib.contextmanager
    def attempt(self, name: str, inputs: Mapping[str, str] | None = None) -> Iterator["HeldLease | None"]:
        """Hold the lease for the block, or None where somebody else lives and holds it. Never waits.

        A lease whose holder died or failed after its publication was decided is finished on the way.
        """
        held = self._take(name, dict(inputs or {}))
        if held is None:
            yield None
            return
        try:
            held.start_heartbeat()
            yield held
        finally:
            held.release()

    def live(self, name: str) -> LeaseRecord | None:
        """The lease if somebody holds it, as far as this process can tell by now; else None."""
        record = self._backend.read(lease_name(name))
        if record is None:
            return None
        lease = self._parsed(name, record)
        return None if lease is None or lease.state == "free" or self._is_dead(name, record, lease) else lease

    def wait_while_held(self, name: str, why: str) -> None:
        """Return once whoever holds the lease now, if anybody does, holds it no more. `why` is logged.

        A holder who only seems dead loses it here, so that he cannot go on behind the caller's back.
        """
        pause_s = 0.05
        asked_about: tuple[int, datetime] | None = None
        while (record := self._backend.read(lease_name(name))) is not None:
            lease = self._parsed(name, record)
            asked_about = asked_about or (lease and (lease.token, lease.since))
            if lease is None or lease.state == "free" or (lease.token, lease.since) != asked_about:
                return
            if self._is_dead(name, record, lease):
                self.retire(name, record, lease)
                continue
            self.tell(name, f"{why}: waiting for {lease.holder}")
            time.sleep(pause_s)
            pause_s = min(pause_s * 1.5, 1.0)

    def retire(self, name: str, record: Record, lease: LeaseRecord) -> bool:
        """Free a lease whose holder counts as dead: should he wake, his next write of it is refused.

        A publication that was decided is finished first. False if the record has changed meanwhile.
        """
        if lease.state == "committed" and lease.manifest is not None:
            finish(self._backend, lease.manifest)
        fresh = self._fresh(lease.token + 1, {}).model_copy(update={"state": "free"})
        if self._backend.replace(lease_name(name), fresh.to_json(), record.tag) is None:
            return False
        where = self._backend.location
        logger.warning("%s: %s died or went silent; its lease of %s is void", where, lease.holder, name)
        return True

    def tell(self, name: str, message: str) -> None:
        """Log a message about a lease, and not again for a minute."""
        if time.monotonic() - self._told.get(name, -_TOLD_AGAIN_S) >= _TOLD_AGAIN_S:
            self._told[name] = time.monotonic()
            logger.info("%s", message)

    def _take(self, name: str, inputs: dict[str, str]) -> "HeldLease | None":
        record = self._backend.read(lease_name(name))
        if record is None:
            fresh = self._fresh(1, inputs)
            tag = self._backend.create(lease_name(name), fresh.to_json())
            return HeldLease(self._backend, name, fresh, tag) if tag else None
        lease = self._parsed(name, record)
        if lease is None:
            return None
        if lease.state == "committed" and lease.manifest is not None:
            finish(self._backend, lease.manifest)
        elif lease.state != "free" and not self._is_dead(name, record, lease):
            self.tell(name, f"{lease.holder} is at work on {name} since {lease.since:%H:%M:%S} UTC; waiting")
            return None
        fresh = self._fresh(lease.token + 1, inputs)
        tag = self._backend.replace(lease_name(name), fresh.to_json(), record.tag)
        if tag is None:
            return None
        if lease.state != "free":
            where = self._backend.location
            logger.warning("%s: %s died or went silent; took over its lease of %s", where, lease.holder, name)
        return HeldLease(self._backend, name, fresh, tag)

    def _parsed(self, name: str, record: Record) -> LeaseRecord | None:
        """The lease; None for an unsound one, which is moved away: its holder, if there is one, has lost it."""
        try:
            return parse_lease(record, name)
        except CorruptArtifactError as fault:
            if set_record_aside(self._backend, lease_name(name), record):
                logger.warning("%s: %s; whoever held it has lost it", self._backend.location, fault)
            return None

    def _fresh(self, token: int, inputs: dict[str, str]) -> LeaseRecord:
        return LeaseRecord(
            token=token,
            state="held",
            holder=Holder.this_process(),
            nonce=secrets.token_hex(8),
            ttl_s=self._ttl_s,
            since=datetime.now(UTC),
            inputs=inputs,
        )

    def _is_dead(self, name: str, record: Record, lease: LeaseRecord) -> bool:
        tag, since = self._seen.get(name, ("", 0.0))
        if tag != record.tag:
            since = time.monotonic()
            self._seen[name] = (record.tag, since)
        return lease.holder.is_dead or time.monotonic() - since > lease.ttl_s


class HeldLease:
    """A lease that this process took. Its methods raise LeaseLostError once somebody else has taken it over."""

    def __init__(self, backend: Backend, name: str, record: LeaseRecord, tag: str) -> None:
        self._backend = backend
        self._name = name
        self._record = record
        self._tag = tag
        self._swapping = threading.Lock()
        self._ended = threading.Event()
        self._published = False

    @property
    def token(self) -> int:
        """The fencing token: greater than that of every earlier holder in this record."""
        return self._record.token

    @property
    def ttl_s(self) -> float:
        """How long it may stay unrenewed before others take its holder for dead."""
        return self._record.ttl_s

    def start_heartbeat(self) -> None:
        """Renew the lease in the background until it is released or lost."""
        threading.Thread(target=self._beat, name=f"lease {self._name}", daemon=True).start()

    def renew(self) -> None:
        """Show that the holder lives; of no effect once the lease was given back."""
        self._swap({})

    def intend(self, manifest: Manifest) -> None:
        """Say what is about to be published, so that garbage collection keeps its blobs from now on."""
        self._swap({"state": "publishing", "manifest": manifest})

    def commit(self) -> None:
        """Decide the publication: after this no other producer of the same key can win. All blobs must be stored."""
        self._swap({"state": "committed"})

    def done(self) -> None:
        """Say that the manifest of the decided publication is known to be there: the lease may be given back."""
        self._published = True

    def release(self) -> None:
        """Give the lease back; of no effect if it was lost. One that is committed and not `done` stays committed."""
        self._ended.set()
        try:
            self._swap({"state": "free", "manifest": None, "inputs": {}})
        except LeaseLostError:
            return
        except StoreError as error:
            logger.warning("the lease of %s could not be given back and will expire: %s", self._name, error)

    def _beat(self) -> None:
        while not self._ended.wait(self._record.ttl_s / _BEATS_PER_TTL):
            try:
                self.renew()
            except LeaseLostError as lost:
                logger.warning("%s", lost)
                return
            except StoreError as error:
                logger.warning("the lease of %s could not be renewed, trying again: %s", self._name, error)

    def _swap(self, changes: dict[str, Any]) -> None:
        with self._swapping:
            for _ in range(2):
                if not changes and self._record.state == "free":
                    return
                if changes.get("state") == "free" and self._record.state == "committed" and not self._published:
                    return
                fresh = self._record.model_copy(update={**changes, "nonce": secrets.token_hex(8)})
                tag = self._backend.replace(lease_name(self._name), fresh.to_json(), self._tag)
                if tag is not None:
                    self._record, self._tag = fresh, tag
                    return
                # An earlier write of ours may have got there although its answer did not.
                if not self._caught_up():
                    break
            self._ended.set()
            raise LeaseLostError(
                f"{self._backend.location}: the lease of {self._name} (token {self.token}) was taken over by "
                "another producer while this one was silent; what was built here is not published"
            )

    def _caught_up(self) -> bool:
        """Whether the record is ours after all, as a write left it that was never answered."""
        found = self._backend.read(lease_name(self._name))
        if found is None:
            return False
        try:
            lease = parse_lease(found, self._name)
        except CorruptArtifactError:
            return False
        if (lease.token, lease.holder, lease.since) != (self.token, self._record.holder, self._record.since):
            return False
        self._record, self._tag = lease, found.tag
        return True


def finish(backend: Backend, manifest: Manifest) -> bool:
    """Write the manifest of a decided publication; False if one stands there already."""
    return backend.create(manifest_name(manifest.address), manifest.to_json()) is not None
