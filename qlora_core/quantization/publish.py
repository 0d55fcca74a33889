"""A 4-bit checkpoint folder outside the store, written whole or not at all. Knows nothing of how to quantize."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from qlora_core.config.quantize import QuantizeConfig
from qlora_core.errors import ConfigError, StoreError
from qlora_core.quantization.checkpoint import check_checkpoint
from qlora_core.quantization.quantize import quantize_checkpoint


def quantize_folder(source: Path, target: Path, config: QuantizeConfig) -> dict[str, Any]:
    """Quantize the checkpoint in `source` to the new folder `target`; returns its quantization.json.

    Raises ConfigError where `target` exists, ModelError for a source that cannot be quantized, StoreError where the
    disk refuses. Until all is written, nothing stands under `target`.
    """
    check_checkpoint(source)
    if target.exists():
        raise ConfigError(f"{target} exists already; name a new folder, or remove it first")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise StoreError(
            f"cannot write to {target.parent}: {error.strerror}; name a folder you may write to"
        ) from error
    try:
        report = quantize_checkpoint(source, staging, config)
        os.chmod(staging, 0o755)  # mkdtemp's folders are private  # noqa: PTH101
        staging.rename(target)
    except OSError as error:
        raise StoreError(
            f"writing {target} failed: {error.strerror or error}; free space or name another folder"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return report
