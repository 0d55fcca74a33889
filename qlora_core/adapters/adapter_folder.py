"""PEFT folders read module by module as plain updates, and written in one canonical form that every reader reads alike.

Canonical: alpha = r and the scale in B, no rsLoRA, no patterns (zero-padded to one rank), plain start, float32. Never
more than one module's factors are in memory. Knows nothing of methods or weights.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open

from qlora_core.adapters.low_rank import LowRank, pad
from qlora_core.digest import digest_files
from qlora_core.errors import ModelError
from qlora_core.model.adapter import (
    CONFIG_FILE,
    PROVENANCE_FILE,
    WEIGHTS_FILE,
    read_adapter_config,
    target_modules_of,
    tensor_names,
)
from qlora_core.model.adapter_set import lora_scale
from qlora_core.quantization.checkpoint import TOKENIZER_FILES, StoredTensor, read_safetensors_header
from qlora_core.quantization.safetensors_file import StreamedFile, digest_tensor, read_back

_REFUSED_PARTS = {
    "lora_embedding_": "LoRA on embeddings, which no 4-bit base here carries",
    "lora_B.bias": "a bias in B (lora_bias)",
    "modules_to_save": "fully trained modules (modules_to_save)",
}


@dataclass(frozen=True)
class AdapterFolder:
    """A checked adapter. `digest` covers settings and weights; `provenance` is its `qlora.json`, empty without one."""

    path: Path
    config: LoraConfig
    digest: str
    provenance: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    modules: tuple[str, ...]

    @property
    def base_digest(self) -> str | None:
        """The quantized base it was trained on, where it says so."""
        return self.provenance.get("quantized_base_digest")

    def rank(self, module: str) -> int:
        """The rank on a module; 0 where it has none."""
        stored = self.tensors.get(tensor_names(module)[0])
        return stored.shape[0] if stored else 0

    def factors(self, module: str) -> LowRank:
        """A module's update, float32, the scale in B.

        Raises:
            ModelError: NaN or infinity, or a scaled B beyond float32.
        """
        a_name, b_name = tensor_names(module)
        try:
            with safe_open(self.path / WEIGHTS_FILE, framework="pt") as file:
                a_ri, b_or = file.get_tensor(a_name).float(), file.get_tensor(b_name).float()
        except SafetensorError as error:
            raise ModelError(f"{self.path / WEIGHTS_FILE} cannot be read: {error}; export it again") from error
        scaled = b_or * lora_scale(self.config, module)
        if not (torch.isfinite(a_ri).all() and torch.isfinite(scaled).all()):
            raise ModelError(f"{self.path}: {module} holds NaN, infinity, or a scale beyond float32; train it again")
        return LowRank(a_ri, scaled)


def open_adapter(path: Path, *, expected_digest: str | None = None) -> AdapterFolder:
    """A PEFT folder whose settings and headers were checked; weights are read later, module by module.

    `expected_digest`: what `adapter_digest` gave when the adapter was named.

    Raises:
        ModelError: see `read_adapter_config`; DoRA, embeddings, biases and fully trained modules, by name; a module
            with half of its tensors, or with a rank that its settings do not give it; another digest.
    """
    config = read_adapter_config(path)
    weights = path / WEIGHTS_FILE
    if not weights.is_file():
        raise ModelError(f"{path} has no {WEIGHTS_FILE} (pickles are refused); export it with safe_serialization=True")
    tensors = read_safetensors_header(weights)
    _refuse_beyond_sums(path, config, tensors)
    modules = tuple(target_modules_of(tensors))
    _check_pairs(path, config, tensors, modules)
    digest = adapter_digest(path)
    if expected_digest is not None and digest != expected_digest:
        raise ModelError(
            f"{path} has digest {digest[:16]}..., the recipe names {expected_digest[:16]}...: another adapter, or "
            "changed since; name the right folder or correct the digest"
        )
    return AdapterFolder(path, config, digest, read_provenance(path), tensors, modules)


def adapter_digest(path: Path) -> str:
    """SHA-256 over the settings and weights of a PEFT folder: what the adapter computes, not what lies beside it."""
    return digest_files({name: path / name for name in (CONFIG_FILE, WEIGHTS_FILE)})


def read_provenance(path: Path) -> dict[str, Any]:
    """The content of an adapter's `qlora.json`; empty where there is none.

    Raises:
        ModelError: it is no JSON object.
    """
    file = path / PROVENANCE_FILE
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{file} is no valid JSON ({error}); export the adapter again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{file} holds a {type(value).__name__}, not a JSON object; export the adapter again")
    return value


@dataclass
class CanonicalWriter:
    """What a canonical folder is to hold: `make(module)` gives each update when its turn comes."""

    modules: Sequence[str]
    rank: int
    targets: Iterable[str]
    make: Callable[[str], LowRank]
    meant: dict[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write settings and weights into an existing folder; what was written is read back and compared.

        Raises:
            ModelError: the disk gives other bytes back, or an update is above the rank.
        """
        names = [name for module in self.modules for name in tensor_names(module)]
        with StreamedFile(folder / WEIGHTS_FILE, names) as file:
            for module in self.modules:
                update = pad(self.make(module), self.rank)
                parts = (update.a_ri, update.b_or)
                for name, tensor in zip(tensor_names(module), parts, strict=True):
                    self.meant[name] = digest_tensor(tensor)
                    file.add(name, tensor)
            file.finish()
        read_back(folder / WEIGHTS_FILE, self.meant)
        write_settings(folder, self.rank, self.targets)


