"""A tiny byte-level tokenizer and dataset files, made on the spot."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = ["<|begin|>", "<|end|>", "<|im_start|>", "<|im_end|>"]


def _save_tokenizer(folder: Path, *, chat_template: str | None, eos: str | None, opens_with_bos: bool) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["Alpha comes first, then Beta. What is the answer? " * 20], trainer)
    if opens_with_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token=eos, extra_special_tokens=SPECIALS[2:]
    )
    fast.chat_template = chat_template
    fast.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="session")
def plain_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base tokenizer that opens with a BOS, has an eos token, and neither a template nor a pad token."""
    return _save_tokenizer(tmp_path_factory.mktemp("plain"), chat_template=None, eos="<|end|>", opens_with_bos=True)


@pytest.fixture(scope="session")
def chatml_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat tokenizer whose turns end on <|im_end|> while its eos token is <|end|>; it adds no BOS."""
    return _save_tokenizer(tmp_path_factory.mktemp("chatml"), chat_template=CHATML, eos="<|end|>", opens_with_bos=False)


@pytest.fixture(scope="session")
def endless_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base tokenizer with neither a template nor an eos token."""
    return _save_tokenizer(tmp_path_factory.mktemp("endless"), chat_template=None, eos=None, opens_with_bos=False)


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Writes rows (objects, or text as it is) one a line and returns the path."""

    def write(rows: list[object], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return write
