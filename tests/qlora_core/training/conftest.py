"""A tiny NF4 Llama, a float64 one, and rows to train them on."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from qlora_core.config.train import TrainConfig
from qlora_core.data.dataset import PreferenceRow, TokenRow
from qlora_core.model.base import load_quantized
from qlora_core.training.trial import Trial

VOCABULARY = 96
POSITIONS = 48


def _llama(dtype: torch.dtype) -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(11)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=POSITIONS,
                tie_word_embeddings=False,
            )
        )
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.requires_grad_(False).eval()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Sums in a fixed order, and no fighting over cores."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def nf4_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama as a stored NF4 checkpoint with double quantization."""
    folder = tmp_path_factory.mktemp("base")
    _llama(torch.float32).save_pretrained(folder / "plain")
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["lm_head"],
    )
    quantized = AutoModelForCausalLM.from_pretrained(
        folder / "plain", quantization_config=settings, device_map={"": "cpu"}, dtype=torch.float32
    )
    quantized.save_pretrained(folder / "nf4")
    return folder / "nf4"


@pytest.fixture
def base(nf4_folder: Path) -> PreTrainedModel:
    return load_quantized(nf4_folder)


@pytest.fixture
def base64() -> PreTrainedModel:
    """The same architecture in float64, not quantized: the reference for numbers."""
    return _llama(torch.float64)


def make_rows(count: int, *, seed: int = 0, shortest: int = 5, longest: int = 20) -> list[TokenRow]:
    """Rows that count upwards from a random token; the prompt part is masked."""
    generator = random.Random(seed)
    rows = []
    for index in range(count):
        length = generator.randint(shortest, longest)
        start, prompt = generator.randrange(VOCABULARY), generator.randint(1, length - 2)
        ids = [(start + place) % VOCABULARY for place in range(length)]
        rows.append(TokenRow(f"{seed}-{index}", ids, [place >= prompt for place in range(length)]))
    return rows


def make_pairs(count: int, *, seed: int = 0) -> list[PreferenceRow]:
    """Prompts whose better answer counts upwards and whose worse one counts downwards, of another length."""
    generator = random.Random(seed)
    pairs = []
    for index, row in enumerate(make_rows(count, seed=seed)):
        prompt = row.loss_mask.index(True)
        start, length = row.input_ids[prompt - 1], generator.randint(2, 8)
        worse = [(start - place) % VOCABULARY for place in range(1, length + 1)]
        ids = [*row.input_ids[:prompt], *worse]
        pairs.append(PreferenceRow(row.id, row.input_ids, row.loss_mask, ids, [p >= prompt for p in range(len(ids))]))
        assert pairs[index].rejected_ids != row.input_ids
    return pairs


@pytest.fixture
def pairs() -> Callable[..., list[PreferenceRow]]:
    return make_pairs


@pytest.fixture
def train_rows() -> list[TokenRow]:
    return make_rows(26, seed=1)


@pytest.fixture
def validation_rows() -> list[TokenRow]:
    return make_rows(7, seed=2)


def make_trial(name: str = "t000", **settings: Any) -> Trial:
    """A trial that learns fast, with dropout, warm-up and a last batch that is not full."""
    defaults: dict[str, Any] = {
        "lora_rank": 4,
        "lora_alpha": 8.0,
        "lora_dropout": 0.1,
        "learning_rate": 5e-3,
        "schedule": "linear",
        "warmup_ratio": 0.1,
        "max_steps": 8,
        "micro_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "optimizer": "adamw",
        "checkpoint_every_steps": 3,
        "seed": 5,
    }
    return Trial(name, TrainConfig(**(defaults | settings)))


@pytest.fixture
def trial() -> Callable[..., Trial]:
    return make_trial


@pytest.fixture
def rows() -> Callable[..., list[TokenRow]]:
    return make_rows