def write_settings(folder: Path, rank: int, targets: Iterable[str]) -> None:
    """`adapter_config.json` of a canonical adapter."""
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=sorted(targets), task_type="CAUSAL_LM")
    settings = config.to_dict() | {"inference_mode": True, "target_modules": sorted(targets)}
    text = json.dumps(settings, indent=2, sort_keys=True)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def copy_companions(source: Path, target: Path) -> list[str]:
    """Copy tokenizer and chat template, which an adapter is used with, into another adapter's folder."""
    names = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    for name in names:
        shutil.copyfile(source / name, target / name)
    return names


def common_targets(adapters: Iterable[AdapterFolder]) -> list[str]:
    """`target_modules` that name exactly the modules of all adapters together.

    Name endings where every adapter gives nothing but endings, which vLLM and SGLang want; else full names.
    """
    adapters = list(adapters)
    endings: set[str] = set()
    for adapter in adapters:
        config: Any = adapter.config
        plain = not isinstance(config.target_modules, str) and not config.exclude_modules
        if not plain or config.layers_to_transform is not None:
            return sorted({module for each in adapters for module in each.modules})
        endings |= set(config.target_modules)
    return sorted(endings)


def _refuse_beyond_sums(path: Path, config: LoraConfig, tensors: Mapping[str, StoredTensor]) -> None:
    if config.use_dora or any(name.endswith(".lora_magnitude_vector") for name in tensors):
        raise ModelError(
            f"{path} is DoRA: its magnitudes rescale the base's own weight, so it is no sum of updates and cannot be "
            "composed or folded; use it as it is, or train plain LoRA"
        )
    for name in tensors:
        for part, what in _REFUSED_PARTS.items():
            if part in name:
                raise ModelError(f"{path}: {name} is {what}; compose adapters of LoRA on Linear layers alone")


def _check_pairs(path: Path, config: LoraConfig, tensors: Mapping[str, StoredTensor], modules: tuple[str, ...]) -> None:
    wanted = {name for module in modules for name in tensor_names(module)}
    odd = sorted(wanted.symmetric_difference(tensors))
    if odd or not modules:
        raise ModelError(f"{path}: A and B do not pair up, the first odd tensor: {odd[:1]}; export the adapter again")
    for module in modules:
        a, b = (tensors[name] for name in tensor_names(module))
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or not math.prod(a.shape):
            raise ModelError(f"{path}: {module} has A {list(a.shape)} and B {list(b.shape)}, which do not multiply")
        rank = _rank_of(config, module)
        if rank != a.shape[0]:
            raise ModelError(f"{path}: {module} has rank {a.shape[0]}, {CONFIG_FILE} gives it {rank}: its scale is off")


def _rank_of(config: LoraConfig, module: str) -> int:
    ranks = config.rank_pattern or {}
    return ranks.get(get_pattern_key(list(ranks), module), config.r)
