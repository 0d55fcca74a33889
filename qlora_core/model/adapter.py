"""Puts a LoRA adapter on a loaded base after checking that it is whole and fits, and pins what the pair computes.

PEFT itself only warns when tensors are missing and skips what it does not know, so the folder is read and compared with
the base first. Knows PEFT's folder layout; knows nothing of training.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora_core.errors import ModelError
from qlora_core.model.encoder_decoder import start_of_answer
from qlora_core.quantization.checkpoint import read_safetensors_header

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PROVENANCE_FILE = "qlora.json"
GOLDEN_PROMPTS_FILE = "golden.json"
GOLDEN_LOGITS_FILE = "golden.safetensors"
PARENTS_KEY = "parent_adapter_digests"
"""In `qlora.json`: the adapters that lay under this one while it was trained, in order."""
_PREFIX = "base_model.model."
_BEYOND_LORA = (
    "modules_to_save", "layer_replication", "target_parameters", "trainable_token_indices", "lora_bias",
    "alora_invocation_tokens", "use_qalora", "use_bdlora", "velora_config", "monteclora_config", "arrow_config",
    "kasa_config",
)  # fmt: skip
# Other starts may rewrite the base's weights, and do so again when PEFT loads the adapter
_STARTS_BESIDE_THE_BASE = (None, True, False, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class AdapterNorms:
    """Frobenius norms over all A and all B factors. `b` is 0 for an adapter that was never trained and does nothing."""

    a: float
    b: float


@dataclass(frozen=True)
class Golden:
    """Prompts (token ids) and, for each, the logits [vocabulary] that follow its last token, in float32."""

    prompts: list[list[int]]
    logits: list[torch.Tensor]


def attach_adapter(base: PreTrainedModel, folder: Path, *, expected_base_digest: str | None = None) -> PeftModel:
    """The base with the adapter of a PEFT folder on it, frozen and in eval mode; `base` itself is changed in place.

    `expected_base_digest`: digest of the quantized base in use, which the folder's `qlora.json` must name too.

    Raises:
        ModelError: naming the first difference: a missing, damaged or pickled file, an adapter that is not plain LoRA,
            a tensor that is missing, unknown, misshapen or not finite, another base's digest, or an adapter that was
            trained on top of another.
    """
    read_fitting_adapter(base, folder, expected_base_digest=expected_base_digest)
    model = PeftModel.from_pretrained(base, str(folder), is_trainable=False)
    return model.eval()


def read_fitting_adapter(
    base: PreTrainedModel,
    folder: Path,
    *,
    expected_base_digest: str | None = None,
    on_parents: Sequence[str] = (),
) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """The settings and tensors of a PEFT folder, on the CPU, once they are known to be whole, finite and of this base.

    Arguments and errors as of `attach_adapter`; the base is only looked at. `on_parents`: digests of the adapters that
    lie under it.
    """
    config = read_adapter_config(folder)
    _check_base_digest(folder, expected_base_digest)
    _check_parents(folder, on_parents)
    tensors = read_adapter_tensors(folder)
    _check_fit(folder, expected_shapes(base, config), tensors)
    return config, tensors


def read_adapter_config(folder: Path) -> LoraConfig:
    """The LoRA settings of a PEFT folder.

    Raises:
        ModelError: no or invalid `adapter_config.json`, or settings beyond A and B factors, and DoRA's
            magnitudes, on Linear layers (biases, fully trained modules, a start that rewrites the base such as PiSSA,
            and so on).
    """
    raw = _read_json(folder / CONFIG_FILE, "name a PEFT adapter folder")
    if raw.get("peft_type") != "LORA":
        raise ModelError(f"{folder / CONFIG_FILE}: peft_type is {raw.get('peft_type')!r}; only LORA adapters are used")
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (TypeError, ValueError) as error:
        raise ModelError(f"{folder / CONFIG_FILE} cannot be read by PEFT: {error}; export the adapter again") from error
    beyond = {key: raw[key] for key in _BEYOND_LORA if raw.get(key)}
    if raw.get("bias", "none") != "none":
        beyond["bias"] = raw["bias"]
    if raw.get("init_lora_weights") not in _STARTS_BESIDE_THE_BASE:
        beyond["init_lora_weights"] = raw["init_lora_weights"]
    if beyond or not isinstance(config, LoraConfig) or not config.target_modules:
        raise ModelError(
            f"{folder / CONFIG_FILE} asks for more or less than LoRA on named modules ({beyond or 'no targets'}); "
            "train the adapter with target_modules alone"
        )
    return config


def read_adapter_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a PEFT folder's safetensors file, on the CPU.

    Raises:
        ModelError: the file is missing (a pickled `adapter_model.bin` is refused) or damaged.
    """
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        pickled = (
            " It has adapter_model.bin, a pickle, which is refused." if (folder / "adapter_model.bin").is_file() else ""
        )
        raise ModelError(f"{folder} has no {WEIGHTS_FILE}.{pickled} Export the adapter with safe_serialization=True")
    read_safetensors_header(path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ModelError(f"{path} cannot be read: {error}; export the adapter again") from error


def expected_shapes(base: PreTrainedModel, config: LoraConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that an adapter of these settings has on this base.

    Raises:
        ModelError: a target is no Linear layer, or no module of the base is a target.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    ranks = config.rank_pattern or {}
    for name, module in base.named_modules():
        found = check_target_module_exists(config, name)
        if not found:
            continue
        if not isinstance(module, (torch.nn.Linear, Conv1D)):
            raise ModelError(
                f"the adapter targets {name}, a {type(module).__name__}; only Linear layers can carry LoRA here"
            )
        wide_in, wide_out = _features(module)
        rank = ranks.get(get_pattern_key(list(ranks), name), config.r)
        a_name, b_name = tensor_names(name)
        shapes[a_name], shapes[b_name] = (rank, wide_in), (wide_out, rank)
        if config.use_dora:
            shapes[magnitude_name(name)] = (wide_out,)
    if not shapes:
        raise ModelError(
            f"the adapter's target_modules {config.target_modules} name no module of this base; use its own base"
        )
    return shapes


def tensor_names(module: str) -> tuple[str, str]:
    """The names under which PEFT's files hold the A and B factors of a module of the base."""
    return f"{_PREFIX}{module}.lora_A.weight", f"{_PREFIX}{module}.lora_B.weight"


def magnitude_name(module: str) -> str:
    """The name under which PEFT's files hold DoRA's magnitudes of a module of the base."""
    return f"{_PREFIX}{module}.lora_magnitude_vector"


def target_modules_of(tensors: Iterable[str]) -> list[str]:
    """The base's modules, sorted, that the tensors of these names belong to."""
    return sorted({name.removeprefix(_PREFIX).rpartition(".lora_")[0] for name in tensors})


def adapter_norms(folder: Path) -> AdapterNorms:
    """How large an adapter's factors are: `b` of 0 says that it changes nothing."""
    tensors = read_adapter_tensors(folder)
    return AdapterNorms(
        a=_norm([tensor for name, tensor in tensors.items() if ".lora_A." in name]),
        b=_norm([tensor for name, tensor in tensors.items() if ".lora_B." in name]),
    )


def golden_logits(model: PreTrainedModel | PeftModel, prompts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """For each prompt (token ids, not empty) alone: the logits [vocabulary] after its last token, in float32 on CPU.

    With an encoder and a decoder: those of the first token of the answer.
    """
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        logits = [
            model(
                input_ids=torch.tensor([list(prompt)], device=model.device), use_cache=False, **start_of_answer(model)
            ).logits[0, -1]
            for prompt in prompts
        ]
    model.train(was_training)
    return [row.float().cpu().clone() for row in logits]


def write_golden(folder: Path, golden: Golden) -> None:
    """Write the prompts as JSON and the logits as safetensors beside the adapter."""
    if not golden.prompts or len(golden.prompts) != len(golden.logits):
        raise ModelError(
            f"{len(golden.prompts)} golden prompts and {len(golden.logits)} logits: one each, at least one, are needed"
        )
    content = {"prompts": [list(prompt) for prompt in golden.prompts]}
    (folder / GOLDEN_PROMPTS_FILE).write_text(json.dumps(content) + "\n", encoding="utf-8")
    save_file(
        {f"logits_{place}": row.float().contiguous() for place, row in enumerate(golden.logits)},
        folder / GOLDEN_LOGITS_FILE,
    )


def read_golden(folder: Path) -> Golden:
    """What `write_golden` wrote.

    Raises:
        ModelError: a file is missing or damaged, or the two do not belong together.
    """
    prompts = _read_json(folder / GOLDEN_PROMPTS_FILE, "export the adapter again").get("prompts")
    path = folder / GOLDEN_LOGITS_FILE
    if not path.is_file():
        raise ModelError(f"{path} is missing; export the adapter again")
    read_safetensors_header(path)
    tensors = load_file(path)
    if not isinstance(prompts, list) or sorted(tensors) != sorted(f"logits_{place}" for place in range(len(prompts))):
        raise ModelError(
            f"{folder}: {GOLDEN_PROMPTS_FILE} and {GOLDEN_LOGITS_FILE} do not match; export the adapter again"
        )
    return Golden(prompts=prompts, logits=[tensors[f"logits_{place}"] for place in range(len(prompts))])


def verify_golden(model: PreTrainedModel | PeftModel, folder: Path, *, atol: float) -> float:
    """The largest difference between the logits `model` gives now and those stored beside the adapter.

    Raises:
        ModelError: it is above `atol`, or the shapes differ.
    """
    golden = read_golden(folder)
    largest = 0.0
    for place, (found, stored) in enumerate(zip(golden_logits(model, golden.prompts), golden.logits, strict=True)):
        if found.shape != stored.shape:
            raise ModelError(
                f"golden prompt {place} of {folder} gives {list(found.shape)} logits, {list(stored.shape)} are stored: "
                "another base"
            )
        difference = (found.double() - stored.double()).abs().max().item()
        if not difference <= atol:  # NaN too
            raise ModelError(
                f"golden prompt {place} of {folder}: logits differ by {difference:.3g}, {atol:.3g} is allowed; the "
                "adapter, the base or their precision is not the one that was exported"
            )
        largest = max(largest, difference)
    return largest


def _check_base_digest(folder: Path, expected: str | None) -> None:
    if expected is None:
        return
    provenance = _read_json(
        folder / PROVENANCE_FILE, "only adapters exported with their provenance can be bound to a base"
    )
    found = provenance.get("quantized_base_digest")
    if found != expected:
        raise ModelError(
            f"{folder / PROVENANCE_FILE}: the adapter was trained on base {found}, the base in use is {expected}; use "
            "the base it was trained on"
        )


def _check_parents(folder: Path, present: Sequence[str]) -> None:
    if not (folder / PROVENANCE_FILE).is_file():
        return
    wanted = _read_json(folder / PROVENANCE_FILE, "export the adapter again").get(PARENTS_KEY) or []
    if list(wanted) != list(present):
        raise ModelError(
            f"{folder} was trained on top of {len(wanted)} other adapters ({', '.join(one[:16] for one in wanted)}), "
            f"{len(present)} are under it here; load them together (attach_stack), or fuse them with `qlora compose`, "
            "method sequential"
        )


def _check_fit(folder: Path, wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, torch.Tensor]) -> None:
    path = folder / WEIGHTS_FILE
    missing, unknown = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing:
        raise ModelError(
            f"{path} lacks {len(missing)} of {len(wanted)} tensors, the first: {missing[0]}; export it again"
        )
    if unknown:
        raise ModelError(
            f"{path} holds {len(unknown)} tensors that this base has no place for, the first: {unknown[0]}"
        )
    for name in sorted(wanted):
        if tuple(found[name].shape) != wanted[name]:
            raise ModelError(
                f"{path}: {name} has shape {list(found[name].shape)}, this base and rank need {list(wanted[name])}"
            )
        if not torch.isfinite(found[name]).all():
            raise ModelError(
                f"{path}: {name} holds NaN or infinity; train the adapter again with a lower learning rate"
            )


def _features(module: torch.nn.Linear | Conv1D) -> tuple[int, int]:
    return (module.nx, module.nf) if isinstance(module, Conv1D) else (module.in_features, module.out_features)


def _norm(tensors: Sequence[torch.Tensor]) -> float:
    return math.sqrt(math.fsum(tensor.double().square().sum().item() for tensor in tensors))


def _read_json(path: Path, next_step: str) -> dict[str, Any]:
    if not path.is_file():
        raise ModelError(f"{path} is missing; {next_step}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is no valid JSON ({error}); {next_step}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a {type(value).__name__}, not a JSON object; {next_step}")
    return value
