"""A merged checkpoint and its certificate as they stand in a folder. Knows digests; loads no model."""

import json
from pathlib import Path
from typing import Any

from qlora_core.digest import digest_files
from qlora_core.errors import ModelError
from qlora_core.quantization.checkpoint import checkpoint_files

CERTIFICATE_FILE = "certificate.json"
CHECKPOINT_KEY = "checkpoint_digest"
"""In a certificate: `checkpoint_digest` of the folder that it was written for."""


def checkpoint_digest(folder: Path) -> str:
    """Identity of a checkpoint: its config, weights and their index."""
    return digest_files(checkpoint_files(folder))


def certificate_of(folder: Path) -> Path:
    """The certificate of a merged checkpoint, after showing that the folder still holds what was certified.

    Raises:
        ModelError: there is none, it cannot be read, or the checkpoint's files are not those it was written for.
    """
    path = folder / CERTIFICATE_FILE
    if not path.is_file():
        raise ModelError(f"{folder} has no {CERTIFICATE_FILE}; name a folder that `qlora merge` wrote")
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        certified = content[CHECKPOINT_KEY]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} is no certificate of a merged checkpoint ({error!r}); merge again") from error
    found = checkpoint_digest(folder)
    if certified != found:
        raise ModelError(
            f"{folder} does not hold the checkpoint that was certified: its files have digest {found}, {path.name} "
            f"says {certified}; merge again"
        )
    return path
