"""The sides of the split in tokens, written shard by shard and counted on the way. Decides nothing."""

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from qlora_core.config.curation import PackingConfig
from qlora_core.config.data import DataConfig
from qlora_core.data.chat_template import ChatTokenizer
from qlora_core.data.encodings import PARTS, EncodedRows, Encoder
from qlora_core.data.loss_mask import MaskedRow, text_parts
from qlora_core.data.memory import return_memory
from qlora_core.data.packing import PACKS_FILE, pack_rows, packing_summary, sequence_tokens, write_packs
from qlora_core.data.preference_pairs import log_lost_pairs, with_rejected
from qlora_core.data.proof_tags import PROOF_SCHEMA
from qlora_core.data.remaining import Remaining
from qlora_core.data.split_columns import read_columns
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
    """What was written of one side: lengths and trained tokens by row, counts by source, samples, names of tags.

    `digest` is over the rows in order: ids, categories, messages with their train flags.
    """

    lengths: array = field(default_factory=lambda: array("q"))
    trained: array = field(default_factory=lambda: array("q"))
    sources: Counter[str] = field(default_factory=Counter)
    tokens_by_source: Counter[str] = field(default_factory=Counter)
    licences: dict[str, Counter[str]] = field(default_factory=dict)
    generators: Counter[str] = field(default_factory=Counter)
    samples: list[MaskedRow] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    digest: Any = field(default_factory=hashlib.sha256)

    def add(self, masked: MaskedRow) -> None:
        """Count one row."""
        row = masked.row
        self.lengths.append(len(masked.input_ids))
        # A row's first token is predicted from nothing, so it never carries loss.
        self.trained.append(sum(masked.loss_mask[1:]))
        self.sources[row.source] += 1
        self.tokens_by_source[row.source] += len(masked.input_ids)
        self.licences.setdefault(row.source, Counter())[row.licence or "not stated"] += 1
        self.generators[row.generator or "not stated"] += 1
        if len(self.samples) < SAMPLE_ROWS:
            self.samples.append(masked)
        messages = [[message.role, message.content, message.train] for message in row.messages]
        extra = [value for value in (row.tools, row.rejected) if value is not None]
        self.digest.update(canonical_json([row.id, row.category, messages, *extra]) + b"\n")


def write_sides(
    out: Path,
    remaining: Remaining,
    sides: Mapping[str, np.ndarray],
    encoder: Encoder,
    limit: int,
    config: DataConfig,
) -> dict[str, WrittenSide]:
    """Tokenize the rows of every side, in the order given (rising id), and write them with their tags.

    Rows are proven already; they are encoded again, some hundred at a time, or found as an earlier run encoded them.
    All sides grow together, by ranges of ids.
    """
    types = {entry.name: entry.type for entry in remaining.tags.table.schema if _is_written(entry)}
    written = {side: WrittenSide(tags=list(types)) for side in sides}
    return_memory()
    encoded_rows = EncodedRows(encoder, remaining.rows, remaining.numbers("tokens") <= limit)
    parts = {side: encoded_rows.parts(positions) for side, positions in sides.items()}
    lost_pairs: Counter[str] = Counter()
    with ExitStack() as open_files, progress_bar("Tokenizing", sum(map(len, sides.values()))) as advance:
        writers = {
            side: open_files.enter_context(SplitWriter(out, side, len(positions), config.shard_rows, types))
            for side, positions in sides.items()
        }
        for part in range(PARTS):
            batches = [(side, batch) for side in sides for batch in _batches(parts[side][part])]
            encoded = encoded_rows.encode(part, [batch for _, batch in batches])
            for (side, batch), proven in zip(batches, encoded, strict=True):
                masked = _fitting(proven, limit, config)
                masked = with_rejected(encoder.chat, masked, limit, config.over_long, lost_pairs)
                tags = remaining.tags.take(batch).table
                writers[side].write(masked, {name: tags.column(name).combine_chunks() for name in types})
                for one in masked:
                    written[side].add(one)
                advance(len(batch))
            return_memory()
    log_lost_pairs(lost_pairs)
    return written


def show_samples(chat: ChatTokenizer, samples: Sequence[MaskedRow], config: DataConfig) -> list[dict[str, Any]]:
    """Rows as trained, for the report: secrets and personal data are masked there even where the rows keep them."""
    recogniser = Recogniser(config.tags.allow)
    shown = []
    for masked in samples:
        parts = text_parts(chat, masked.input_ids, masked.loss_mask)
        text_of = [{"text": recogniser.masked(text), "trained": trained} for text, trained in parts]
        shown.append({"id": masked.row.id, "text_parts": text_of})
    return shown


def write_packed(out: Path, train: WrittenSide, limit: int, config: PackingConfig) -> dict[str, Any] | None:
    """Write which training rows share a sequence; what that saves, or None where packing is off."""
    if not config.enabled:
        return None
    lengths, trained = np.array(train.lengths, np.int64), np.array(train.trained, np.int64)
    ids = read_columns(out, "train", ["id"]).column("id").to_pylist()
    packs = pack_rows(ids, lengths, trained, sequence_tokens(config.tokens, limit))
    write_packs(out / PACKS_FILE, packs, ids)
    return packing_summary(packs, lengths, trained)


def _batches(positions: np.ndarray) -> Iterator[np.ndarray]:
    return (positions[start : start + BATCH_ROWS] for start in range(0, len(positions), BATCH_ROWS))


def _fitting(proven: Sequence[MaskedRow], limit: int, config: DataConfig) -> list[MaskedRow]:
    masked = [fit(one, limit, config.over_long) for one in proven]
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
