"""What the store is asked for and what it hands out. Knows nothing of where artifacts are kept."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_core.errors import StoreError
from qlora_core.store.layout import address_of
from qlora_core.store.manifest import STAGE_NAME, Manifest, key_digest


@dataclass(frozen=True)
class StageKey:
    """Everything that decides a stage's result: its name, code version, settings, and the digests of its inputs.

    `config` is plain JSON data; `inputs` maps names to digests. Raises StoreError for a stage name that cannot name a
    folder; NaN or objects in `config` raise ValueError or TypeError when the key is computed.
    """

    stage: str
    version: str
    config: Mapping[str, Any]
    inputs: Mapping[str, str]

    def __post_init__(self) -> None:
        if not re.fullmatch(STAGE_NAME, self.stage):
            raise StoreError(f"stage name {self.stage!r} is not allowed: lower-case letters, digits, _ and -, up to 40")

    @property
    def key(self) -> str:
        """SHA-256 over the canonical JSON of the four fields, 64 hex digits."""
        return key_digest(self.stage, self.version, self.config, self.inputs)

    @property
    def address(self) -> str:
        """Where a store keeps this artifact, relative to its root."""
        return address_of(self.stage, self.key)


@dataclass(frozen=True)
class Artifact:
    """A verified artifact on this machine: `path` is a folder with exactly the files of `manifest`. Never write there.

    `digest` is the identity of the files (names and contents), whatever key they were built under.
    """

    stage: str
    key: str
    digest: str
    path: Path
    manifest: Manifest
