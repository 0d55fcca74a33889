"""What a job will need before it runs: its trials, and bytes of memory from the base's tensor shapes. Imports no torch.

A first-order account: weights, adapter, optimizer state and logits by arithmetic. Activations are left out, since they
depend on the kernels; the figures are therefore floors, and are named so.
"""

import itertools
import os
from typing import Any

from qlora_core.config.pipeline import PipelineConfig
from qlora_core.config.sweep import SweepConfig
from qlora_core.config.train import TrainConfig
from qlora_core.evaluation.judge_client import resolve_kind
from qlora_core.evaluation.judge_openai import planned_cost_usd
from qlora_core.pipeline.pipeline import Pipeline
from qlora_core.quantization.checkpoint import StoredTensor, read_model_config, read_tensors
from qlora_core.sweep.space import trial_count

_STATE_BYTES = {"paged_adamw_32bit": 8, "adamw": 8, "paged_adamw_8bit": 2}
_SECOND_LEVEL_BLOCKSIZE = 256


def planned_trials(config: PipelineConfig) -> list[dict[str, Any]]:
    """The trials' settings where they are known before the run (a grid), else one `{"draw": n}` for each draw."""
    sweep = config.sweep
    if sweep.method == "grid":
        lists = {name: values for name, values in sweep.space.items() if isinstance(values, list)}
        points = itertools.product(*lists.values())
        return [dict(zip(lists, point, strict=True)) for point in points][: trial_count(sweep)]
    return [{"draw": number} for number in range(trial_count(sweep))]


def estimate_judge(config: PipelineConfig) -> dict[str, Any]:
    """The judge to be asked: `kind`, `calls` at most (two orders a prompt), `cost_usd`, and the `budget_usd` cap.

    Raises ConfigError where an endpoint's price is not known.
    """
    kind = resolve_kind(config.evaluate.judge, os.environ)
    return {
        "kind": kind,
        "calls": 0 if kind == "none" else 2 * config.evaluate.max_prompts,
        "cost_usd": planned_cost_usd(config.evaluate, os.environ),
        "budget_usd": config.evaluate.judge.budget_usd,
    }


def estimate_memory(pipeline: Pipeline) -> dict[str, int | str]:
    """Bytes of one worker for its largest trial; a note instead where the base has yet to be made.

    Keys: `quantized_base_bytes`, `adapter_bytes` (float32 weights and gradients), `optimizer_bytes`, `logits_bytes`
    (one micro-batch of the longest rows or packs, float32, with its gradient), `floor_bytes`, the sum: no activations.
    """
    base = pipeline.job.external_base
    if base is None:
        planned = next(stage for stage in pipeline.plan() if stage.name == "base")
        if not planned.cached:
            return {"note": "the demo base is made by the first stage; it needs under 100 MB"}
        folder = pipeline.run("base").artifact.path
    else:
        folder = base.folder
    return _account(pipeline.job.config, read_tensors(folder), read_model_config(folder))


def _account(
    config: PipelineConfig, tensors: dict[str, StoredTensor], model_config: dict[str, Any]
) -> dict[str, int | str]:
    linear = {name: tensor for name, tensor in tensors.items() if _is_quantized(name, tensor, config)}
    parameters = {name: _size(tensor) for name, tensor in tensors.items()}
    quantized = sum(parameters[name] for name in linear)
    kept = sum(parameters.values()) - quantized
    rank = _largest(config.sweep, config.train, "lora_rank")
    adapter = sum(rank * (tensor.shape[0] + tensor.shape[1]) for tensor in linear.values())
    micro_batch = _largest(config.sweep, config.train, "micro_batch_size")
    parts = {
        "quantized_base_bytes": round(quantized * bits_per_parameter(config) / 8) + 4 * kept,
        "adapter_bytes": 8 * adapter,
        "optimizer_bytes": _STATE_BYTES[config.train.optimizer] * adapter,
        "logits_bytes": 8 * micro_batch * _sequence_tokens(config) * int(model_config.get("vocab_size", 0)),
    }
    return {**parts, "floor_bytes": sum(parts.values())}


def bits_per_parameter(config: PipelineConfig) -> float:
    """Stored bits of one quantized weight: 4 + 32/B at blocksize B, with double quantization 4 + 8/B + 32/(256 B).

    Dettmers et al. 2023, section 3: 4.5 and 4.127 at blocksize 64.
    """
    blocksize = config.quantize.blocksize
    if not config.quantize.double_quant:
        return 4 + 32 / blocksize
    return 4 + 8 / blocksize + 32 / (_SECOND_LEVEL_BLOCKSIZE * blocksize)


def _sequence_tokens(config: PipelineConfig) -> int:
    packing = config.data.packing
    return packing.tokens or config.data.max_tokens if packing.enabled else config.data.max_tokens


def _is_quantized(name: str, tensor: StoredTensor, config: PipelineConfig) -> bool:
    module = name.removesuffix(".weight")
    kept = any(module.endswith(skipped) for skipped in config.quantize.skip_modules)
    return len(tensor.shape) == 2 and name.endswith(".weight") and "embed" not in name and not kept


def _size(tensor: StoredTensor) -> int:
    size = 1
    for length in tensor.shape:
        size *= length
    return size


def _largest(sweep: SweepConfig, train: TrainConfig, name: str) -> int:
    """The largest value of a whole-number setting over all trials."""
    values = sweep.space.get(name)
    if values is None:
        return int(getattr(train, name))
    return int(max(values)) if isinstance(values, list) else int(values.high)
