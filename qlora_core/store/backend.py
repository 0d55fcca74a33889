"""What a store needs of the place where artifacts are kept. Adding a place means writing this protocol once more."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol, TypeVar

from qlora_core.errors import CorruptArtifactError
from qlora_core.store.manifest import Manifest

logger = logging.getLogger(__name__)

Found = TypeVar("Found")


class Backend(Protocol):
    """A place for artifacts. An address is `v1/stage/<stage>/<key>`; failures are StoreError with a next step."""

    @property
    def location(self) -> str:
        """The place as a user would write it."""
        ...

    def read_manifest(self, address: str) -> bytes | None:
        """The bytes of the manifest at `address`; None where no artifact is.

        Raises CorruptArtifactError where there are files but no manifest.
        """
        ...

    def fetch(self, manifest: Manifest) -> Path:
        """A folder on this machine with the artifact's files, each compared with `manifest` during this very call.

        Raises CorruptArtifactError naming each file at fault.
        """
        ...

    def staging(self) -> AbstractContextManager[Path]:
        """An empty folder to build an artifact in; however the block ends, what is left of it is removed."""
        ...

    def publish(self, folder: Path, manifest: Manifest) -> Path | None:
        """Make the sealed files in a staging folder visible under the manifest's address, all at once.

        Returns where they now are on this machine, or None if another producer's artifact was there first.
        """
        ...

    def repairing(self) -> AbstractContextManager[None]:
        """For the block, no other process of this machine sets artifacts of this place aside."""
        ...

    def set_aside(self, address: str) -> None:
        """Move what is at `address` to quarantine: it becomes a miss and can be looked at. Nothing there: no effect."""
        ...

    def check(self) -> None:
        """Prove that artifacts can be written, read and removed here; leaves nothing behind."""
        ...


def read_or_set_aside(backend: Backend, address: str, read: Callable[[], Found | None]) -> Found | None:
    """What `read` finds at `address`; if that is corrupt, it is logged, moved to quarantine, and None.

    `read` is called again before anything is moved: another reader may have set the artifact aside meanwhile, and a
    producer may have put a sound one in its place.
    """
    try:
        return read()
    except CorruptArtifactError as fault:
        with backend.repairing():
            try:
                return read()
            except CorruptArtifactError:
                logger.warning("%s: corrupt artifact, moved to quarantine: %s", backend.location, fault)
                backend.set_aside(address)
                return None
