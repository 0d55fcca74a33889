"""A tiny quantized Llama and random adapters for it, made by PEFT itself; nothing here is trained."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
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


def save_tokenizer(folder: Path, size: int) -> None:
    """A tokenizer whose words are w0, w1, ..., each with its number as its id."""
    vocabulary = {f"w{number}": number for number in range(size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)


@pytest.fixture(scope="session")
def plain_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "plain"
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False, initializer_range=0.1,
                bos_token_id=1, eos_token_id=2,
            )
        )  # fmt: skip
    model.save_pretrained(folder)
    save_tokenizer(folder, 96)
    return folder


@pytest.fixture(scope="session")
def nf4_folder(plain_folder: Path) -> Path:
    folder = plain_folder.parent / "nf4"
    quantize_checkpoint(plain_folder, folder, QuantizeConfig())
    return folder


@pytest.fixture
def model(nf4_folder: Path) -> PreTrainedModel:
    return load_quantized(nf4_folder, device="cpu")


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory, nf4_folder: Path) -> dict[str, Path]:
    """PEFT folders whose ranks, scales and targets differ. For tests that leave them as they are."""
    settings: dict[str, dict[str, Any]] = {
        "plain": {"lora_alpha": 6},
        "second": {"r": 8, "lora_alpha": 16},
        "rs": {"r": 6, "lora_alpha": 5, "use_rslora": True, "target_modules": ["q_proj", "v_proj", "o_proj"]},
        "patterns": {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"layers.1.mlp.down_proj": 7}},
        "one_layer": {"r": 1, "layers_to_transform": [1]},
    }
    folder = tmp_path_factory.mktemp("adapters")
    return {
        name: make_adapter(nf4_folder, folder / name, seed, own) for seed, (name, own) in enumerate(settings.items())
    }


@pytest.fixture
def write_adapter(tmp_path: Path, nf4_folder: Path) -> WriteAdapter:
    """Writes a PEFT folder with random factors."""

    def write(name: str = "adapter", *, seed: int = 5, **settings: Any) -> Path:
        return make_adapter(nf4_folder, tmp_path / name, seed, settings)

    return write


def make_adapter(base: Path, folder: Path, seed: int, settings: dict[str, Any]) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        wanted: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "down_proj"], **settings}
        made = get_peft_model(load_quantized(base, device="cpu"), LoraConfig(**wanted))
        for name, parameter in made.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    made.save_pretrained(str(folder))
    return folder


@dataclass(frozen=True)
class World:
    """Folders of a trained base, plain and in 4 bits; adapters by name; texts of their task to calibrate and test."""

    plain: Path
    nf4: Path
    adapters: dict[str, Path]
    calibration: Path
    test: Path


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """`mid` and `small` learned the same task at |delta|/|W| of about 0.2 and 0.02."""
    words = trained_world()
    folder = tmp_path_factory.mktemp("world")
    spoken = words.language(1)
    task = spoken.mixed(words.language(2), 0.5)
    words.train_base(folder / "plain", spoken)
    save_tokenizer(folder / "plain", words.WORDS)
    quantize_checkpoint(folder / "plain", folder / "nf4", QuantizeConfig())
    rates = {"mid": (60, 1e-3), "small": (30, 3e-4)}
    made = {
        name: words.train_adapter(folder / "nf4", folder / name, task, steps=steps, rate=rate)
        for name, (steps, rate) in rates.items()
    }
    (folder / "calibration.txt").write_text(task.text(150, 6))
    (folder / "test.txt").write_text(task.text(80, 5))
    return World(folder / "plain", folder / "nf4", made, folder / "calibration.txt", folder / "test.txt")


def trained_world() -> Any:
    """The module beside this file: tests are imported one by one and have no package."""
    sys.path.insert(0, str(Path(__file__).parent))
    try:
        import small_world
    finally:
        sys.path.pop(0)
    return small_world


@pytest.fixture(scope="session")
def small_world() -> Any:
    """The languages and trainers that `world` is made with."""
    return trained_world()
