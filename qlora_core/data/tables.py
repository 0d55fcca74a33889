"""The Parquet files of a curated set: what is in them, written so that equal rows give equal bytes."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from qlora_core.data.ledger import Dropped
from qlora_core.data.loss_mask import MaskedRow
from qlora_core.data.records import Quarantined

ROW_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("line", pa.int64(), nullable=False),
        pa.field("category", pa.string()),
        pa.field("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("reference", pa.string(), nullable=False),
        pa.field("input_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("loss_mask", pa.list_(pa.bool_()), nullable=False),
        pa.field("licence", pa.string()),
        pa.field("generator", pa.string()),
    ]
)
DROPPED_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("line", pa.int64(), nullable=False),
        pa.field("rule", pa.string(), nullable=False),
        pa.field("matched_id", pa.string()),
        pa.field("tokens", pa.int64()),
    ]
)
QUARANTINE_SCHEMA = pa.schema(
    [
        pa.field("file", pa.string(), nullable=False),
        pa.field("line", pa.int64(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
    ]
)


def write_rows(path: Path, rows: Sequence[MaskedRow]) -> None:
    """One side of the split, in the order given. `prompt` and `reference` are those of the last trained answer."""
    last = [masked.turns[-1] for masked in rows]
    columns = {
        "id": [masked.row.id for masked in rows],
        "source": [masked.row.source for masked in rows],
        "line": [masked.row.line for masked in rows],
        "category": [masked.row.category for masked in rows],
        "messages": [[{"role": m.role, "content": m.content} for m in masked.row.messages] for masked in rows],
        "prompt": [turn.prompt for turn in last],
        "reference": [m.row.messages[t.message_index].content for m, t in zip(rows, last, strict=True)],
        "input_ids": [masked.input_ids for masked in rows],
        "loss_mask": [masked.loss_mask for masked in rows],
        "licence": [masked.row.licence for masked in rows],
        "generator": [masked.row.generator for masked in rows],
    }
    _write(path, pa.table(columns, schema=ROW_SCHEMA))


def write_dropped(path: Path, dropped: Sequence[Dropped]) -> None:
    """The ledger of dropped rows, by source, line and rule."""
    ordered = sorted(dropped, key=lambda drop: (drop.source, drop.line, drop.rule, drop.id))
    columns = {name: [getattr(drop, name) for drop in ordered] for name in DROPPED_SCHEMA.names}
    _write(path, pa.table(columns, schema=DROPPED_SCHEMA))


def write_quarantine(path: Path, quarantined: Sequence[Quarantined]) -> None:
    """The records set aside, by file, line and reason."""
    ordered = sorted(quarantined, key=lambda entry: (entry.file, entry.line, entry.reason))
    columns = {name: [getattr(entry, name) for entry in ordered] for name in QUARANTINE_SCHEMA.names}
    _write(path, pa.table(columns, schema=QUARANTINE_SCHEMA))


def _write(path: Path, table: pa.Table) -> None:
    pq.write_table(table, path, compression="zstd")
