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
from qlora_core.data.loss_mask import MaskedRow, TrainedTurn, encode_proven
from qlora_core.data.row import Row
from qlora_core.data.row_store import RowView
from qlora_core.data.tags.cache import KEY_TYPE, TagCache
from qlora_core.data.tags.proof import tokenizer_settings
from qlora_core.data.tags.tagger import KEY_BYTES, fingerprint_of

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


class EncodedRows:
    """The tokens of `rows`, which the encoder's tokenizer has proven before.

    `whole` (bool, a value a row) is False for rows that were cut: their id is that of the uncut row, so they are
    neither looked up nor kept.
    """

    def __init__(self, encoder: Encoder, rows: RowView, whole: np.ndarray) -> None:
        self._chat, self._cache, self._rows, self._whole = encoder.chat, encoder.cache, rows, whole
        self._keys = _keys(rows)
        self._settings = tokenizer_settings(encoder.chat, encoder.folder)

    def parts(self, positions: np.ndarray) -> list[np.ndarray]:
        """`positions`, which come by rising id, cut into PARTS runs; a run may be empty."""
        first = self._keys[positions].view(np.uint8).reshape(-1, KEY_BYTES)[:, 0] // (256 // PARTS)
        return np.split(positions, np.searchsorted(first, np.arange(1, PARTS)))

    def encode(self, part: int, batches: Sequence[np.ndarray]) -> Iterator[list[MaskedRow]]:
        """The rows of each batch of positions in tokens, as `encode_proven` gives them; all lie in one part.

        What was not kept before is kept when the last batch was taken. Raises MaskError as `encode_proven` does.
        """
        if self._cache is None:
            yield from (encode_proven(self._chat, self._rows.select(batch)) for batch in batches)
            return
        if not batches:
            return
        fingerprint = fingerprint_of(f"encoding {part}", ENCODING_VERSION, ENCODING_SCHEMA, self._settings)
        places = np.concatenate(batches)
        hit, found = np.zeros(len(places), bool), ENCODING_SCHEMA.empty_table()
        whole = np.flatnonzero(self._whole[places])
        hit[whole], found = self._cache.lookup(fingerprint, ENCODING_SCHEMA, self._keys[places[whole]])
        made: list[pa.Table] = [ENCODING_SCHEMA.empty_table()]
        start = taken = 0
        for batch in batches:
            known = hit[start : start + len(batch)]
            count = int(known.sum())
            masked, new = self._batch(batch, known, found.slice(taken, count))
            made.append(_table([one for one, keep in zip(new, self._whole[batch[~known]], strict=True) if keep]))
            start, taken = start + len(batch), taken + count
            yield masked
        self._cache.append(fingerprint, self._keys[places[~hit & self._whole[places]]], pa.concat_tables(made))

    def _batch(self, batch: np.ndarray, known: np.ndarray, found: pa.Table) -> tuple[list[MaskedRow], list[MaskedRow]]:
        """All rows of the batch in order, and those of them that were encoded now."""
        rows = list(self._rows.select(batch))
        new = encode_proven(self._chat, [row for row, is_known in zip(rows, known, strict=True) if not is_known])
        kept, made = zip(*(column.to_pylist() for column in found.columns), strict=True), iter(new)
        masked = [
            _masked(row, *next(kept)) if is_known else next(made) for row, is_known in zip(rows, known, strict=True)
        ]
        return masked, new


def _keys(rows: RowView) -> np.ndarray:
    """Each row's key, S16: the first half of its id."""
    keys = np.zeros(len(rows), KEY_TYPE)
    place = 0
    for chunk in rows.column("id").chunks:
        for row_id in chunk:
            keys[place] = bytes.fromhex(row_id.as_py()[: 2 * KEY_BYTES])
            place += 1
    return keys


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
