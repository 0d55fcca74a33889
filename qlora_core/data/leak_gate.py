"""The last look at a curated set: the files as written, checked from scratch for anything that is on two sides.

It shares with the placement how texts are compared (`relations`), not how rows are placed or who goes. What a near-
duplicate is, it is told: the search needs the wrappers and preambles found among all rows, not only those kept.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from qlora_core.data.dataset import read_conversations
from qlora_core.data.memory import return_memory
from qlora_core.data.relations import Kind, Relations, RelationsBuilder
from qlora_core.data.row import Row, row_id
from qlora_core.data.row_store import ROLES, TRAINED, RowStore, rows_of
from qlora_core.data.split import PRECEDENCE, SIDES
from qlora_core.data.text_form import folded
from qlora_core.errors import DataError

SHOWN_LEAKS = 5
REASONS = {
    Kind.CONVERSATION: "the same conversation",
    Kind.PROMPT: "a prompt is a user turn of the other",
    Kind.TURN: "a prompt is a user turn of the other",
    Kind.GROUP: "the same declared group",
    Kind.NEAR_DUPLICATE: "near-duplicates",
}

ClusterRows = Callable[[Sequence[Row]], np.ndarray]


def check_no_leaks(folder: Path, cluster_rows: ClusterRows | None = None) -> None:
    """Read the three written splits and compare every two of them.

    `cluster_rows` takes all written rows, the source of each being its side and its id made anew from what is written,
    and gives each the number of its near-duplicate cluster, -1 for none; None leaves near-duplicates unchecked.

    Raises DataError, naming ids, if two sides share a whole conversation (case, spacing and punctuation aside), a
    declared group key or a near-duplicate cluster, if a prompt of one side is a user turn on another, or if an id
    occurs twice.
    """
    relations, side, written = _read(folder, keep=cluster_rows is not None)
    return_memory()
    if cluster_rows is not None:
        relations = relations.with_clusters(np.asarray(cluster_rows(written)))
    leaking = _leaking_entries(relations, side)
    rows = np.unique(relations.row[leaking])
    faults = [_describe(relations, side, leaking, row) for row in rows[:SHOWN_LEAKS].tolist()]
    repeated = relations.repeated()
    faults += [f"{relations.ids[row].as_py()} occurs twice" for row in repeated[:SHOWN_LEAKS].tolist()]
    if faults:
        raise DataError(
            f"the written splits leak, {len(rows)} rows, and {len(repeated)} ids occur twice: {'; '.join(faults)}. "
            "Do not evaluate on this set; curate again, and report this: curation should have dropped these rows"
        )


def _read(folder: Path, *, keep: bool) -> tuple[Relations, np.ndarray, RowStore]:
    """The relations of all written rows, the place in `PRECEDENCE` of each row's side, and if asked for the rows."""
    builder, store = RelationsBuilder(), RowStore()
    counts = dict.fromkeys(SIDES, 0)
    for name in SIDES:
        for batch in read_conversations(folder, name):
            _relate(builder, batch)
            counts[name] += len(batch)
            if keep:
                store.append_batch(_by_content(batch))
    places = [PRECEDENCE.index(name) for name in SIDES]
    return builder.build(), np.repeat(np.array(places, np.int8), [counts[name] for name in SIDES]), store


def _relate(builder: RelationsBuilder, batch: pa.RecordBatch) -> None:
    columns = (batch.column(name).to_pylist() for name in ("id", "turns", "contents", "group_keys"))
    for written_id, codes, contents, group_keys in zip(*columns, strict=True):
        turns = [(ROLES[code & ~TRAINED], folded(text)) for code, text in zip(codes, contents, strict=True)]
        builder.add(written_id, [text for role, text in turns if role == "user"], group_keys, _whole(turns))


def _whole(turns: Sequence[tuple[str, str]]) -> str:
    """One text for a conversation; the lengths keep a turn's text from being taken for a border."""
    return "".join(f"{role} {len(text)} {text}" for role, text in turns)


def _by_content(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The rows under the ids of what they say: what others know of an id must not stand in for what was written."""
    ids = pa.array([row_id(row.messages, row.tools, row.rejected) for row in rows_of(batch)], pa.string())
    return batch.set_column(batch.schema.get_field_index("id"), batch.schema.field("id"), ids)


def _leaking_entries(relations: Relations, side: np.ndarray) -> np.ndarray:
    """True for an entry whose key ties its row to one on a side that takes precedence.

    Bit s of a key's mask is set if a row on side s has the key; entries of later turns look only at rows that have it
    as more than that.
    """
    own = side[relations.row]
    any_holder = np.zeros(relations.keys, np.uint8)
    strong_holder = np.zeros(relations.keys, np.uint8)
    bit = np.left_shift(np.uint8(1), own.astype(np.uint8))
    np.bitwise_or.at(any_holder, relations.key, bit)
    np.bitwise_or.at(strong_holder, relations.key[relations.strong], bit[relations.strong])
    seen = np.where(relations.strong, any_holder[relations.key], strong_holder[relations.key])
    return (seen & (bit - 1)) > 0


def _describe(relations: Relations, side: np.ndarray, leaking: np.ndarray, row: int) -> str:
    entries = np.flatnonzero(leaking & (relations.row == row))
    entry = entries[np.argmin(relations.kind[entries])]
    others = (relations.key == relations.key[entry]) & (side[relations.row] < side[row])
    if relations.kind[entry] == Kind.TURN:
        others &= relations.strong
    candidates = relations.row[others]
    match = candidates[np.lexsort((relations.rank[candidates], side[candidates]))[0]]
    later, earlier = (f"{relations.ids[int(r)].as_py()} ({PRECEDENCE[side[r]]})" for r in (row, match))
    return f"{later} matches {earlier}: {REASONS[Kind(int(relations.kind[entry]))]}"
