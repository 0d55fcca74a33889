"""The shapes of a base model that decide how much memory it takes: from headers, or from its config alone.

A folder with weights is read from the headers of its safetensors files, a quantized one from its report too, without
torch. A config without weights is turned into a model on the meta device, which has shapes and no values; that imports
torch and transformers. Knows nothing of bytes, trials or devices.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_core.errors import ModelError
from qlora_core.quantization.auto_class import ENCODER_DECODER_TYPES, auto_class, is_supported
from qlora_core.quantization.checkpoint import (
    INDEX_FILE,
    SINGLE_FILE,
    is_quantized,
    read_model_config,
    read_tensors,
)

_HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")
_IN_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.(\d+)\.")
_QUANTIZED_PART = re.compile(r"\.weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..*)$")
_HEADS = ("lm_head.weight", "embed_out.weight")
_REPORT_FILE = "quantization.json"
_DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
_POSITION_TABLE = "relative_attention_bias"
"""T5's table of distances: as flat as a Linear's weight, and none."""

_TRANSPOSED = ("gpt2",)
_LEARNED_POSITIONS = ("gpt2", "opt", "gpt_neo")
CALIBRATED = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gpt_neox", "gpt2")
"""Model types whose kept activations are compared with what autograd keeps, byte for byte, in the tests."""


@dataclass(frozen=True)
class LinearShape:
    """A Linear of a decoder layer: `name` as in the model, W of [out_features, in_features]."""

    name: str
    in_features: int
    out_features: int

    @property
    def parameters(self) -> int:
        """Weights, without a bias."""
        return self.in_features * self.out_features


@dataclass(frozen=True)
class ModelShapes:
    """What the account needs of a base.

    `linears` are all Linears inside decoder layers; `kept_parameters` counts everything else once where it is tied:
    embeddings, output head, norms, biases. `norm_widths` are the sizes of one layer's norms, as many numbers a token as
    each normalizes, `norm_vectors` how many vectors a token those are. `layer_norm`: they subtract the mean
    (LayerNorm) and are not RMSNorm. `parallel`: attention and MLP stand side by side and read the same tensor.
    `rotary`: q and k are turned by their positions. `stored_bytes`: of a number of the weights that are not quantized,
    as the config names their dtype; float32 where it names none.
    """

    model_type: str
    layers: int
    hidden: int
    vocabulary: int
    heads: int
    kv_heads: int
    head_dim: int
    activation: str
    linears: tuple[LinearShape, ...]
    kept_parameters: int
    norm_widths: tuple[int, ...]
    norm_vectors: int
    layer_norm: bool
    parallel: bool
    rotary: bool
    stored_bytes: int = 4

    @property
    def parameters(self) -> int:
        """All weights of the base."""
        return self.kept_parameters + sum(linear.parameters for linear in self.linears)

    @property
    def first_layer(self) -> tuple[LinearShape, ...]:
        """The Linears of one decoder layer: of the first, all being alike."""
        numbers = {linear: number for linear in self.linears if (number := _layer_number(linear.name)) is not None}
        first = min(numbers.values(), default=None)
        return tuple(linear for linear, number in numbers.items() if number == first)

    @property
    def calibrated(self) -> bool:
        """Whether the activations of this kind of model were compared with what autograd keeps."""
        return self.model_type in CALIBRATED


def read_shapes(model: str | Path, revision: str | None = None) -> ModelShapes:
    """The shapes of a checkpoint folder, of a folder or file that holds a config alone, or of a hub name.

    Of a hub model only `config.json` is fetched.

    Raises:
        ModelError: there is no config, it is of no causal language model, or the hub cannot be reached.
    """
    path = Path(model)
    if path.is_file() and path.name == "config.json":
        return _from_config(path.parent, str(path))
    if not path.is_dir():
        if not _HUB_NAME.match(str(model)):
            raise ModelError(
                f"{model} is no checkpoint folder, no config.json and no hub name of the form owner/model; name one"
            )
        return _from_config(_fetch_config(str(model), revision), str(model))
    if not any((path / name).is_file() for name in (SINGLE_FILE, INDEX_FILE)):
        return _from_config(path, str(path))
    config = read_model_config(path)
    if is_quantized(path) and not (path / _REPORT_FILE).is_file():
        return _from_config(path, str(path))
    return _shapes(config, *_from_headers(path, config))


def _from_headers(folder: Path, config: Mapping[str, Any]) -> tuple[dict[str, tuple[int, ...]], list[LinearShape]]:
    """Parameters outside the quantized Linears by name, and the Linears."""
    tensors = {name: stored.shape for name, stored in read_tensors(folder).items() if not _QUANTIZED_PART.search(name)}
    linears: list[LinearShape] = []
    if is_quantized(folder):
        report = json.loads((folder / _REPORT_FILE).read_text(encoding="utf-8"))
        linears += [LinearShape(layer["name"], layer["shape"][1], layer["shape"][0]) for layer in report["layers"]]
    quantized = {f"{linear.name}.weight" for linear in linears}
    linears += [
        _linear(name.removesuffix(".weight"), shape, transposed=config["model_type"] in _TRANSPOSED)
        for name, shape in tensors.items()
        if len(shape) == 2
        and name.endswith(".weight")
        and _IN_LAYER.search(name)
        and name not in quantized
        and _POSITION_TABLE not in name
    ]
    weights = {f"{linear.name}.weight" for linear in linears}
    tied = _HEADS if config.get("tie_word_embeddings", False) else ()
    kept = {
        name: shape
        for name, shape in tensors.items()
        if name not in weights and name not in tied and len(shape) <= 2 and name.endswith((".weight", ".bias"))
    }
    return kept, linears


def _from_config(folder: Path, called: str) -> ModelShapes:
    """Shapes of a model on the meta device, made from the config."""
    import torch
    from transformers import AutoConfig
    from transformers.pytorch_utils import Conv1D

    model_type = read_model_config(folder)["model_type"]
    if not is_supported(model_type):
        raise ModelError(
            f"{called}: model_type {model_type!r} is no causal language model of this transformers; name a base that is"
        )
    try:
        config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"):
            model = auto_class(model_type).from_config(config, trust_remote_code=False)
    except (ValueError, KeyError, OSError, TypeError) as error:
        raise ModelError(
            f"no causal language model can be made from the config of {called}: {error}; name a checkpoint folder"
        ) from error
    linears = [
        _linear(name, tuple(module.weight.shape), transposed=isinstance(module, Conv1D))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and _IN_LAYER.search(name)
    ]
    weights = {f"{linear.name}.weight" for linear in linears}
    kept = {name: tuple(value.shape) for name, value in model.named_parameters() if name not in weights}
    return _shapes(config.get_text_config(decoder=True).to_dict(), kept, linears)


def _fetch_config(name: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(hf_hub_download(name, "config.json", revision=revision)).parent
    except (RepositoryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"cannot fetch config.json of {name} from the hub: {error}; check name and network, or give a folder with "
            "the model's config.json"
        ) from error


def _shapes(
    config: Mapping[str, Any], kept: Mapping[str, tuple[int, ...]], linears: Iterable[LinearShape]
) -> ModelShapes:
    text = config.get("text_config")
    config = {**config, **text} if isinstance(text, dict) else config
    hidden = _first(config, "hidden_size", "n_embd", "d_model")
    heads = _first(config, "num_attention_heads", "n_head", "num_heads")
    kv_heads = int(config.get("num_key_value_heads") or heads)
    head_dim = int(_any(config, "head_dim", "d_kv") or hidden // heads)
    norms = _first_layer_norms(kept)
    vectors = {name: _norm_vectors(name, size, head_dim, heads, kv_heads) for name, size in norms.items()}
    return ModelShapes(
        model_type=str(config["model_type"]),
        # A layer of T5 is one of the encoder with the decoder's of the same number
        layers=_first(config, "num_hidden_layers", "n_layer", "num_layers"),
        hidden=hidden,
        vocabulary=_first(config, "vocab_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        activation=str(
            _any(config, "hidden_activation", "hidden_act", "activation_function", "dense_act_fn") or "silu"
        ),
        linears=tuple(linears),
        kept_parameters=sum(math.prod(shape) for shape in kept.values()),
        norm_widths=tuple(size * vectors[name] for name, size in norms.items()),
        norm_vectors=sum(vectors.values()),
        layer_norm=any(f"{name}.bias" in kept for name in norms),
        rotary=config["model_type"] not in (*_LEARNED_POSITIONS, *ENCODER_DECODER_TYPES),
        stored_bytes=_DTYPE_BYTES.get(str(_any(config, "dtype", "torch_dtype")), 4),
        parallel=bool(config.get("use_parallel_residual", config["model_type"] == "gpt_neox")),
    )


def _first_layer_norms(kept: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Norms of the first decoder layer by name: its 1-D weights, whose size is what they normalize over."""
    found: dict[str, int] = {}
    lowest = min((number for name in kept if (number := _layer_number(name)) is not None), default=None)
    for name, shape in kept.items():
        if len(shape) == 1 and name.endswith(".weight") and _layer_number(name) == lowest is not None:
            found[name.removesuffix(".weight")] = shape[0]
    return found


def _norm_vectors(name: str, size: int, head_dim: int, heads: int, kv_heads: int) -> int:
    """Vectors a token that a norm takes: one, or one for each head where it is as wide as a head."""
    if size != head_dim:
        return 1
    last = name.rpartition(".")[2]
    return heads if last.startswith("q_") else kv_heads if last.startswith("k_") else 1


def _linear(name: str, shape: tuple[int, ...], *, transposed: bool) -> LinearShape:
    out_features, in_features = reversed(shape) if transposed else shape
    return LinearShape(name, in_features, out_features)


def _layer_number(name: str) -> int | None:
    found = _IN_LAYER.search(name)
    return int(found[1]) if found else None


def _any(config: Mapping[str, Any], *names: str) -> Any:
    return next((config[name] for name in names if config.get(name) is not None), None)


def _first(config: Mapping[str, Any], *names: str) -> int:
    value = _any(config, *names)
    if not isinstance(value, int) or value < 1:
        raise ModelError(
            f"the model config names no {names[0]}, so its memory cannot be planned; add it to config.json"
        )
    return value
