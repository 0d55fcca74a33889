"""Refuses what cannot be trained before a step is taken, and identifies data and base for checkpoints.

Knows nothing of trials.
"""

import hashlib
import logging
from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from qlora_core.data.dataset import PreferenceRow, TokenRow
from qlora_core.digest import digest_json
from qlora_core.errors import TrainingError
from qlora_core.model.encoder_decoder import is_encoder_decoder, start_of_answer
from qlora_core.model.loss import max_positions_of
from qlora_core.training.batches import PackedRows, trained_tokens
from qlora_core.training.preference import answers_of
from qlora_core.training.trial import Trial

logger = logging.getLogger(__name__)

_FINGERPRINT_BYTES = 1 << 16


def trainable_rows(rows: Sequence[TokenRow], split: str) -> list[TokenRow]:
    """The rows that have at least one trained token, in order; how many were left out is logged.

    Raises:
        TrainingError: there are no rows, or every row's labels are all masked.
    """
    if not rows:
        raise TrainingError(f"the {split} split has 0 rows; curate more data or change the split's shares")
    kept = [row for row in rows if trained_tokens(row) > 0]
    if not kept:
        raise TrainingError(
            f"all labels are masked in all {len(rows)} rows of the {split} split (first: {rows[0].id!r}); at least one "
            "assistant token must be trained: check the chat template and data.max_tokens"
        )
    if len(kept) < len(rows):
        left_out = [row.id for row in rows if trained_tokens(row) == 0]
        logger.warning(
            "%d of %d %s rows have no trained token and are left out, first %s",
            len(left_out),
            len(rows),
            split,
            left_out[:3],
        )
    return kept


def check_rows(rows: Sequence[TokenRow], base: PreTrainedModel, split: str) -> None:
    """Check that the base can take every row.

    Raises:
        TrainingError: a mask of another length than its row, a row longer than the base's positions, or a token
            outside the base's vocabulary, no prompt for an encoder. The message names row and value.
        ModelError: an encoder-decoder base whose config does not say how an answer begins.
    """
    start_of_answer(base)  # raises where the base names none
    positions = max_positions_of(base)
    vocabulary = base.config.get_text_config(decoder=True).vocab_size
    answers = (answer for row in rows for answer in (answers_of(row) if isinstance(row, PreferenceRow) else (row,)))
    for row in answers:
        length = len(row.input_ids)
        if len(row.loss_mask) != length:
            raise TrainingError(f"{split} row {row.id!r} has {length} tokens but a loss mask of {len(row.loss_mask)}")
        if positions is not None and length > positions:
            raise TrainingError(
                f"{split} row {row.id!r} has {length} tokens, more than the base model's {positions} positions; "
                f"set data.max_tokens to at most {positions}"
            )
        if is_encoder_decoder(base) and row.loss_mask[0]:
            raise TrainingError(
                f"{split} row {row.id!r} is trained from its first token on, so the encoder of {type(base).__name__} "
                "would have no prompt to read; leave the row out"
            )
        if not 0 <= min(row.input_ids) <= max(row.input_ids) < vocabulary:
            raise TrainingError(
                f"{split} row {row.id!r} holds token ids {min(row.input_ids)} to {max(row.input_ids)}, but the base "
                f"model's vocabulary is 0 to {vocabulary - 1}; was the data curated with another tokenizer?"
            )


def warn_of_few_examples(trial: Trial, count: int) -> None:
    """Say that a trial's `count` examples do not fill one effective batch, so that every step takes all of them."""
    params = trial.params
    batch = params.micro_batch_size * params.gradient_accumulation_steps
    if count < batch:
        logger.warning(
            "trial %s has %d training examples, fewer than its effective batch of %d (train.micro_batch_size %d times "
            "train.gradient_accumulation_steps %d): every step takes all of them; lower one or curate more data",
            trial.id,
            count,
            batch,
            params.micro_batch_size,
            params.gradient_accumulation_steps,
        )


def packed_rows(rows: Sequence[TokenRow], packs: Sequence[Sequence[str]]) -> PackedRows:
    """The rows as the sequences that `packs` lists, by row id.

    Raises:
        TrainingError: the sequences do not hold exactly these rows, each once, or one is empty; the message names one.
    """
    places = {row.id: place for place, row in enumerate(rows)}
    order = np.array([places.get(row_id, -1) for ids in packs for row_id in ids], dtype=np.int64)
    times = np.bincount(order[order >= 0], minlength=len(rows))
    unknown = int((order < 0).sum())
    if unknown or not all(packs) or (times != 1).any():
        odd = [rows[int(place)].id for place in np.flatnonzero(times != 1)[:3]]
        raise TrainingError(
            f"the packed sequences do not fit the training rows: {unknown} ids are of no trainable row, "
            f"{sum(not ids for ids in packs)} sequences are empty, {int((times != 1).sum())} rows are in none or in "
            f"several (first: {odd}); curate the data again"
        )
    return PackedRows(rows, order, np.cumsum([0, *map(len, packs)]))


def digest_rows(rows: Sequence[TokenRow]) -> str:
    """SHA-256 over ids, tokens and masks of the rows in their order."""
    return digest_json([[row.id, *_content(row)] for row in rows])


def _content(row: TokenRow) -> list[list[int]]:
    content = [list(row.input_ids), [int(trained) for trained in row.loss_mask]]
    if isinstance(row, PreferenceRow):
        content += [list(row.rejected_ids), [int(trained) for trained in row.rejected_mask]]
    return content


def fingerprint_base(base: PreTrainedModel) -> str:
    """SHA-256 over name, shape, dtype and the first 64 KiB of every parameter.

    Tells bases apart at the cost of a few megabytes of hashing, where a full digest of a large base takes minutes. It
    is no proof that two bases are equal byte for byte: artifact digests are for that.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(base.named_parameters()):
        head = parameter.detach().reshape(-1)[: _FINGERPRINT_BYTES // parameter.element_size()]
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(head.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
