"""What a base checkpoint folder must hold, and which of its files make its identity.

Reads `config.json` and the headers of safetensors files. Knows neither torch nor transformers, so that a plan can look
at a checkpoint without loading them; whether transformers has the architecture is asked in `quantize.py`.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_core.errors import ModelError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)

_DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64,
}  # fmt: skip
_QUANTIZABLE = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_LARGEST_HEADER_BYTES = 100_000_000  # safetensors' own limit
_CONVERT = (
    'convert it once, where you trust the file: python -c "from transformers import AutoModelForCausalLM as M; '
    "M.from_pretrained('{folder}').save_pretrained('{folder}-safetensors')\", copy the tokenizer files beside it, and "
    "name that folder"
)


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as a safetensors header describes it; `dtype` in safetensors' words (F32, BF16, U8, ...)."""

    dtype: str
    shape: tuple[int, ...]
    size_bytes: int


def check_checkpoint(folder: Path) -> None:
    """Refuse a folder that cannot be quantized: what is missing, damaged, pickled or already quantized is named.

    Reads headers only, so the values (NaN, infinity) are checked when the weights are loaded.

    Raises:
        ModelError: with the file or tensor and the next step.
    """
    config = read_model_config(folder)
    if "quantization_config" in config:
        method = _method_of(config)
        raise ModelError(
            f"{folder} is already quantized ({method}): quantizing twice adds error on error; name the original "
            "16- or 32-bit checkpoint"
        )
    tensors = read_tensors(folder)
    wrong = {tensor.dtype: name for name, tensor in tensors.items() if _is_float(tensor) and not _can_quantize(tensor)}
    if wrong:
        dtype, name = next(iter(sorted(wrong.items())))
        raise ModelError(
            f"{folder}: tensor {name} is stored as {dtype}; {', '.join(_QUANTIZABLE.values())} can be quantized; "
            "convert the checkpoint to one of these first"
        )
    if not any(_can_quantize(tensor) for tensor in tensors.values()):
        raise ModelError(f"{folder}: its safetensors files hold no floating-point weight; name a model checkpoint")


def read_model_config(folder: Path) -> dict[str, Any]:
    """The model config (`config.json`) of a checkpoint folder.

    Raises:
        ModelError: the folder or the file is missing, no JSON object, or names no `model_type`.
    """
    if not folder.is_dir():
        raise ModelError(f"base model folder {folder} does not exist; name a Hugging Face checkpoint folder")
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"{folder} has no config.json, so it is no checkpoint; name the folder that has one")
    config = _read_json_object(path)
    if not isinstance(config.get("model_type"), str):
        raise ModelError(f'{path} names no model_type (such as "llama"); it is no model config of transformers')
    return config


def is_quantized(folder: Path) -> bool:
    """Whether the checkpoint's config says its weights are stored quantized."""
    return "quantization_config" in read_model_config(folder)


def checkpoint_files(folder: Path) -> dict[str, Path]:
    """The files that make a checkpoint's identity, by name: config, generation config, weights and their index.

    Raises:
        ModelError: no config, no safetensors weights, or a shard that the index names is missing.
    """
    read_model_config(folder)
    files = {"config.json": folder / "config.json"}
    for name in ("generation_config.json", INDEX_FILE):
        if (folder / name).is_file():
            files[name] = folder / name
    files.update({path.name: path for path in weight_files(folder)})
    return dict(sorted(files.items()))


def tokenizer_files(folder: Path) -> dict[str, Path]:
    """The files that make a tokenizer's identity, by name: vocabulary, settings, special tokens, chat templates.

    Raises:
        ModelError: none of them is there.
    """
    found = {name: folder / name for name in TOKENIZER_FILES if (folder / name).is_file()}
    templates = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    found.update({f"{path.parent.name}/{path.name}": path for path in templates})
    if not found:
        raise ModelError(f"{folder} has no tokenizer files (tokenizer.json or others); copy the base model's beside it")
    return found


