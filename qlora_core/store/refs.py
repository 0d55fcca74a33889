"""What must stay: pins, which people set, and refs, which other parts set. Both keep artifacts by address.

Whoever adds one says so before he asks whether garbage is being collected, and looks at the artifacts after it: a
collection either has seen the record, or is over. It does not know what an artifact is kept for.
"""

import re
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from qlora_core.digest import digest_bytes
from qlora_core.errors import ConfigError, CorruptArtifactError, StoreError
from qlora_core.store.backend import Backend, Record
from qlora_core.store.layout import PINS, REFS, STAGES, manifest_name
from qlora_core.store.lease import Leases
from qlora_core.store.manifest import STAGE_NAME
from qlora_core.store.quarantine import noting
from qlora_core.store.store import GC_LEASE

PIN = "pin"
_PIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_KIND = re.compile(r"[a-z][a-z0-9_-]{0,39}")
_ATTEMPTS = 5


class Ref(BaseModel):
    """A record that keeps artifacts. `kind` is "pin" for a person's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    name: str = Field(min_length=1)
    kind: str
    addresses: tuple[str, ...]
    created: AwareDatetime
    note: str = ""

    @property
    def record_name(self) -> str:
        """Where it is kept. The name of a ref may hold anything, so its digest stands for it."""
        return _record_name(self.kind, self.name)


def add_pin(backend: Backend, name: str, addresses: Iterable[str], note: str = "") -> Ref:
    """Keep artifacts, and what they were made from, under a name. Raises ConfigError for a name that is taken."""
    if not _PIN_NAME.fullmatch(name):
        raise ConfigError(f"pin name {name!r} is not allowed: letters, digits, . _ and -, up to 100, e.g. audit-2026")
    wanted = tuple(sorted(set(addresses)))
    _check_addresses(wanted)
    pin = Ref(name=name, kind=PIN, addresses=wanted, created=datetime.now(UTC), note=note)
    fresh = backend.create(pin.record_name, _to_json(pin)) is not None
    if not fresh:
        found = _read(backend, pin.record_name)
        if found is None or found.addresses != wanted:
            raise ConfigError(
                f"there is a pin {name!r} already; take another name, or first `qlora store unpin {name}`"
            )
        pin = found
    _settle(backend, pin, wanted, fresh=fresh)
    return pin


def add_ref(backend: Backend, kind: str, name: str, addresses: Iterable[str], note: str = "") -> Ref:
    """Keep artifacts for something else, such as a model version. Given again it adds what is new, and no more.

    Raises StoreError where one of them is gone.
    """
    if kind == PIN or not _KIND.fullmatch(kind):
        raise StoreError(f"kind {kind!r} of a reference is not allowed: lower-case letters, digits, _ and -, not 'pin'")
    wanted = tuple(sorted(set(addresses)))
    _check_addresses(wanted)
    for _ in range(_ATTEMPTS):
        record = backend.read(_record_name(kind, name))
        found = None if record is None else _parse(record.data, _record_name(kind, name))
        if found is not None and set(wanted) <= set(found.addresses):
            _settle(backend, found, wanted, fresh=False)
            return found
        kept = tuple(sorted({*wanted, *(found.addresses if found else ())}))
        created = found.created if found else datetime.now(UTC)
        ref = Ref(name=name, kind=kind, addresses=kept, created=created, note=note)
        if _write(backend, ref, record):
            _settle(backend, ref, wanted, fresh=found is None)
            return ref
    raise StoreError(
        f"{backend.location}: the reference {kind} {name} changes all the time; run the same command again"
    )


def set_ref(backend: Backend, kind: str, name: str, addresses: Iterable[str], note: str = "") -> Ref:
    """Let a reference keep exactly these artifacts from now on, whatever it kept before: the last writer's stands.

    Raises StoreError where one of them is gone; what was kept before is kept no more even then.
    """
    if kind == PIN or not _KIND.fullmatch(kind):
        raise StoreError(f"kind {kind!r} of a reference is not allowed: lower-case letters, digits, _ and -, not 'pin'")
    wanted = tuple(sorted(set(addresses)))
    _check_addresses(wanted)
    ref = Ref(name=name, kind=kind, addresses=wanted, created=datetime.now(UTC), note=note)
    for _ in range(_ATTEMPTS):
        if _write(backend, ref, backend.read(ref.record_name)):
            _settle(backend, ref, wanted, fresh=True)
            return ref
    raise StoreError(
        f"{backend.location}: the reference {kind} {name} changes all the time; run the same command again"
    )


def read_ref(backend: Backend, kind: str, name: str) -> Ref | None:
    """The reference of that kind and name; None where there is none. Raises CorruptArtifactError for an unsound one."""
    return _read(backend, _record_name(kind, name))


def list_refs(backend: Backend, faults: dict[str, str] | None = None) -> list[Ref]:
    """Every pin and ref. Raises CorruptArtifactError for one that cannot be read: what it keeps is not known then.

    With `faults` it is noted there instead, under its name, and left out.
    """
    found: list[Ref] = []
    for listed in [each for area in (PINS, REFS) for each in backend.list(f"{area}/")]:
        with noting(faults, listed.name):
            ref = _read(backend, listed.name)
            if ref is not None:
                found.append(ref)
    return found


def remedy(record_name: str) -> str:
    """What a person can do about a pin or ref that cannot be read: nobody else may guess what it kept."""
    if record_name.startswith(f"{PINS}/"):
        name = record_name.removeprefix(f"{PINS}/").removesuffix(".json")
        return f"if what it kept may go or is pinned anew, `qlora store unpin {name}` takes it away"
    return (
        f"put {record_name} back from a backup; if nothing refers to what it kept any more, or it is registered anew, "
        "remove it with the tools of the place itself"
    )


def remove_pin(backend: Backend, name: str) -> None:
    """Take a pin away; what it kept may be collected from then on. Raises ConfigError where there is none."""
    if _PIN_NAME.fullmatch(name) and backend.remove(_record_name(PIN, name)):
        return
    names = ", ".join(sorted(ref.name for ref in list_refs(backend, {}) if ref.kind == PIN))
    raise ConfigError(f"no pin {name!r} in {backend.location}; there are: {names or 'none'}")


def remove_ref(backend: Backend, kind: str, name: str) -> bool:
    """Take a ref away; False if there was none."""
    return backend.remove(_record_name(kind, name))


def _settle(backend: Backend, ref: Ref, wanted: Iterable[str], *, fresh: bool) -> None:
    """Make sure that what is kept is there, and was not being collected while it was asked for."""
    Leases(backend).wait_while_held(GC_LEASE, f"{ref.kind} {ref.name}: garbage is being collected")
    gone = [address for address in wanted if backend.read(manifest_name(address)) is None]
    if gone:
        if fresh:
            backend.remove(ref.record_name)
        raise StoreError(
            f"{backend.location} does not hold {', '.join(gone)}, which {ref.kind} {ref.name} is to keep; run the "
            "pipeline again, which builds it anew"
        )


def _write(backend: Backend, ref: Ref, over: Record | None) -> bool:
    data = _to_json(ref)
    if over is None:
        return backend.create(ref.record_name, data) is not None
    return backend.replace(ref.record_name, data, over.tag) is not None


def _check_addresses(addresses: Iterable[str]) -> None:
    wrong = [each for each in addresses if not re.fullmatch(rf"{STAGES}/{STAGE_NAME}/[0-9a-f]{{64}}", each)]
    if wrong:
        raise StoreError(f"{wrong[0]!r} is no address of an artifact: {STAGES}/<stage>/<key of 64 hex digits>")


def _record_name(kind: str, name: str) -> str:
    return f"{PINS}/{name}.json" if kind == PIN else f"{REFS}/{kind}/{digest_bytes(name.encode())}.json"


def _read(backend: Backend, record_name: str) -> Ref | None:
    record = backend.read(record_name)
    return None if record is None else _parse(record.data, record_name)


def _parse(data: bytes, record_name: str) -> Ref:
    try:
        ref = Ref.model_validate_json(data)
    except ValidationError as error:
        raise CorruptArtifactError(f"{record_name} is no sound reference: {error.errors()[0]['msg']}") from error
    if ref.record_name != record_name:
        raise CorruptArtifactError(f"{record_name} is no sound reference: it belongs under {ref.record_name}")
    return ref


def _to_json(ref: Ref) -> bytes:
    return (ref.model_dump_json(indent=1) + "\n").encode()
