"""Adapters looked at together with their base: do they fit it, is it theirs, and what do they answer on it.

Loads the base only where golden logits ask for it; shapes are compared with a model without weights.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoConfig, PreTrainedModel

from qlora_core.adapters.adapter_folder import AdapterFolder, adapter_digest
from qlora_core.errors import ModelError
from qlora_core.model.adapter import (
    GOLDEN_PROMPTS_FILE,
    Golden,
    attach_adapter,
    expected_shapes,
    golden_logits,
    read_fitting_adapter,
    read_golden,
    verify_golden,
    write_golden,
)
from qlora_core.model.base import load_any
from qlora_core.quantization.auto_class import auto_class

GOLDEN_TOLERANCE = 1e-4
"""Largest difference of any logit in float32 between the adapter's own golden logits and those on the base at hand."""


def check_on_base(base: Path | None, adapters: Sequence[AdapterFolder]) -> None:
    """Refuse adapters that do not fit the base in a folder, or whose golden logits it does not give. None: no check.

    Golden logits tell a base of equal shape from the adapter's own; adapters without them pass on their shapes alone.
    Those that were trained on top of others are compared by shape only: alone they answer nothing that was recorded.

    Raises:
        ModelError: naming the adapter and its first difference.
    """
    if base is None:
        return
    model = empty_model(base)
    for adapter in adapters:
        wanted = expected_shapes(model, adapter.config)
        found = {name: stored.shape for name, stored in adapter.tensors.items()}
        odd = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        if odd:
            raise ModelError(
                f"{adapter.path}: {len(odd)} of {len(wanted)} tensors differ from what this base needs, the first: "
                f"{odd[0]} is {found.get(odd[0], 'missing')}, {wanted.get(odd[0], 'no tensor')} is needed"
            )
    golden = [adapter for adapter in adapters if (adapter.path / GOLDEN_PROMPTS_FILE).is_file()]
    golden = [adapter for adapter in golden if not adapter.provenance.get("parent_adapter_digests")]
    if golden:
        _check_golden(load_any(base, precision="float32"), golden)


def empty_model(folder: Path) -> PreTrainedModel:
    """The model of a checkpoint folder, 4-bit or not, without weights: names and shapes of plain Linear layers.

    Raises:
        ModelError: transformers cannot build it.
    """
    try:
        config: Any = AutoConfig.from_pretrained(folder, local_files_only=True)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"):
            return auto_class(config.model_type).from_config(config)
    except (ValueError, OSError, KeyError) as error:
        raise ModelError(f"{folder} holds no model that transformers can build: {error}; name a checkpoint") from error


def write_golden_of(base: Path, folder: Path, parents: Sequence[Path]) -> None:
    """Golden logits of a new adapter beside it: on its parents' prompts, or on single tokens where they have none."""
    prompts = golden_prompts_of(parents)
    model = attach_adapter(load_any(base, precision="float32"), folder)
    write_golden(folder, Golden(prompts, golden_logits(model, prompts)))


def write_same_answers(base: Path, folder: Path, source: Path) -> float:
    """Golden logits of another form of an adapter beside it, once it answers on the base what `source` answers.

    On the source's golden prompts, or on single tokens where it has none. Returns the largest difference of any logit.

    Raises:
        ModelError: a logit differs by more than GOLDEN_TOLERANCE; nothing was written.
    """
    prompts, model = golden_prompts_of([source]), load_any(base, precision="float32")
    answers = []
    for each in (source, folder):
        attached = attach_adapter(model, each)
        answers.append(golden_logits(attached, prompts))
        attached.unload()
    largest = max((one - other).abs().max().item() for one, other in zip(*answers, strict=True))
    if not largest <= GOLDEN_TOLERANCE:  # NaN too
        raise ModelError(
            f"{folder} answers other than {source}: a logit differs by {largest:.3g}, {GOLDEN_TOLERANCE:g} is allowed; "
            "the disk or the base is damaged, export again"
        )
    write_golden(folder, Golden(prompts, answers[1]))
    return largest


def golden_prompts_of(folders: Sequence[Path], count: int = 3) -> list[list[int]]:
    """Up to `count` different golden prompts of adapters' folders; token ids 1 to 3 where there are none."""
    prompts: list[list[int]] = []
    for folder in folders:
        if (folder / GOLDEN_PROMPTS_FILE).is_file():
            prompts += [prompt for prompt in read_golden(folder).prompts if prompt not in prompts]
    return prompts[:count] or [[token] for token in range(1, count + 1)]


def attach_stack(
    base: PreTrainedModel, folders: Sequence[Path], *, expected_base_digest: str | None = None
) -> PeftModel:
    """The base with adapters that were trained one on top of the other, in order; frozen, in eval mode.

    The base is changed in place. Their deltas add up, each at weight 1.

    Raises:
        ModelError: what `attach_adapter` refuses, or an adapter whose recorded parents are not those before it.
    """
    if not folders:
        raise ModelError("a stack needs at least one adapter folder")
    digests = [adapter_digest(folder) for folder in folders]
    for place, folder in enumerate(folders):
        read_fitting_adapter(base, folder, expected_base_digest=expected_base_digest, on_parents=tuple(digests[:place]))
    names = [f"level_{place}" for place in range(len(folders))]
    model = PeftModel.from_pretrained(base, str(folders[0]), adapter_name=names[0], is_trainable=False)
    for name, folder in zip(names[1:], folders[1:], strict=True):
        model.load_adapter(str(folder), adapter_name=name, is_trainable=False)
    model.base_model.set_adapter(names)  # pyright: ignore[reportCallIssue]  # LoraModel takes several
    return model.requires_grad_(False).eval()


def _check_golden(model: PreTrainedModel, adapters: Sequence[AdapterFolder]) -> None:
    for adapter in adapters:
        attached = attach_adapter(model, adapter.path)
        try:
            verify_golden(attached, adapter.path, atol=GOLDEN_TOLERANCE)
        finally:
            attached.unload()
