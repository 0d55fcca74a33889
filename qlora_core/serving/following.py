"""Names that follow an alias: when it means another version, that one answers, while answers under way are finished.

The registry is asked every few seconds from a thread of its own. A registry that is away, an alias that is gone and a
version that cannot be served change nothing in what answers; it is said once, and again when it is over.
"""

import logging
import math
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

from qlora_core.errors import ConfigError, EngineStoppedError, ModelError, RegistryError
from qlora_core.model.adapter_set import AdapterSet
from qlora_core.registry.model_address import AddressBook
from qlora_core.serving.admission import AdapterSource
from qlora_core.serving.desk import Desk
from qlora_core.serving.served import put_on

logger = logging.getLogger(__name__)

RETRY_S = 30.0
"""How long a version that could not be fetched is left alone."""


@dataclass(frozen=True)
class Following:
    """What to follow: by name, the address whose alias it follows; asked of `book` every `every_s` seconds."""

    book: AddressBook
    addresses: Mapping[str, str]
    every_s: float


@dataclass
class _Name:
    """A name, what it follows, and the version that answers. `failed`: one that could not take over, for `trouble`.

    `said`: the kind of trouble that was told last; its words may differ from time to time.
    """

    name: str
    address: str
    version: str | None
    failed: str | None = None
    trouble: str = ""
    said: str | None = None
    again_at: float = 0.0


class Follower:
    """Keeps what `desk` serves at the versions that aliases mean, from `start` to `stop`.

    Raises:
        ConfigError: nothing was loaded that could be replaced.
    """

    def __init__(self, desk: Desk, following: Following) -> None:
        if not isinstance(desk.served.model, AdapterSet):
            raise ConfigError("no adapter is served, so there is nothing that could follow an alias")
        self._desk, self._adapters, self._following = desk, desk.served.model, following
        versions = {each.id: each.source.version for each in desk.models() if each.source is not None}
        self._names = [_Name(name, address, versions.get(name)) for name, address in following.addresses.items()]
        self._replaced: list[str] = []
        self._loaded = 0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="following", daemon=True)

    def start(self) -> None:
        """Begin to ask."""
        self._thread.start()

    def stop(self) -> None:
        """Ask no more; a look-up under way is not waited for."""
        self._stopping.set()

    def check(self) -> None:
        """Ask once for every name, and take off what nobody is answered with any more."""
        for each in self._names:
            self._check(each)
        self._take_off()

    def _run(self) -> None:
        while not self._stopping.wait(self._following.every_s):
            try:
                self.check()
            except EngineStoppedError:
                return

    def _check(self, each: _Name) -> None:
        try:
            version = self._following.book.version_of(each.address)
        except (RegistryError, OSError) as error:
            self._note(each, "away", f"{each.address} cannot be looked up: {error}")
            return
        if version is None:
            if each.version is not None:
                self._note(each, "gone", f"{each.address} names no version any more")
        elif version == each.version:
            self._is_well(each)
        elif version == each.failed and time.monotonic() < each.again_at:
            self._note(each, f"failed {version}", each.trouble)
        else:
            self._move(each, version)

    def _move(self, each: _Name, version: str) -> None:
        try:
            self._load(each, version)
        except EngineStoppedError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is (torch's, the disk's), what is served answers on
            lasting = isinstance(error, ModelError | ConfigError)
            each.failed, each.again_at = version, math.inf if lasting else time.monotonic() + RETRY_S
            each.trouble = f"{each.address} means version {version}, which cannot be served: {error}"
            self._note(each, f"failed {version}", each.trouble)

    def _load(self, each: _Name, version: str) -> None:
        found = self._following.book.fetch(each.address, version)
        source = AdapterSource(each.name, found.folder, each.address, version, found.quantized_base_digest)
        admitted = self._desk.served.admission.admit(source)
        self._loaded += 1
        own = f"{each.name}#{self._loaded}"  # '#' is in no name that a request may give
        model = self._desk.engine.between_steps(lambda: put_on(self._adapters, admitted, own))
        before = self._desk.put(model)
        if before is not None and before.adapter is not None:
            self._replaced.append(before.adapter)
        logger.info(
            "%s is version %s now (was %s), adapter %s", each.address, version, each.version or "none", model.digest
        )
        each.version = version
        self._forget(each)

    def _take_off(self) -> None:
        def take_off(adapter: str) -> bool:
            if self._desk.engine.uses(adapter):
                return False
            self._adapters.drop(adapter)
            return True

        self._replaced = [
            each
            for each in self._replaced
            if not self._desk.engine.between_steps(lambda adapter=each: take_off(adapter))
        ]

    def _note(self, each: _Name, kind: str, trouble: str) -> None:
        """Say what is wrong, once for each kind of trouble."""
        self._desk.notes[each.name] = trouble
        if each.said != kind:
            kept = "nothing answers for it yet" if each.version is None else f"version {each.version} answers on"
            logger.warning("%s; %s", trouble, kept)
            each.said = kind

    def _is_well(self, each: _Name) -> None:
        if each.said is not None:
            logger.info("%s is version %s, as it is served", each.address, each.version)
        self._forget(each)

    def _forget(self, each: _Name) -> None:
        self._desk.notes.pop(each.name, None)
        each.failed = each.said = None
