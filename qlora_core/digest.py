"""Canonical JSON and SHA-256: how anything in this project gets its identity. Knows nothing of what it digests."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def canonical_json(value: Any) -> bytes:
    """UTF-8 JSON with sorted keys and no spaces: equal values give equal bytes.

    NaN and infinity have no JSON form and raise ValueError; so does anything that is not plain JSON data (TypeError).
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest_json(value: Any) -> str:
    """SHA-256 of the canonical JSON of `value`, 64 hex digits."""
    return digest_bytes(canonical_json(value))


def digest_bytes(data: bytes | memoryview) -> str:
    """SHA-256 of `data`, 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def digest_file(path: Path) -> str:
    """SHA-256 of a file's bytes, read in pieces of 1 MiB."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest_files(files: Mapping[str, Path]) -> str:
    """One digest over several files: their given names and contents, whatever their order or place on disk."""
    return digest_json({name: digest_file(path) for name, path in files.items()})
