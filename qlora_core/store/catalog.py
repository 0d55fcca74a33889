"""Every artifact of a store at one moment, and how they hang together. Reads manifests alone, never a blob."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property

from qlora_core.errors import ConfigError, CorruptArtifactError
from qlora_core.store.backend import Backend, Listed
from qlora_core.store.contents import in_parallel
from qlora_core.store.layout import MANIFEST_FILE, STAGES
from qlora_core.store.manifest import STAGE_NAME, Manifest, parse_manifest

READS_AT_ONCE = 16
SHORTEST_PREFIX = 6
_NAME = re.compile(rf"{STAGES}/{STAGE_NAME}/[0-9a-f]{{64}}/{re.escape(MANIFEST_FILE)}")
_SHOWN = 5


@dataclass(frozen=True)
class Entry:
    """An artifact as found: `tag` is its manifest record's, `modified` is by the clock of the place."""

    manifest: Manifest
    tag: str
    modified: datetime


@dataclass(frozen=True)
class Catalog:
    """The artifacts by address, and for each manifest that is unsound what is wrong with it."""

    entries: dict[str, Entry]
    faults: dict[str, str]

    @cached_property
    def by_digest(self) -> dict[str, list[Entry]]:
        """The artifacts that have the same files, oldest first: several keys may have led to them."""
        found: dict[str, list[Entry]] = {}
        for entry in sorted(self.entries.values(), key=age_order):
            found.setdefault(entry.manifest.digest, []).append(entry)
        return found

    @cached_property
    def newest_first(self) -> list[Entry]:
        """The artifacts by when they were made."""
        return sorted(self.entries.values(), key=age_order, reverse=True)

    def with_inputs(self, addresses: Iterable[str]) -> set[str]:
        """These artifacts, of which some may be gone, with all that they were made from."""
        found: set[str] = set()
        waiting = [address for address in addresses if address in self.entries]
        while waiting:
            address = waiting.pop()
            if address in found:
                continue
            found.add(address)
            for digest in self.entries[address].manifest.inputs.values():
                waiting += [entry.manifest.address for entry in self.by_digest.get(digest, ())]
        return found


def age_order(entry: Entry) -> tuple[datetime, str]:
    """Sorts from the oldest to the newest, the same way every time."""
    return entry.manifest.created, entry.manifest.address


def list_addresses(backend: Backend) -> dict[str, Listed]:
    """The listing of every artifact's manifest by its address."""
    listed = (found for found in backend.list(f"{STAGES}/") if _NAME.fullmatch(found.name))
    return {found.name.removesuffix(f"/{MANIFEST_FILE}"): found for found in listed}


def read_catalog(backend: Backend) -> Catalog:
    """Read every manifest. One that goes meanwhile is left out."""
    entries: dict[str, Entry] = {}
    faults: dict[str, str] = {}
    listed = list_addresses(backend)

    def look(address: str) -> None:
        record = backend.read(listed[address].name)
        if record is None:
            return
        try:
            manifest = parse_manifest(record.data, address)
        except CorruptArtifactError as fault:
            faults[address] = str(fault)
        else:
            entries[address] = Entry(manifest, record.tag, listed[address].modified)

    in_parallel(look, listed, at_once=READS_AT_ONCE)
    return Catalog({address: entries[address] for address in sorted(entries)}, dict(sorted(faults.items())))


def find_address(backend: Backend, text: str) -> str:
    """The artifact whose key starts with `text`, at least 6 hex digits; `stage/<start>` asks in one stage only.

    Raises ConfigError where that is no start of a key, of none here, or of several.
    """
    stage, _, start = text.removeprefix(f"{STAGES}/").rpartition("/")
    if not re.fullmatch(rf"[0-9a-f]{{{SHORTEST_PREFIX},64}}", start):
        raise ConfigError(
            f"{text!r} is no key: give its first {SHORTEST_PREFIX} hex digits or more, as `qlora store ls` shows them"
        )
    listed = list_addresses(backend)
    keys = {address: address.split("/")[-2:] for address in listed}
    found = [address for address, (of, key) in keys.items() if key.startswith(start) and stage in ("", of)]
    if len(found) == 1:
        return found[0]
    if found:
        raise ConfigError(f"{text!r} is the start of {len(found)} keys: {_names(found)}; give more digits")
    near = [address for address, (of, _) in keys.items() if of == stage] or list(listed)
    newest = sorted(near, key=lambda address: listed[address].modified, reverse=True)
    known = f"the newest here are {_names(newest[:_SHOWN])}" if newest else "the store holds no artifact at all"
    raise ConfigError(f"no artifact in {backend.location} has a key that starts with {text!r}; {known}")


def _names(addresses: Iterable[str]) -> str:
    return ", ".join("/".join(address.split("/")[-2:])[:-44] for address in sorted(addresses))