def max_positions(folder: Path) -> int:
    """The longest sequence, in tokens, that the model config allows.

    Raises:
        ModelError: the config does not say.
    """
    config = read_model_config(folder)
    text_config = config.get("text_config")
    for source in (config, text_config if isinstance(text_config, dict) else {}):
        for key in ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length", "n_ctx"):
            value = source.get(key)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    raise ModelError(f"{folder / 'config.json'} names no max_position_embeddings; add the longest sequence to it")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: the single one, or every shard its index names, in name order.

    Raises:
        ModelError: only pickles, no weights, or missing shards.
    """
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    if not (folder / INDEX_FILE).is_file():
        raise _no_weights(folder)
    shards = sorted(set(_read_weight_map(folder / INDEX_FILE).values()))
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing:
        raise ModelError(
            f"{folder}: {INDEX_FILE} names {len(shards)} shards, of which {len(missing)} are missing: "
            f"{', '.join(missing[:5])}; fetch the whole checkpoint again"
        )
    return [folder / name for name in shards]


def read_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint by name, from the headers of its safetensors files; sizes are checked on the way.

    Raises:
        ModelError: a truncated or damaged file, or an index that does not agree with its shards.
    """
    tensors: dict[str, StoredTensor] = {}
    found_in: dict[str, str] = {}
    for path in weight_files(folder):
        for name, tensor in read_safetensors_header(path).items():
            tensors[name] = tensor
            found_in[name] = path.name
    if not (folder / SINGLE_FILE).is_file():
        wanted = _read_weight_map(folder / INDEX_FILE)
        astray = sorted(name for name, shard in wanted.items() if found_in.get(name) != shard)
        if astray:
            raise ModelError(
                f"{folder}: {INDEX_FILE} places {astray[0]} in {wanted[astray[0]]}, which does not hold it "
                f"({len(astray)} such tensors); fetch the whole checkpoint again"
            )
    return tensors


def read_safetensors_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, from its header (8 bytes of length, JSON, then the data without gaps).

    Raises:
        ModelError: the file is shorter or longer than its header says, or the header is damaged.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        prefix = stream.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > _LARGEST_HEADER_BYTES or 8 + length > size:
            raise _damaged(path, f"its header should take {length} bytes, the file has {size}")
        raw = stream.read(length)
    try:
        header = json.loads(raw)
    except ValueError as error:
        raise _damaged(path, f"its header is no JSON ({error})") from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is no JSON object")
    tensors: dict[str, StoredTensor] = {}
    spans: list[tuple[int, int]] = []
    for name, entry in header.items():
        if name != "__metadata__":
            tensors[name], span = _read_entry(path, name, entry)
            spans.append(span)
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise _damaged(path, f"its tensors leave a gap or overlap at byte {end}")
        end = stop
    if 8 + length + end != size:
        raise _damaged(path, f"its tensors end at byte {8 + length + end}, the file has {size}")
    return tensors


def checkpoint_dtype(folder: Path) -> str:
    """The torch name of the dtype that holds every weight exactly: 16-bit if all agree on one, else float32."""
    dtypes = {tensor.dtype for tensor in read_tensors(folder).values() if _is_float(tensor)}
    return _QUANTIZABLE[dtypes.pop()] if len(dtypes) == 1 else "float32"


def _read_entry(path: Path, name: str, entry: Any) -> tuple[StoredTensor, tuple[int, int]]:
    try:
        dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        size = math.prod(shape) * _DTYPE_BITS[dtype] // 8
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"the header's entry of tensor {name} cannot be read: {entry!r:.200}") from error
    if stop - start != size:
        raise _damaged(
            path, f"tensor {name} ({dtype} {list(shape)}) needs {size} bytes, its entry spans {stop - start}"
        )
    return StoredTensor(dtype=dtype, shape=shape, size_bytes=size), (start, stop)


def _read_weight_map(path: Path) -> Mapping[str, str]:
    weight_map = _read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{path} has no weight_map; fetch the whole checkpoint again")
    outside = [name for name in weight_map.values() if not isinstance(name, str) or Path(name).name != name]
    if outside:
        raise ModelError(f"{path} names {outside[0]!r} as a shard; shards must be files of the same folder")
    return weight_map


def _read_json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is no valid JSON ({error}); fetch the file again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a {type(value).__name__}, not a JSON object; fetch the file again")
    return value


def _no_weights(folder: Path) -> ModelError:
    pickles = sorted(_pickles(folder))
    if pickles:
        return ModelError(
            f"{folder} keeps its weights in {pickles[0].name}, a pickle, which can run code when it is read and is "
            f"refused; {_CONVERT.format(folder=folder)}"
        )
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    seen = f"it has {', '.join(others[:3])}, but no {INDEX_FILE}" if others else "it has no *.safetensors file"
    return ModelError(f"{folder} holds no weights ({SINGLE_FILE}, or shards with {INDEX_FILE}): {seen}; fetch them")


def _pickles(folder: Path) -> Iterator[Path]:
    return (path for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES and path.is_file())


def _damaged(path: Path, what: str) -> ModelError:
    return ModelError(f"{path} is truncated or damaged: {what}; fetch the file again")


def _method_of(config: Mapping[str, Any]) -> str:
    settings = config["quantization_config"]
    return str(settings.get("quant_method", "unknown method")) if isinstance(settings, dict) else "unknown method"


def _is_float(tensor: StoredTensor) -> bool:
    return tensor.dtype.startswith(("F", "BF"))


def _can_quantize(tensor: StoredTensor) -> bool:
    return tensor.dtype in _QUANTIZABLE
