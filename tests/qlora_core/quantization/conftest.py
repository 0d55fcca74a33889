"""Tiny checkpoints made on the spot: a Llama with a tokenizer of single characters."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

MakeLlama = Callable[..., Path]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Sums in a fixed order; and bitsandbytes' fallback operators uncompiled, which would take seconds per shape."""
    torch.set_num_threads(1)
    with torch.compiler.set_stance("force_eager"):
        yield


def save_tokenizer(folder: Path) -> None:
    characters = [chr(code) for code in range(32, 127)]
    vocabulary = {token: place for place, token in enumerate(["<unk>", "<s>", "</s>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def llama(*, seed: int = 7, tied: bool = False, hidden: int = 64, intermediate: int = 172) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=128,
                hidden_size=hidden,
                intermediate_size=intermediate,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=64,
                tie_word_embeddings=tied,
                initializer_range=0.3,
            )
        )


def write_llama(folder: Path, *, dtype: torch.dtype = torch.float32, shard_size: str = "1GB", **settings: Any) -> Path:
    model: Any = llama(**settings)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    save_tokenizer(folder)
    return folder


@pytest.fixture
def make_llama(tmp_path: Path) -> MakeLlama:
    """Writes a float32 (or other) checkpoint folder, in shards where a shard size is given."""

    def make(name: str = "base", **settings: Any) -> Path:
        return write_llama(tmp_path / name, **settings)

    return make


@pytest.fixture(scope="module")
def shared_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One such folder for the tests of a module, which leave it as it is."""
    return write_llama(tmp_path_factory.mktemp("models") / "shared")
