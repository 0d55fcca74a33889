"""What an evaluation records of the adapter itself: size, digests, and a merge's certificate. Knows files, no model."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_core.adapters.adapter_folder import WEIGHTS_FILE, adapter_digest
from qlora_core.config.evaluate import EvaluateConfig
from qlora_core.digest import digest_file, digest_files
from qlora_core.errors import EvaluationError

LINEAGE = ("data_digest", "quantized_base_digest", "adapter_digest")


def adapter_facts(config: EvaluateConfig, adapter_folder: Path, lineage: Mapping[str, str]) -> dict[str, Any]:
    """The digests of LINEAGE, size and digest of the adapter's weights, and what a merge's certificate says of them
    (null: none is named). Raises EvaluationError where the certificate cannot be read.
    """
    known = {"adapter_digest": folder_digest(adapter_folder), **lineage}
    parity = None
    if config.parity_certificate is not None:
        path = Path(config.parity_certificate)
        try:
            certificate = json.loads(path.read_bytes())
            parity = {key: certificate[key] for key in ("adapter_digest", "target", "verdict", "chosen")}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise EvaluationError(
                f"evaluate.parity_certificate: {path} is no certificate of a merge ({error!r}); run `qlora merge`"
            ) from error
        parity["sha256"] = digest_file(path)
    return {
        **{name: known.get(name) for name in LINEAGE},
        "adapter_bytes": (adapter_folder / WEIGHTS_FILE).stat().st_size,
        "adapter_weights_digest": adapter_digest(adapter_folder),
        "parity": parity,
    }


def folder_digest(folder: Path) -> str:
    """Identity of a folder: names and bytes of all its files, 64 hex digits."""
    return digest_files({path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()})
