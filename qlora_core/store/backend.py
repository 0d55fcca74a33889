"""What a store needs of the place where artifacts are kept. Adding a place means writing this protocol once more."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from qlora_core.store.manifest import Manifest


class Backend(Protocol):
    """A place for artifacts. An address is `v1/stage/<stage>/<key>`; whatever fails raises StoreError with a next step."""

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
        """An empty folder to build an artifact in; removed with what is left in it when the block ends, however it ends."""
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
        """Move what is at `address` to quarantine, so that it is a miss and can be looked at. Nothing there: no effect."""
        ...

    def check(self) -> None:
        """Prove that artifacts can be written, read and removed here; leaves nothing behind."""
        ...
