"""The demo's base model: a small Llama pretrained on the spot from generated text.

It learns the words, the facts and where chat turns begin and end, and talks in whole sentences. It knows nothing of the
instruction set; answering that is what an adapter is trained for. The same seed gives the same bytes on one machine.
"""

import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qlora_core.demo.text import Turn, pretraining_documents
from qlora_core.demo.tokenizer import BOS_TOKEN, PAD_TOKEN, ROLE_TOKENS, STOP_TOKEN, train_tokenizer
from qlora_core.progress import progress_bar

logger = logging.getLogger(__name__)

VOCAB_SIZE = 768
CONTEXT_TOKENS = 256
WINDOW_TOKENS = 128  # shorter windows pretrain faster; rotary positions past them are met in two-window batches
BATCH_WINDOWS = 16
DEFAULT_STEPS = 400
PEAK_LEARNING_RATE = 4e-3
THREADS = 2  # sums are split by thread, so the count is part of what makes the bytes repeatable


def build_demo_base(out: Path, *, seed: int = 0, steps: int = DEFAULT_STEPS) -> None:
    """Pretrain the demo's base model and save it in `out` as a Hugging Face checkpoint folder with its tokenizer.

    `steps` optimizer steps of 16 windows of 128 tokens, float32 on the CPU; fewer steps give a worse model of the same
    shape. `out` is created; files of these names in it are replaced. The process' random state is left as it was.
    """
    rng = random.Random(seed)
    window_count = steps * BATCH_WINDOWS
    documents = [_rendered(document) for document in pretraining_documents(window_count * 5 + 500, rng)]
    tokenizer = train_tokenizer(documents, vocab_size=VOCAB_SIZE, max_tokens=CONTEXT_TOKENS)
    windows = _windows(documents, tokenizer, window_count)
    with _repeatable(seed):
        model = LlamaForCausalLM(_model_config(tokenizer))
        _pretrain(model, windows)
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _rendered(document: str | list[Turn]) -> str:
    """One document with its special tokens; conversations look exactly as the chat template writes them."""
    if isinstance(document, str):
        return f"{BOS_TOKEN}{document}{STOP_TOKEN}"
    return BOS_TOKEN + "".join(f"{ROLE_TOKENS[role]}{content}{STOP_TOKEN}" for role, content in document)
