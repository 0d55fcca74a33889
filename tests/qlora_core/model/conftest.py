"""A tiny quantized Llama with a tokenizer of single characters, made once, and adapters for it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from qlora_core.config.quantize import QuantizeConfig
from qlora_core.model.base import load_quantized
from qlora_core.quantization.quantize import quantize_checkpoint

WriteAdapter = Callable[..., Path]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Sums in a fixed order; and bitsandbytes' fallback operators uncompiled, which would take seconds per shape."""
    torch.set_num_threads(1)
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(scope="session")
def plain_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 inputs to down_proj: blocks of 64 cross rows there, and nowhere else. 64 positions."""
    folder = tmp_path_factory.mktemp("models") / "plain"
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=98, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False, initializer_range=0.2,
            )
        )  # fmt: skip
    model.save_pretrained(folder)
    vocabulary = {token: place for place, token in enumerate(["<unk>", "<s>", "</s>", *map(chr, range(32, 127))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def nf4_folder(plain_folder: Path) -> Path:
    folder = plain_folder.parent / "nf4"
    quantize_checkpoint(plain_folder, folder, QuantizeConfig())
    return folder


@pytest.fixture(scope="session")
def tokenizer(plain_folder: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(plain_folder)


@pytest.fixture(scope="session")
def shared_model(nf4_folder: Path) -> PreTrainedModel:
    """For tests that leave it as it is."""
    return load_quantized(nf4_folder, device="cpu")


@pytest.fixture
def model(nf4_folder: Path) -> PreTrainedModel:
    """For tests that change it."""
    return load_quantized(nf4_folder, device="cpu")


@pytest.fixture
def write_adapter(tmp_path: Path, nf4_folder: Path) -> WriteAdapter:
    """Writes a PEFT folder with random factors, made by PEFT itself."""

    def write(name: str = "adapter", **settings: Any) -> Path:
        return _write(load_quantized(nf4_folder, device="cpu"), tmp_path / name, 5, settings)

    return write


@pytest.fixture(scope="session")
def unlike_adapters(tmp_path_factory: pytest.TempPathFactory, nf4_folder: Path) -> dict[str, Path]:
    """PEFT folders whose ranks, scales and targets differ. For tests that leave them as they are."""
    settings: dict[str, dict[str, Any]] = {
        "plain": {"lora_alpha": 6},
        "rs": {"r": 6, "lora_alpha": 5, "use_rslora": True, "target_modules": ["q_proj", "v_proj", "o_proj"]},
        "wide": {"r": 3, "target_modules": "all-linear"},
        "patterns": {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"layers.1.mlp.down_proj": 7}},
        "one_layer": {"r": 1, "layers_to_transform": [1]},
    }
    folder = tmp_path_factory.mktemp("adapters")
    return {
        name: _write(load_quantized(nf4_folder, device="cpu"), folder / name, seed, own)
        for seed, (name, own) in enumerate(settings.items())
    }


def _write(base: PreTrainedModel, folder: Path, seed: int, settings: dict[str, Any]) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        wanted: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "down_proj"], **settings}
        made = get_peft_model(base, LoraConfig(**wanted))
        for parameter_name, parameter in made.named_parameters():
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.1)
    made.save_pretrained(str(folder))
    return folder
