"""Rows to calibrate and measure on: a text of the user's, or what the adapter itself says when it is let speak.

On the adapter's own samples the base's loss less the adapter's is KL(adapter || base): a gain that needs no labels.
Knows loaded models and tokens, not what is done with them.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from qlora_core.adapters.parity import TokenRows
from qlora_core.errors import ModelError
from qlora_core.model.adapter_set import AdapterSet
from qlora_core.model.loss import max_positions_of
from qlora_core.model.perplexity import encode_documents, read_text, split_windows
from qlora_core.progress import progress_bar

logger = logging.getLogger(__name__)
MAX_WINDOW_TOKENS = 512
_ROWS_AT_ONCE = 16


def text_rows(folder: Path, text: Path, limit: int | None) -> TokenRows:
    """A UTF-8 text as rows, documents apart by <|endoftext|>, by the tokenizer in `folder`; long ones in windows.

    Raises:
        ModelError: nothing in it can be predicted. DataError: it cannot be read.
    """
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    window = min(MAX_WINDOW_TOKENS, limit or MAX_WINDOW_TOKENS)
    ids, starts = [], []
    for document in encode_documents(tokenizer, read_text(text)):
        for piece in split_windows(document, window):
            if any(piece.loss_mask):
                ids.append(piece.input_ids)
                starts.append(piece.loss_mask.index(True))
    rows = TokenRows(ids, starts, str(text.name))
    if not rows.tokens:
        raise ModelError(f"{text} has no token to predict; give a longer text")
    return rows


def sampled_rows(
    reference: AdapterSet, adapter: str, starts: Sequence[Sequence[int]], *, tokens: int, seed: int
) -> TokenRows:
    """About `tokens` tokens that the adapter answers to `starts` (token ids), drawn at temperature 1 from a seed.

    Rows take the starts in turn, and end at the model's own end token or after 64 tokens.
    """
    model: Any = reference.base
    limit = max_positions_of(model) or MAX_WINDOW_TOKENS
    length = min(64, limit - max(len(start) for start in starts))
    if length < 2:
        raise ModelError(f"prompts of {max(map(len, starts))} tokens leave no room in {limit}; give a text instead")
    rows: list[list[int]] = []
    places: list[int] = []
    logger.info("drawing %d tokens of the adapter's own answers; a text of yours, --text, saves this time", tokens)
    with torch.random.fork_rng(), progress_bar("drawing samples", tokens) as advance:
        torch.manual_seed(seed)
        turn = drawn = 0
        while drawn < tokens and len(rows) < tokens:
            start = list(starts[turn % len(starts)])
            turn += 1
            for row in _sample(reference, adapter, start, length):
                rows.append(row)
                places.append(len(start))
                drawn += len(row) - len(start)
                advance(len(row) - len(start))
    return TokenRows(rows, places, f"{len(rows)} samples of the adapter")


def _sample(reference: AdapterSet, adapter: str, start: Sequence[int], length: int) -> list[list[int]]:
    model: Any = reference.base
    prompt = torch.tensor([list(start)] * _ROWS_AT_ONCE, device=model.device)
    end = model.generation_config.eos_token_id
    ends = {end} if isinstance(end, int) else set(end or ())
    with reference.rows([adapter] * _ROWS_AT_ONCE), torch.inference_mode():
        found = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=length,
            pad_token_id=min(ends, default=0),
            use_cache=True,
        )
    rows = []
    for row in found.tolist():
        stop = next((place for place in range(len(start), len(row)) if row[place] in ends), len(row) - 1)
        rows.append(row[: stop + 1])
    return rows
