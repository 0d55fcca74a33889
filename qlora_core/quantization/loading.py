"""The one place where transformers loads weights: from a local folder, safetensors only, quietly, and completely.

Knows nothing of what the folder should hold.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.integrations.bitsandbytes import Bnb4bitDeserialize
from transformers.utils import logging as transformers_logging

from qlora_core.errors import ModelError
from qlora_core.quantization.auto_class import auto_class
from qlora_core.quantization.checkpoint import read_model_config


def load_model(folder: Path, **settings: Any) -> PreTrainedModel:
    """The language model of a checkpoint folder; `settings` go to `from_pretrained`. Never touches the network.

    Raises:
        ModelError: transformers refuses the folder, or weights that the architecture needs are not in it.
    """
    try:
        with without_bars():
            loaded: Any = auto_class(read_model_config(folder)["model_type"]).from_pretrained(
                folder, local_files_only=True, use_safetensors=True, output_loading_info=True, **settings
            )
    except (ValueError, RuntimeError, KeyError, OSError) as error:
        raise ModelError(f"transformers cannot load {folder}: {error}; does config.json fit the weights?") from error
    model, info = loaded
    lacking = sorted(info["missing_keys"])
    if lacking:
        raise ModelError(
            f"{folder} lacks {len(lacking)} weights that its config.json asks for: {', '.join(lacking[:5])}; "
            "fetch the whole checkpoint again"
        )
    _keep_savable(model)
    return model


def _keep_savable(model: Any) -> None:
    """Let `save_pretrained` write 4-bit weights as the layers' own `state_dict` has them.

    transformers 5.23 undoes at saving every conversion it made at loading, and has no way back from bitsandbytes'
    weights (`reverse_op` is not implemented): it could not save what it has loaded.
    """
    conversions = getattr(model, "_weight_conversions", None) or []
    model._weight_conversions = [
        conversion
        for conversion in conversions
        if not any(isinstance(step, Bnb4bitDeserialize) for step in getattr(conversion, "operations", ()))
    ]


@contextmanager
def without_bars() -> Iterator[None]:
    """Without transformers' own progress bars, which are drawn into logs too; the stages show theirs on terminals."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
