"""Loss per token of a model on plain text. Knows documents and windows; the sums are `loss.py`'s."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from qlora_core.errors import DataError, ModelError
from qlora_core.model.adapter import attach_adapter
from qlora_core.model.base import load_any
from qlora_core.model.loss import max_positions_of, sequence_losses
from qlora_core.quantization.checkpoint import tokenizer_files

DOCUMENT_END = "<|endoftext|>"
TOKENS_PER_BATCH = 4096  # bounds the logits, the largest thing here: tokens times vocabulary


@dataclass(frozen=True)
class TextLoss:
    """`loss` in nats per predicted token, `perplexity` = e^loss, `tokens` predicted."""

    loss: float
    perplexity: float
    tokens: int


@dataclass(frozen=True)
class Window:
    """A stretch of one document; only tokens that no earlier window predicted count (`ScoredRow` of `loss.py`)."""

    input_ids: list[int]
    loss_mask: list[bool]


def text_loss(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, text: str, *, window: int | None = None
) -> TextLoss:
    """Token-weighted loss over the documents of `text`, which `<|endoftext|>` separates.

    Each document is stripped of surrounding white space, starts with BOS where the tokenizer has one (else its first
    token is context only), and is scored alone. Every token is predicted once. A document longer than `window` tokens
    (default: what the model takes) is read in windows that start half a window apart, so that a token has at least half
    a window of context wherever the document offers it.

    Raises:
        DataError: the text has no token to predict.
        ModelError: see `document_losses`.
    """
    losses = document_losses(model, encode_documents(tokenizer, text), window=window)
    tokens = sum(count for _, count in losses)
    if not tokens:
        raise DataError(f"the text ({len(text)} characters) has no token to predict; give a longer one")
    loss = math.fsum(nats for nats, _ in losses) / tokens
    return TextLoss(loss=loss, perplexity=math.exp(loss), tokens=tokens)


def encode_documents(tokenizer: PreTrainedTokenizerBase, text: str) -> list[list[int]]:
    """The token ids of each document of `text`, as `text_loss` scores them; documents of white space are left out."""
    return [encode_document(tokenizer, document) for part in text.split(DOCUMENT_END) if (document := part.strip())]


def encode_document(tokenizer: Any, document: str) -> list[int]:
    """The token ids of one document, after BOS where the tokenizer has one; no other special token is added."""
    ids = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
    return ids if tokenizer.bos_token_id is None else [tokenizer.bos_token_id, *ids]


def document_losses(
    model: PreTrainedModel | PeftModel, documents: Sequence[Sequence[int]], *, window: int | None = None
) -> list[tuple[float, int]]:
    """For each document's token ids: the sum of -ln p over its tokens but the first (nats), and how many those are.

    Windows are as in `text_loss`; a document of one token or none gives (0.0, 0).

    Raises:
        ModelError: the window is shorter than 2 tokens or longer than the model's positions, or is missing for a model
            whose config sets no limit.
    """
    window = checked_window(window, max_positions_of(model))
    windows = [list(split_windows(ids, window)) for ids in documents]
    rows = [row for document in windows for row in document]
    longest = max((len(row.input_ids) for row in rows), default=1)
    losses = iter(sequence_losses(model, rows, batch_size=max(1, TOKENS_PER_BATCH // longest)))
    summed = []
    for document in windows:
        parts = [next(losses) for _ in document]
        summed.append((math.fsum(nats for nats, _ in parts), sum(count for _, count in parts)))
    return summed


def read_text(file: Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        DataError: the file is missing or is not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}; name a readable text file") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 (byte {error.start}); convert it first") from error


def score_text_file(folder: Path, text_file: Path, adapter: Path | None = None) -> TextLoss:
    """`text_loss` of a checkpoint folder (4-bit or not), with an adapter on it if one is named, on a UTF-8 file.

    Raises:
        DataError: the file is missing, is not UTF-8, or has nothing to predict.
        ModelError: the model, its tokenizer or the adapter cannot be used.
    """
    text = read_text(text_file)
    tokenizer_files(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = load_any(folder)
    return text_loss(model if adapter is None else attach_adapter(model, adapter), tokenizer, text)


def split_windows(input_ids: Sequence[int], window: int) -> Iterator[Window]:
    """One document's tokens in windows of at most `window`, half overlapping; each token but the first counts once."""
    stride = window - window // 2
    scored = 1  # the first token has nothing before it
    for start in range(0, len(input_ids), stride):
        stop = min(start + window, len(input_ids))
        yield Window(list(input_ids[start:stop]), [place >= scored for place in range(start, stop)])
        scored = stop
        if stop == len(input_ids):
            return


def checked_window(window: int | None, limit: int | None) -> int:
    """`window`, or the longest sequence `limit` where none is given; both in tokens.

    Raises:
        ModelError: see `document_losses`.
    """
    if window is None:
        if limit is None:
            raise ModelError("the model's config sets no longest sequence; give a window in tokens")
        return limit
    if window < 2 or (limit is not None and window > limit):
        raise ModelError(f"a window of {window} tokens does not fit: 2 to {limit or 'any number'} are allowed")
    return window
