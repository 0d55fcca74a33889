"""Writes a trained adapter as a PEFT folder and proves it: size, learned weights, and logits after a reload from disk.

The folder holds `adapter_config.json`, `adapter_model.safetensors`, and golden logits (`golden.json`,
`golden.safetensors`) with which anyone can check later that base and adapter still belong together. Knows nothing of
tokenizers, trials or checkpoints.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from transformers import PreTrainedModel

from qlora_core.data.dataset import TokenRow
from qlora_core.errors import TrainingError
from qlora_core.model.adapter import Golden, golden_logits, write_golden
from qlora_core.training.adapter_config import exported
from qlora_core.training.pack.pack import Pack

GOLDEN_PROMPTS = 3
# Largest logit difference after a reload, as a share of the largest logit. CPUs give 0; GPU kernels may round anew.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@dataclass(frozen=True)
class TrainedAdapter:
    """An adapter taken off its base: weights under PEFT's names, and what the base answered with it on.

    `logits[i]` is the last position's logits [V] of `prompts[i]`.
    """

    weights: dict[str, torch.Tensor]
    config: LoraConfig
    prompts: list[list[int]]
    logits: list[torch.Tensor]


def capture(pack: Pack, slot: int, rows: Sequence[TokenRow]) -> TrainedAdapter:
    """What an export needs of the adapter in a slot; golden prompts are the beginnings of the first rows.

    Raises:
        TrainingError: weights that are not finite, or that change nothing: nothing was learned.
    """
    weights = pack.weights(slot)
    tensors, config = exported(weights)
    _check_learned(tensors, [factors.start is not None for factors in weights.factors.values()])
    prompts = golden_prompts(rows)
    with pack.only(slot):
        return TrainedAdapter(tensors, config, prompts, golden_logits(pack.base, prompts))


def write_adapter(base: PreTrainedModel, trained: TrainedAdapter, out: Path) -> None:
    """Write `trained` to `out`, reload it from there with stock PEFT over the clean `base`, and compare logits.

    `out` appears whole or not at all; it may exist only as an empty folder. The base is left clean.

    Raises:
        TrainingError: `out` holds something, a file is too small for its weights, or reloaded logits differ.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise TrainingError(f"{out} is not empty; export to a new folder")
    stage = out.with_name(f".{out.name}.staging")
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    try:
        _write_peft_folder(stage, trained)
        prove_folder(base, trained, stage)
        stage.replace(out)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def prove_folder(base: PreTrainedModel, trained: TrainedAdapter, folder: Path) -> None:
    """Load a PEFT folder over the clean `base`, compare its logits with those of `trained`, and put these beside it.

    Raises:
        TrainingError: they differ.
    """
    _compare(_reloaded_logits(base, folder, trained.prompts), trained.logits, base)
    write_golden(folder, Golden(trained.prompts, trained.logits))


def golden_prompts(rows: Sequence[TokenRow]) -> list[list[int]]:
    """Three prompts of token ids: the part of a row before its first trained token, distinct where rows allow."""
    prompts: list[list[int]] = []
    for row in rows:
        prompt = list(row.input_ids[: max(1, row.loss_mask.index(True))])
        if prompt not in prompts:
            prompts.append(prompt)
        if len(prompts) == GOLDEN_PROMPTS:
            return prompts
    # Fewer different prompts than three: whole rows, then the same again
    candidates = prompts + [list(row.input_ids) for row in rows if list(row.input_ids) not in prompts]
    return [candidates[index % len(candidates)] for index in range(GOLDEN_PROMPTS)]


def _check_learned(weights: Mapping[str, torch.Tensor], started: Sequence[bool]) -> None:
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise TrainingError(f"{name} is not finite; the adapter is not exported. Train again at a lower rate")
    norm = sum(tensor.double().square().sum().item() for name, tensor in weights.items() if "lora_B" in name) ** 0.5
    if norm == 0 and not any(started):
        raise TrainingError(
            "every lora_B matrix is zero, so the adapter changes nothing; check that train.max_steps and "
            "train.learning_rate let it learn"
        )


def _reloaded_logits(base: PreTrainedModel, folder: Path, prompts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """What stock PEFT answers with the folder's adapter on the base, which is clean again afterwards."""
    devices = [base.device] if base.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):  # PEFT draws initial weights before it overwrites them
        model = PeftModel.from_pretrained(base, folder).eval()
    try:
        return golden_logits(model, prompts)
    finally:
        model.unload()
        base.requires_grad_(False)
        base.eval()


def _write_peft_folder(folder: Path, trained: TrainedAdapter) -> None:
    settings = trained.config.to_dict()
    settings["inference_mode"] = True
    # The path of the base on this machine says nothing elsewhere; its digest travels beside the adapter
    settings["base_model_name_or_path"] = None
    text = json.dumps(settings, indent=2, sort_keys=True, default=_plain)
    (folder / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
    file = folder / "adapter_model.safetensors"
    save_file(trained.weights, file, metadata={"format": "pt"})
    least = sum(tensor.nbytes for tensor in trained.weights.values())
    if file.stat().st_size < least:
        raise TrainingError(
            f"{file} has {file.stat().st_size} bytes, but its weights alone are {least}; is the disk full?"
        )


def _plain(value: object) -> object:
    """PEFT keeps some settings as sets, whose order changes from run to run."""
    if isinstance(value, set):
        return sorted(value)
    raise TypeError(f"{value!r} has no JSON form")


def _compare(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], base: PreTrainedModel) -> None:
    tolerance = _TOLERANCE[base.dtype]
    for index, (after, before) in enumerate(zip(found, expected, strict=True)):
        largest = before.abs().max().item()
        difference = (after - before).abs().max().item()
        if not difference <= tolerance * largest:  # written so that NaN fails
            raise TrainingError(
                f"the saved adapter does not reproduce the trained one: logits of golden prompt {index} differ by "
                f"{difference:g} (largest logit {largest:g}, allowed share {tolerance:g})"
            )
