"""The manifest of an artifact: which files it has, what it was made from, by whom. Knows nothing of storage.

A manifest read from outside is trusted in nothing: its paths must stay inside the artifact, its digest must follow from
its files and its key from the stage, version, settings and inputs it records. A checksum over all of it, which is in
the document alone, tells damage to the rest.
"""

import importlib.metadata
import json
import os
import socket
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from qlora_core.digest import digest_json
from qlora_core.errors import CorruptArtifactError
from qlora_core.store.layout import MANIFEST_FILE, address_of

STAGE_NAME = "[a-z][a-z0-9_-]{0,39}"
PIECE_BYTES = 32 << 20
DISTRIBUTION = "qlora-fleet"
_CHECKSUM = "checksum"


def key_digest(stage: str, version: str, config: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """SHA-256 over the canonical JSON of what decides a stage's result, 64 hex digits."""
    return digest_json({"stage": stage, "version": version, "config": dict(config), "inputs": dict(inputs)})


def inside_path(path: str) -> str:
    """`path` if it names a file inside an artifact, the same on every system; ValueError otherwise."""
    parts = path.split("/")
    if not path.isprintable() or "\\" in path or any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"{path!r} is no path inside an artifact: relative, with /, without . or .. or odd characters")
    return path


Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
InsidePath = Annotated[str, AfterValidator(inside_path)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class FileEntry(_Record):
    """One file of an artifact. A file longer than a piece lists the digests of its pieces, so that ranges of it can be
    verified, and uploads resumed, without the rest."""

    sha256: Sha256
    size_bytes: int = Field(ge=0)
    pieces: tuple[Sha256, ...] = ()

    @property
    def piece_digests(self) -> tuple[str, ...]:
        """The SHA-256 of each piece; a short file is one piece."""
        return self.pieces or (self.sha256,)

    @model_validator(mode="after")
    def _pieces_cover_the_file(self) -> Self:
        wanted = 0 if self.size_bytes <= PIECE_BYTES else -(-self.size_bytes // PIECE_BYTES)
        if len(self.pieces) != wanted:
            raise ValueError(f"{self.size_bytes} bytes are {wanted} listed pieces, not {len(self.pieces)}")
        return self


class Producer(_Record):
    """Who built an artifact. Not part of its identity."""

    host: str
    pid: int
    package_version: str

    @classmethod
    def this_process(cls) -> Self:
        """The running process."""
        return cls(host=socket.gethostname(), pid=os.getpid(), package_version=importlib.metadata.version(DISTRIBUTION))


class Manifest(_Record):
    """What `manifest.json` says. `digest` covers `files` alone; `key` covers stage, version, config and inputs."""

    schema_version: Literal[1] = 1
    stage: str = Field(pattern=rf"^{STAGE_NAME}$")
    key: Sha256
    digest: Sha256
    files: dict[InsidePath, FileEntry] = Field(min_length=1)
    inputs: dict[str, str]
    config: dict[str, Any]
    version: str
    producer: Producer
    created: AwareDatetime

    @property
    def address(self) -> str:
        """Where a store keeps this artifact, relative to its root."""
        return address_of(self.stage, self.key)

    @property
    def size_bytes(self) -> int:
        """The sum of the files' sizes."""
        return sum(entry.size_bytes for entry in self.files.values())

    @model_validator(mode="after")
    def _files_are_no_folders(self) -> Self:
        for path in self.files:
            above = path.rpartition("/")[0]
            while above:
                if above in self.files:
                    raise ValueError(f"{above!r} is a file and a folder in one, of {path!r}")
                above = above.rpartition("/")[0]
        return self

    @model_validator(mode="after")
    def _digests_follow_from_content(self) -> Self:
        if files_digest(self.files) != self.digest:
            raise ValueError("digest does not follow from the files")
        if key_digest(self.stage, self.version, self.config, self.inputs) != self.key:
            raise ValueError("key does not follow from stage, version, config and inputs")
        return self

    def to_json(self) -> bytes:
        """The bytes of `manifest.json`: readable, and equal for equal manifests."""
        document = self.model_dump(mode="json")
        document[_CHECKSUM] = digest_json(document)
        return (json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def files_digest(files: Mapping[str, FileEntry]) -> str:
    """One digest over file names and contents, 64 hex digits: SHA-256 of canonical JSON {path: sha256}."""
    return digest_json({path: entry.sha256 for path, entry in files.items()})


def new_manifest(
    stage: str, version: str, config: Mapping[str, Any], inputs: Mapping[str, str], files: Mapping[str, FileEntry]
) -> Manifest:
    """The manifest of files that this process has just built."""
    return Manifest(
        stage=stage,
        key=key_digest(stage, version, config, inputs),
        digest=files_digest(files),
        files=dict(files),
        inputs=dict(inputs),
        # As it will be read back: tuples become lists here and not only in the file.
        config=json.loads(json.dumps(dict(config), allow_nan=False)),
        version=version,
        producer=Producer.this_process(),
        created=datetime.now(UTC),
    )


def parse_manifest(raw: bytes, address: str) -> Manifest:
    """The manifest found at `address`. Raises CorruptArtifactError for anything but a sound one of that address."""
    name = f"{address}/{MANIFEST_FILE}"
    try:
        manifest = Manifest.model_validate(_without_checksum(json.loads(raw)))
    except json.JSONDecodeError as error:
        raise CorruptArtifactError(f"{name} is not JSON: {error}") from error
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        raise CorruptArtifactError(f"{name} is not a sound manifest: {faults}") from error
    except (ValueError, RecursionError) as error:
        raise CorruptArtifactError(f"{name} is damaged: {error}") from error
    if manifest.address != address:
        raise CorruptArtifactError(f"{name} belongs to another artifact, {manifest.address}")
    return manifest


def _without_checksum(document: Any) -> Any:
    if not isinstance(document, dict):
        return document
    found, follows = document.pop(_CHECKSUM, None), digest_json(document)
    if found != follows:
        raise ValueError(f"its checksum is {found!r}, and {follows} follows from the rest of it")
    return document
