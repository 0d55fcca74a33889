"""Proven rows in tokens, kept from run to run: what a row's own content decides is not rendered and encoded again.

They lie where tags lie, as segments of the tag cache, apart by the first digit of a row's id: one sixteenth of them is
in memory at a time. Knows nothing of splits, windows or files.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from qlora_core.data.chat_template import ChatTokenizer
from qlora_core.data.encoded_columns import encoded_columns
from qlora_core.data.loss_mask import MaskedRow, TrainedTurn, encode_proven
from qlora_core.data.row import Row
from qlora_core.data.row_store import RowView, rows_of
from qlora_core.data.tables import row_columns
from qlora_core.data.tags.cache import TagCache
from qlora_core.data.tags.proof import tokenizer_settings
from qlora_core.data.tags.tagger import KEY_BYTES, fingerprint_of, tag_keys

# Raise it whenever the tokens, the mask or the prompts of the same row would be others.
ENCODING_VERSION = 1
PARTS = 16
_INTEGERS = pa.list_(pa.field("element", pa.int32()))
# turns: four numbers for each trained turn: its message, its first token, its stop token, its prompt's characters.
# prompt: that of the last trained turn; every other one is the beginning of it.
ENCODING_SCHEMA = pa.schema(
    [pa.field("input_ids", _INTEGERS), pa.field("turns", _INTEGERS), pa.field("prompt", pa.string())]
)


@dataclass(frozen=True, slots=True)
class Encoder:
    """By what rows are encoded: the tokenizer in `folder` with the template of `chat`; without a `cache`, all anew."""

    chat: ChatTokenizer
    folder: Path
    cache: TagCache | None = None


@dataclass(frozen=True, slots=True)
class EncodedBatch:
    """Rows in tokens: those found as columns (ROW_SCHEMA), with their places in the batch, and the others as rows.

    The others are the ones encoded now, and preference pairs, whose worse answers are still to be encoded.
    """

    columns_at: np.ndarray
    columns: pa.Table
    masked_at: np.ndarray
    masked: Sequence[MaskedRow]

    def table(self, masked: Sequence[MaskedRow]) -> pa.Table:
        """All rows as a table of ROW_SCHEMA in the batch's order, with `masked` in the place of those of that name."""
        if not len(self.masked_at):
            return self.columns
        order = np.argsort(np.concatenate([self.columns_at, self.masked_at]))
        return pa.concat_tables([self.columns, row_columns(masked)]).take(pa.array(order))


class EncodedRows:
    """The tokens of `rows`, which the encoder's tokenizer has proven before.

    `whole` (bool, a value a row) is False for rows that were cut: their id is that of the uncut row, so they are
    neither looked up nor kept.
    """

    def __init__(self, encoder: Encoder, rows: RowView, whole: np.ndarray) -> None:
        self._chat, self._cache, self._rows, self._whole = encoder.chat, encoder.cache, rows, whole
        self._keys = tag_keys(rows)
        self._settings = tokenizer_settings(encoder.chat, encoder.folder)

    def parts(self, positions: np.ndarray) -> list[np.ndarray]:
        """`positions`, which come by rising id, cut into PARTS runs; a run may be empty."""
        first = self._keys[positions].view(np.uint8).reshape(-1, KEY_BYTES)[:, 0] // (256 // PARTS)
        return np.split(positions, np.searchsorted(first, np.arange(1, PARTS)))

    def encode(self, part: int, batches: Sequence[np.ndarray]) -> Iterator[EncodedBatch]:
        """The rows of each batch of positions in tokens, as `encode_proven` gives them; all lie in one part.

        What was not kept before is kept when the last batch was taken. Raises MaskError as `encode_proven` does.
        """
        if not batches:
            return
        places = np.concatenate(batches)
        rows = self._rows.select(places).batch()
        hit, found = np.zeros(len(places), bool), ENCODING_SCHEMA.empty_table()
        whole, keys = self._whole[places], self._keys[places]
        fingerprint = fingerprint_of(f"encoding {part}", ENCODING_VERSION, ENCODING_SCHEMA, self._settings)
        if self._cache is not None:
            hit[whole], found = self._cache.lookup(fingerprint, ENCODING_SCHEMA, keys[whole])
        made: list[pa.Table] = [ENCODING_SCHEMA.empty_table()]
        start = taken = 0
        for batch in batches:
            part_of = slice(start, start + len(batch))
            known = hit[part_of]
            count = int(known.sum())
            here = rows.slice(start, len(batch))
            encoded, new = self._batch(here, known, found.slice(taken, count))
            made.append(_table([one for one, keep in zip(new, whole[part_of][~known], strict=True) if keep]))
            start, taken = start + len(batch), taken + count
            yield encoded
        if self._cache is not None:
            self._cache.append(fingerprint, keys[~hit & whole], pa.concat_tables(made))

    def _batch(self, rows: pa.RecordBatch, known: np.ndarray, found: pa.Table) -> tuple[EncodedBatch, list[MaskedRow]]:
        """All rows of the batch, and those of them that were encoded now. `found` belongs to the known ones."""
        is_pair = rows.column("rejected").is_valid().to_numpy(zero_copy_only=False)
        if known.all() and not is_pair.any():
            return EncodedBatch(np.arange(len(rows)), encoded_columns(rows, found), known[:0], []), []
        new_at = np.flatnonzero(~known)
        new = encode_proven(self._chat, list(rows_of(rows.take(pa.array(new_at)))))
        pairs_at, plain_at = np.flatnonzero(known & is_pair), np.flatnonzero(known & ~is_pair)
        pairs = found.filter(pa.array(is_pair[known])).to_pylist()
        kept = [
            _masked(row, **values) for row, values in zip(rows_of(rows.take(pa.array(pairs_at))), pairs, strict=True)
        ]
        plain = encoded_columns(rows.take(pa.array(plain_at)), found.filter(pa.array(~is_pair[known])))
        return EncodedBatch(plain_at, plain, np.concatenate([new_at, pairs_at]), [*new, *kept]), new


def _table(rows: Sequence[MaskedRow]) -> pa.Table:
    turns = [
        [number for turn in one.turns for number in (turn.message_index, turn.start, turn.stop, len(turn.prompt))]
        for one in rows
    ]
    columns = [[one.input_ids for one in rows], turns, [one.turns[-1].prompt for one in rows]]
    return pa.table(dict(zip(ENCODING_SCHEMA.names, columns, strict=True)), schema=ENCODING_SCHEMA)


def _masked(row: Row, input_ids: list[int], turns: list[int], prompt: str) -> MaskedRow:
    mask = [False] * len(input_ids)
    trained = []
    numbers = iter(turns)
    for index, start, stop, characters in zip(numbers, numbers, numbers, numbers, strict=True):
        mask[start : stop + 1] = [True] * (stop + 1 - start)
        trained.append(TrainedTurn(index, prompt[:characters], start, stop))
    return MaskedRow(row, input_ids, mask, tuple(trained))
