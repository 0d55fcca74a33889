"""The sides of the split in tokens, written shard by shard and counted on the way. Decides nothing."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from qlora_core.config.curation import PackingConfig
from qlora_core.config.data import DataConfig
from qlora_core.data.chat_template import ChatTokenizer
from qlora_core.data.loss_mask import MaskedRow, encode_proven, text_parts
from qlora_core.data.packing import PACKS_FILE, pack_rows, packing_summary, sequence_tokens, write_packs
from qlora_core.data.preference_pairs import log_lost_pairs, with_rejected
from qlora_core.data.proof_tags import PROOF_SCHEMA
from qlora_core.data.remaining import Remaining
from qlora_core.data.tables import SplitWriter
from qlora_core.data.tags.personal_data import Recogniser
from qlora_core.data.window import fit
from qlora_core.digest import canonical_json
from qlora_core.errors import DataError
from qlora_core.progress import progress_bar

BATCH_ROWS = 512
SAMPLE_ROWS = 20


@dataclass
class WrittenSide:
    """What was written of one side: ids, lengths and trained tokens by row, counts by source, samples, names of tags.

    `digest` is over the rows in order: ids, categories, messages with their train flags.
    """

    ids: list[str] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    trained: list[int] = field(default_factory=list)
    sources: Counter[str] = field(default_factory=Counter)
    tokens_by_source: Counter[str] = field(default_factory=Counter)
    licences: dict[str, Counter[str]] = field(default_factory=dict)
    generators: Counter[str] = field(default_factory=Counter)
    samples: list[dict[str, Any]] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    digest: Any = field(default_factory=hashlib.sha256)

    def add(self, masked: MaskedRow) -> None:
        """Count one row."""
        row = masked.row
        self.ids.append(row.id)
        self.lengths.append(len(masked.input_ids))
        # A row's first token is predicted from nothing, so it never carries loss.
        self.trained.append(sum(masked.loss_mask[1:]))
        self.sources[row.source] += 1
        self.tokens_by_source[row.source] += len(masked.input_ids)
        self.licences.setdefault(row.source, Counter())[row.licence or "not stated"] += 1
        self.generators[row.generator or "not stated"] += 1
        messages = [[message.role, message.content, message.train] for message in row.messages]
        extra = [value for value in (row.tools, row.rejected) if value is not None]
        self.digest.update(canonical_json([row.id, row.category, messages, *extra]) + b"\n")


def write_sides(
    out: Path,
    remaining: Remaining,
    sides: Mapping[str, np.ndarray],
    chat: ChatTokenizer,
    limit: int,
    config: DataConfig,
) -> dict[str, WrittenSide]:
    """Tokenize the rows of every side, in the order given (rising id), and write them with their tags.

    Rows are proven already; they are encoded again, some hundred at a time, and not kept.
    """
    types = {entry.name: entry.type for entry in remaining.tags.table.schema if _is_written(entry)}
    written: dict[str, WrittenSide] = {}
    lost_pairs: Counter[str] = Counter()
    recogniser = Recogniser(config.tags.allow)
    with progress_bar("Tokenizing", sum(map(len, sides.values()))) as advance:
        for side, positions in sides.items():
            written[side] = WrittenSide(tags=list(types))
            with SplitWriter(out, side, len(positions), config.shard_rows, types) as writer:
                for batch in _batches(positions):
                    masked = _masked(remaining, batch, chat, limit, config)
                    masked = with_rejected(chat, masked, limit, config.over_long, lost_pairs)
                    tags = remaining.tags.take(batch).table
                    writer.write(masked, {name: tags.column(name).combine_chunks() for name in types})
                    for one in masked:
                        written[side].add(one)
                        if side == "train" and len(written[side].samples) < SAMPLE_ROWS:
                            written[side].samples.append(_sample(chat, one, recogniser))
                    advance(len(batch))
    log_lost_pairs(lost_pairs)
    return written


def write_packed(out: Path, train: WrittenSide, limit: int, config: PackingConfig) -> dict[str, Any] | None:
    """Write which training rows share a sequence; what that saves, or None where packing is off."""
    if not config.enabled:
        return None
    lengths, trained = np.array(train.lengths, np.int64), np.array(train.trained, np.int64)
    packs = pack_rows(train.ids, lengths, trained, sequence_tokens(config.tokens, limit))
    write_packs(out / PACKS_FILE, packs, train.ids)
    return packing_summary(packs, lengths, trained)


def _batches(positions: np.ndarray) -> Iterator[np.ndarray]:
    return (positions[start : start + BATCH_ROWS] for start in range(0, len(positions), BATCH_ROWS))


def _masked(
    remaining: Remaining, positions: np.ndarray, chat: ChatTokenizer, limit: int, config: DataConfig
) -> list[MaskedRow]:
    masked = [fit(one, limit, config.over_long) for one in encode_proven(chat, remaining.rows.select(positions))]
    fitting = [one for one in masked if one is not None]
    if len(fitting) != len(masked):
        raise DataError(
            f"{len(masked) - len(fitting)} rows are longer than {limit} tokens, but were measured as shorter. The tag "
            "cache is not of this tokenizer: remove it, and please report this"
        )
    return fitting


def _is_written(entry: pa.Field) -> bool:
    """Tags of one value a row, but for those of the proof: its figures are columns of the rows themselves."""
    kinds = (pa.types.is_boolean, pa.types.is_integer, pa.types.is_floating, pa.types.is_string)
    return entry.name not in PROOF_SCHEMA.names and any(is_kind(entry.type) for is_kind in kinds)


def _sample(chat: ChatTokenizer, masked: MaskedRow, recogniser: Recogniser) -> dict[str, Any]:
    """The row as trained, for the report: secrets and personal data are masked there even where the row keeps them."""
    parts = text_parts(chat, masked.input_ids, masked.loss_mask)
    shown = [{"text": recogniser.masked(text), "trained": trained} for text, trained in parts]
    return {"id": masked.row.id, "text_parts": shown}
