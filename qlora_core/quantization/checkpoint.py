"""What a base checkpoint folder must hold, and which of its files make its identity.

Reads `config.json` and the headers of safetensors files. Knows neither torch nor transformers, so that a plan can look
at a checkpoint without loading them; whether transformers has the architecture is asked in `quantize.py`.
"""

import json
import math
from collections.abc import Collection, Mapping
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
    """One tensor as a safetensors header describes it; `dtype` in safetensors' words (F32, BF16, U8, ...).

    Its bytes are the `size_bytes` from byte `offset` of the file called `file`.
    """

    dtype: str
    shape: tuple[int, ...]
    size_bytes: int
    offset: int
    file: str


def check_checkpoint(folder: Path) -> None:
    """Refuse a folder that cannot be quantized: what is missing, damaged, pickled or already quantized is named.

    Reads headers only, so the values (NaN, infinity) are checked when the weights are loaded.

    Raises:
        ModelError: with the file or tensor and the next step.
    """
    check_unquantized(folder)
    check_dtypes(str(folder), read_tensors(folder))


def check_unquantized(folder: Path) -> None:
    """Refuse a folder whose config is missing, damaged, or says that its weights are quantized already.

    Raises:
        ModelError: with the file and the next step.
    """
    config = read_model_config(folder)
    if "quantization_config" in config:
        method = _method_of(config)
        raise ModelError(
            f"{folder} is already quantized ({method}): quantizing twice adds error on error; name the original "
            "16- or 32-bit checkpoint"
        )


def check_dtypes(location: str, tensors: Mapping[str, StoredTensor]) -> None:
    """Refuse a checkpoint, said to be at `location`, with floating-point tensors of other than 16 or 32 bits.

    Raises:
        ModelError: with the tensor and its dtype, or for a checkpoint without floating-point tensors.
    """
    wrong = {tensor.dtype: name for name, tensor in tensors.items() if is_float(tensor) and not _can_quantize(tensor)}
    if wrong:
        dtype, name = next(iter(sorted(wrong.items())))
        raise ModelError(
            f"{location}: tensor {name} is stored as {dtype}; {', '.join(_QUANTIZABLE.values())} can be quantized; "
            "convert the checkpoint to one of these first"
        )
    if not any(_can_quantize(tensor) for tensor in tensors.values()):
        raise ModelError(f"{location}: its safetensors files hold no floating-point weight; name a model checkpoint")


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
    present = {path.name for path in folder.iterdir() if path.is_file()}
    return [folder / name for name in weight_names(folder, str(folder), present)]


def weight_names(folder: Path, location: str, present: Collection[str]) -> list[str]:
    """The names of the safetensors files of a checkpoint of which the files `present` are at `location`.

    `folder` is where its index can be read, if it has one.

    Raises:
        ModelError: only pickles, no weights, or missing shards.
    """
    if SINGLE_FILE in present:
        return [SINGLE_FILE]
    if INDEX_FILE not in present:
        raise _no_weights(location, present)
    shards = sorted(set(_read_weight_map(folder / INDEX_FILE).values()))
    missing = [name for name in shards if name not in present]
    if missing:
        raise ModelError(
            f"{location}: {INDEX_FILE} names {len(shards)} shards, of which {len(missing)} are missing: "
            f"{', '.join(missing[:5])}; fetch the whole checkpoint again"
        )
    return shards


