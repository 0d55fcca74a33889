"""The demo's base model: a small Llama pretrained on the spot from generated text.

It learns the words, the facts and where chat turns begin and end, and talks in whole sentences. It knows nothing of the
instruction set; answering that is what an adapter is trained for. The same seed gives the same bytes on one machine.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qlora_core.demo.muon import Muon
from qlora_core.demo.text import Turn, pretraining_documents
from qlora_core.demo.tokenizer import BOS_TOKEN, PAD_TOKEN, ROLE_TOKENS, STOP_TOKEN, train_tokenizer
from qlora_core.errors import ModelError
from qlora_core.progress import progress_bar

VOCAB_SIZE = 1024
CONTEXT_TOKENS = 256
HIDDEN_SIZE = 128  # this and the next are multiples of 64, so that NF4's blocks never cross a row
INTERMEDIATE_SIZE = 384
LAYERS = 2
HEADS = 4
WINDOW_TOKENS = 128
BATCH_WINDOWS = 16
DEFAULT_STEPS = 220
WARMUP_STEPS = 30
MATRIX_LEARNING_RATE = 0.03
VECTOR_LEARNING_RATE = 0.02
MIN_DOCUMENTS = 2000
TOKENS_PER_DOCUMENT = 30  # fewer than the average, so that the documents always fill the windows
THREADS = 1  # one thread adds in one order: the same bytes every time, however busy the machine


def build_demo_base(out: Path, *, seed: int = 0, steps: int = DEFAULT_STEPS) -> None:
    """Pretrain the demo's base model and save it in `out` as a Hugging Face checkpoint folder with its tokenizer.

    `steps` optimizer steps of 16 windows of 128 tokens, float32 on the CPU; fewer steps give a worse model of the same
    shape. `out` is created; files of these names in it are replaced. The process' random state and thread count are
    left as they were. Raises ModelError for `steps` under 1.
    """
    if steps < 1:
        raise ModelError(f"pretraining takes at least 1 step, not {steps}; leave `steps` out for {DEFAULT_STEPS}")
    window_count = steps * BATCH_WINDOWS
    document_count = max(MIN_DOCUMENTS, window_count * WINDOW_TOKENS // TOKENS_PER_DOCUMENT)
    documents = [_rendered(document) for document in pretraining_documents(document_count, random.Random(seed))]
    tokenizer = train_tokenizer(documents[: 4 * MIN_DOCUMENTS], vocab_size=VOCAB_SIZE, max_tokens=CONTEXT_TOKENS)
    windows = _windows(documents, tokenizer)[:window_count]
    with _repeatable(seed):
        model = LlamaForCausalLM(_model_config(tokenizer))
        _pretrain(model, windows.split(BATCH_WINDOWS))
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _rendered(document: str | list[Turn]) -> str:
    """One document with its special tokens; conversations look exactly as the chat template writes them."""
    if isinstance(document, str):
        return f"{BOS_TOKEN} {document}{STOP_TOKEN}"
    return BOS_TOKEN + "".join(f"{ROLE_TOKENS[role]} {content}{STOP_TOKEN}" for role, content in document)


def _windows(documents: list[str], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """All documents one after the other, cut into [windows, 128] token ids; what does not fill a window is left out."""
    encoded = tokenizer(documents, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([token for document in encoded for token in document])
    count = len(ids) // WINDOW_TOKENS
    return ids[: count * WINDOW_TOKENS].view(count, WINDOW_TOKENS)


def _model_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    vocabulary = tokenizer.get_vocab()
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN_SIZE,
        intermediate_size=INTERMEDIATE_SIZE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=CONTEXT_TOKENS,
        initializer_range=0.05,
        tie_word_embeddings=True,
        bos_token_id=vocabulary[BOS_TOKEN],
        eos_token_id=vocabulary[STOP_TOKEN],
        pad_token_id=vocabulary[PAD_TOKEN],
    )


def _pretrain(model: LlamaForCausalLM, batches: tuple[torch.Tensor, ...]) -> None:
    """Next-token training: Muon for the matrices, AdamW for embedding and norms; warm-up, then linearly down."""
    embedding = model.get_input_embeddings().weight
    matrices = [weight for weight in model.parameters() if weight.ndim == 2 and weight is not embedding]
    vectors = [weight for weight in model.parameters() if weight.ndim != 2 or weight is embedding]
    muon = Muon(matrices)
    adamw = torch.optim.AdamW(vectors, lr=VECTOR_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    with progress_bar("Pretraining the demo model", len(batches)) as advance:
        for step, tokens in enumerate(batches):
            logits = model(input_ids=tokens, use_cache=False).logits
            torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            share = _schedule(step, len(batches))
            muon.step(MATRIX_LEARNING_RATE * share)
            adamw.param_groups[0]["lr"] = VECTOR_LEARNING_RATE * share
            adamw.step()
            model.zero_grad()
            advance(1)
    model.eval()


def _schedule(step: int, total: int) -> float:
    """Share of the peak learning rate at `step` (from 0) of `total`."""
    return min(1.0, (step + 1) / WARMUP_STEPS) * max(0.02, 1 - step / total)


@contextmanager
def _repeatable(seed: int) -> Iterator[None]:
    """Seeded CPU random numbers and a fixed thread count inside; outside, both as before."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_num_threads(THREADS)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
