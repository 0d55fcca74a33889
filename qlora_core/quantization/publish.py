"""The command's door to quantization: a checkpoint folder, or one in a store, to a new folder. Knows no numbers."""

import tempfile
from pathlib import Path
from typing import Any

from qlora_core.config.quantize import QuantizeConfig
from qlora_core.errors import ConfigError
from qlora_core.quantization.quantize import quantize_checkpoint
from qlora_core.quantization.tensor_source import open_stored_checkpoint


def quantize_folder(source: Path | str, target: Path, config: QuantizeConfig) -> dict[str, Any]:
    """Quantize the checkpoint `source` to the new folder `target`; returns its quantization.json.

    `source` is a folder, or the address of an artifact: `s3://bucket/prefix/v1/stage/base/<key>`, whose weights are
    read by ranges and never stored here. Until all is written, nothing stands under `target`; the same call goes on
    where a killed one ended.

    Raises ConfigError where `target` exists, ModelError for a source that cannot be quantized, StoreError where the
    disk or the store refuses.
    """
    if target.exists():
        raise ConfigError(f"{target} exists already; name a new folder, or remove it first")
    if "://" not in str(source):
        return quantize_checkpoint(Path(source), target, config)
    with (
        tempfile.TemporaryDirectory(prefix="qlora-store-") as cache,
        open_stored_checkpoint(str(source), Path(cache)) as stored,
    ):
        return quantize_checkpoint(stored, target, config)