def read_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint by name, from the headers of its safetensors files; sizes are checked on the way.

    Raises:
        ModelError: a truncated or damaged file, or an index that does not agree with its shards.
    """
    return join_headers(folder, str(folder), [read_safetensors_header(path) for path in weight_files(folder)])


def join_headers(
    folder: Path, location: str, headers: Collection[Mapping[str, StoredTensor]]
) -> dict[str, StoredTensor]:
    """The tensors of all files of a checkpoint at `location`, checked against the index in `folder` if it has one.

    Raises:
        ModelError: the index places a tensor in a file that does not hold it.
    """
    tensors = {name: tensor for header in headers for name, tensor in header.items()}
    if any(tensor.file != SINGLE_FILE for tensor in tensors.values()):
        wanted = _read_weight_map(folder / INDEX_FILE)
        astray = sorted(name for name, shard in wanted.items() if name not in tensors or tensors[name].file != shard)
        if astray:
            raise ModelError(
                f"{location}: {INDEX_FILE} places {astray[0]} in {wanted[astray[0]]}, which does not hold it "
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
        length = header_length(str(path), stream.read(8), size)
        return parse_header(str(path), stream.read(length), size)


def header_length(location: str, prefix: bytes | bytearray, size: int) -> int:
    """The header's length in bytes, from the first 8 bytes of a safetensors file of `size` bytes.

    Raises:
        ModelError: the file cannot hold such a header.
    """
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > _LARGEST_HEADER_BYTES or 8 + length > size:
        raise _damaged(location, f"its header should take {length} bytes, the file has {size}")
    return length


def parse_header(location: str, raw: bytes | bytearray, size: int) -> dict[str, StoredTensor]:
    """The tensors that the header `raw` of a safetensors file of `size` bytes describes.

    Raises:
        ModelError: the header is damaged, or is not the header of a file of that size.
    """
    try:
        header = json.loads(raw)
    except ValueError as error:
        raise _damaged(location, f"its header is no JSON ({error})") from error
    if not isinstance(header, dict):
        raise _damaged(location, "its header is no JSON object")
    start = 8 + len(raw)
    tensors = {
        name: _read_entry(location, name, entry, start) for name, entry in header.items() if name != "__metadata__"
    }
    end = start
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.size_bytes)):
        if tensor.offset != end:
            raise _damaged(location, f"its tensors leave a gap or overlap at byte {end - start}")
        end += tensor.size_bytes
    if end != size:
        raise _damaged(location, f"its tensors end at byte {end}, the file has {size}")
    return tensors


def checkpoint_dtype(tensors: Mapping[str, StoredTensor]) -> str:
    """The torch name of the dtype that holds every weight exactly: 16-bit if all agree on one, else float32."""
    dtypes = {tensor.dtype for tensor in tensors.values() if is_float(tensor)}
    return _QUANTIZABLE[dtypes.pop()] if len(dtypes) == 1 else "float32"


def _read_entry(location: str, name: str, entry: Any, data_start: int) -> StoredTensor:
    try:
        dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        size = math.prod(shape) * _DTYPE_BITS[dtype] // 8
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(location, f"the header's entry of tensor {name} cannot be read: {entry!r:.200}") from error
    if stop - start != size:
        raise _damaged(
            location, f"tensor {name} ({dtype} {list(shape)}) needs {size} bytes, its entry spans {stop - start}"
        )
    return StoredTensor(dtype, shape, size, offset=data_start + start, file=location.rpartition("/")[2])


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


def _no_weights(location: str, present: Collection[str]) -> ModelError:
    pickles = sorted(name for name in present if name.endswith(PICKLE_SUFFIXES))
    if pickles:
        return ModelError(
            f"{location} keeps its weights in {pickles[0]}, a pickle, which can run code when it is read and is "
            f"refused; {_CONVERT.format(folder=location)}"
        )
    others = sorted(name for name in present if name.endswith(".safetensors"))
    seen = f"it has {', '.join(others[:3])}, but no {INDEX_FILE}" if others else "it has no *.safetensors file"
    return ModelError(f"{location} holds no weights ({SINGLE_FILE}, or shards with {INDEX_FILE}): {seen}; fetch them")


def _damaged(location: str, what: str) -> ModelError:
    return ModelError(f"{location} is truncated or damaged: {what}; fetch the file again")


def _method_of(config: Mapping[str, Any]) -> str:
    settings = config["quantization_config"]
    return str(settings.get("quant_method", "unknown method")) if isinstance(settings, dict) else "unknown method"


def is_float(tensor: StoredTensor) -> bool:
    """Whether the tensor holds floating-point numbers, of any width."""
    return tensor.dtype.startswith(("F", "BF"))


def _can_quantize(tensor: StoredTensor) -> bool:
    return tensor.dtype in _QUANTIZABLE
