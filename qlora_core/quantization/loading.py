"""The one place where transformers loads weights: from a local folder, safetensors only, quietly, and completely.

Knows nothing of what the folder should hold.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from qlora_core.errors import ModelError


def load_model(folder: Path, **settings: Any) -> PreTrainedModel:
    """The causal language model of a checkpoint folder; `settings` go to `from_pretrained`. Never touches the network.

    Raises:
        ModelError: transformers refuses the folder, or weights that the architecture needs are not in it.
    """
    try:
        with without_bars():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
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
    return model


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
