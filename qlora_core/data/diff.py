"""What changed between two curated folders. Reads columns, keeps ids; knows nothing of how the folders were made.

A row is known by its id, the content hash of its messages. A row whose answer was edited is therefore one row removed
and one added; where both have the same opening prompt the two are shown as a changed answer.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from qlora_core.data.split import SIDES
from qlora_core.data.split_columns import iter_columns, read_columns, split_schema
from qlora_core.data.text_form import folded
from qlora_core.errors import DataError

SHOWN = 5
# Columns that are the row itself or where it was found, and not something said about it.
NO_TAGS = {"id", "line", "prompt", "reference"}
# What in curation.json was chosen and not measured.
SETTINGS = ("config", "chat_template", "max_tokens")
# What has its own place in the diff, and rows' texts.
NO_FIGURES = {*SETTINGS, "rows", "splits", "by_source", "reasons", "quarantine_reasons", "samples", "digest"}
NOT_READ = "not in the other set's sources"


@dataclass(frozen=True, slots=True)
class Change:
    """One value before and after; None where there is none."""

    before: Any
    after: Any


@dataclass(frozen=True, slots=True)
class RowChanges:
    """So many rows, and the first ids among them, in order."""

    rows: int
    ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CuratedDiff:
    """What `b` has that `a` has not, and the other way round. Counts are of rows kept in a split.

    `added_from` and `removed_to` say where added rows were in `a` and removed ones are in `b`: the rule that dropped
    them there, or that they were not read at all. `changed_answers` counts pairs of one removed and one added row with
    the same opening prompt (case, spacing and punctuation aside). `moved` is keyed `train -> test`; `changed_tags` by
    column, for rows in both. `settings` and `figures` hold values of curation.json that differ, by dotted path: what
    was chosen, and single measured values; lists of measured values are left out. Of a list among the settings each
    side says what the other lacks.
    """

    digest: Change
    rows: Change
    splits: Mapping[str, Change]
    sources: Mapping[str, Change]
    added: RowChanges
    removed: RowChanges
    added_from: Mapping[str, int]
    removed_to: Mapping[str, int]
    moved: Mapping[str, RowChanges]
    changed_answers: RowChanges
    changed_tags: Mapping[str, RowChanges]
    columns: Change
    drop_rules: Mapping[str, Change]
    quarantine_reasons: Mapping[str, Change]
    settings: Mapping[str, Change]
    figures: Mapping[str, Change]

    @property
    def same(self) -> bool:
        """True if the sets hold the same rows on the same sides, by their content digest."""
        return self.digest.before == self.digest.after

    def to_json(self) -> dict[str, Any]:
        """The diff as JSON values, with `same` first."""
        return {"same": self.same, **asdict(self)}

    def text(self) -> str:
        """The diff for people: what did not change is left out."""
        same = "the same content" if self.same else "different content"
        lines = [f"{same}: digest {self.digest.before} -> {self.digest.after}"]
        lines += [f"rows kept: {_arrow(self.rows)}", *_table("split", self.splits), *_table("source", self.sources)]
        lines += [
            _rows("added", self.added, self.added_from, "before: "),
            _rows("removed", self.removed, self.removed_to),
        ]
        lines += [_rows("changed answers to equal prompts", self.changed_answers)]
        lines += [_rows(f"moved {way}", change) for way, change in self.moved.items()] or ["moved between splits: 0"]
        lines += [_rows(f"changed {name}", change) for name, change in self.changed_tags.items()]
        if self.columns.before or self.columns.after:
            lines.append(f"columns in one set only: {', '.join([*self.columns.before, *self.columns.after])}")
        lines += [*_table("dropped by", self.drop_rules), *_table("quarantined", self.quarantine_reasons)]
        return "\n".join([*lines, *_table("setting", self.settings), *_table("figure", self.figures)])


@dataclass(frozen=True, slots=True)
class _CuratedSet:
    """The ids of a folder's rows and where they are, by position: splits in the order of `SIDES`."""

    folder: Path
    curation: Mapping[str, Any]
    ids: pa.Array
    side: np.ndarray
    source: pa.Array


def diff_curated(a: Path, b: Path) -> CuratedDiff:
    """Compare the curated folder `b` with `a`, which came before it.

    Memory is for the ids and one column at a time. Raises DataError for a folder that is no curated set.
    """
    before, after = _open(a), _open(b)
    # For each row of `a` its position in `b`, and the other way round; -1 where it is not.
    in_after, in_before = _positions(before.ids, after.ids), _positions(after.ids, before.ids)
    removed, added = in_after < 0, in_before < 0
    tags, columns = _tag_changes(before, after, in_after)
    return CuratedDiff(
        digest=Change(before.curation.get("digest"), after.curation.get("digest")),
        rows=Change(len(before.ids), len(after.ids)),
        splits=_counts(*({s: int((d.side == i).sum()) for i, s in enumerate(SIDES)} for d in (before, after))),
        sources=_counts(*(_value_counts(d.source) for d in (before, after))),
        added=_row_changes(after.ids, added),
        removed=_row_changes(before.ids, removed),
        added_from=_fates(after.ids, added, before.folder),
        removed_to=_fates(before.ids, removed, after.folder),
        moved=_moved(before, after, in_after),
        changed_answers=_changed_answers(before, removed, after, added),
        changed_tags=tags,
        columns=columns,
        drop_rules=_counts(*(d.curation.get("reasons", {}) for d in (before, after))),
        quarantine_reasons=_counts(*(d.curation.get("quarantine_reasons", {}) for d in (before, after))),
        settings=_differing(*(_settings(d.curation) for d in (before, after))),
        figures=_differing(*(_figures(d.curation) for d in (before, after))),
    )


def _open(folder: Path) -> _CuratedSet:
    path = folder / "curation.json"
    try:
        curation = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{str(folder)!r} is no curated set: {error}. Name the folder that `qlora curate` reports as its path"
        ) from error
    if not isinstance(curation, dict):
        raise DataError(f"{str(path)!r} holds no JSON object; curate the data again")
    tables = [read_columns(folder, side, ["id", "source"]) for side in SIDES]
    ids = _one([table.column("id") for table in tables])
    side = np.repeat(np.arange(len(SIDES), dtype=np.int8), [len(table) for table in tables])
    return _CuratedSet(folder, curation, ids, side, _one([table.column("source") for table in tables]))


def _one(columns: Sequence[pa.ChunkedArray]) -> pa.Array:
    """Text columns after each other as one array; dictionaries become their words."""
    chunks = [chunk.cast(pa.large_string()) for column in columns for chunk in column.chunks]
    return pa.concat_arrays([pa.array([], pa.large_string()), *chunks])


def _positions(ids: pa.Array, among: pa.Array) -> np.ndarray:
    found = pc.call_function("index_in", [ids], pc.SetLookupOptions(value_set=among))
    return found.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)


def _row_changes(ids: pa.Array, chosen: np.ndarray) -> RowChanges:
    mine = ids.filter(pa.array(chosen))
    first = pc.call_function("sort_indices", [mine])[:SHOWN]
    return RowChanges(len(mine), tuple(mine.take(first).to_pylist()))


def _value_counts(values: pa.Array) -> dict[str, int]:
    return {entry["values"]: entry["counts"] for entry in values.value_counts().to_pylist()}


def _counts(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, Change]:
    return {name: Change(old or 0, new or 0) for name, old, new in _joined(before, after)}


def _joined(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    names = [*before, *(name for name in after if name not in before)]
    return [(name, before.get(name), after.get(name)) for name in names]


def _fates(ids: pa.Array, chosen: np.ndarray, other: Path) -> dict[str, int]:
    """By which rule the other set dropped these rows, most rows first."""
    mine = ids.filter(pa.array(chosen))
    try:
        dropped = pq.read_table(other / "dropped.parquet", columns=["id", "rule"])
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{str(other)!r} has no ledger of dropped rows: {error}. Curate the data again") from error
    place = _positions(mine, _one([dropped.column("id")]))
    rules = _one([dropped.column("rule")]).take(pa.array(place[place >= 0]))
    fates = Counter({**_value_counts(rules), NOT_READ: int((place < 0).sum())})
    return {name: count for name, count in sorted(fates.items(), key=lambda item: (-item[1], item[0])) if count}


def _moved(before: _CuratedSet, after: _CuratedSet, in_after: np.ndarray) -> dict[str, RowChanges]:
    both = in_after >= 0
    now = np.where(both, after.side[in_after], -1) if len(after.side) else np.full(len(in_after), -1)
    ways = {}
    for old, name in enumerate(SIDES):
        for new, other in enumerate(SIDES):
            moved = both & (before.side == old) & (now == new)
            if old != new and moved.any():
                ways[f"{name} -> {other}"] = _row_changes(before.ids, moved)
    return ways


def _changed_answers(before: _CuratedSet, removed: np.ndarray, after: _CuratedSet, added: np.ndarray) -> RowChanges:
    """Added rows that answer a removed row's prompt: of n removed and m added with one prompt, min(n, m)."""
    gone = np.unique(_prompt_digests(before, removed), return_counts=True)
    digests = _prompt_digests(after, added)
    positions = np.flatnonzero(added)
    rank = np.argsort(np.array(after.ids.take(pa.array(positions)).to_pylist(), dtype=object), kind="stable")
    left = dict(zip(gone[0].tolist(), gone[1].tolist(), strict=True))
    chosen = np.zeros(len(added), bool)
    for place in rank.tolist():
        digest = digests[place].item()
        if left.get(digest, 0):
            left[digest] -= 1
            chosen[positions[place]] = True
    return _row_changes(after.ids, chosen)


def _prompt_digests(rows: _CuratedSet, chosen: np.ndarray) -> np.ndarray:
    """A 128-bit digest (S16) of the folded opening prompt of each chosen row, in the order of the rows."""
    digests = bytearray()
    start = 0
    for side in SIDES:
        for batch in iter_columns(rows.folder, side, ["messages"]):
            mine = batch.column(0).filter(pa.array(chosen[start : start + len(batch)]))
            start += len(batch)
            for messages in mine.to_pylist():
                prompt = next((turn["content"] for turn in messages if turn["role"] == "user"), "")
                digests += hashlib.blake2b(folded(prompt).encode(), digest_size=16).digest()
    return np.frombuffer(bytes(digests), "V16")


def _tag_changes(before: _CuratedSet, after: _CuratedSet, in_after: np.ndarray) -> tuple[dict[str, RowChanges], Change]:
    """Columns of single values whose value differs in rows of both sets; and the columns that one set alone has."""
    mine, theirs = (_tag_columns(rows.folder) for rows in (before, after))
    positions = np.flatnonzero(in_after >= 0)
    partners = in_after[positions]
    changes = {}
    for name in (name for name in mine if name in theirs):
        old, new = (_tag_values(rows, name) for rows in (before, after))
        differs = ~_equal(old.take(pa.array(positions)), new.take(pa.array(partners)))
        if differs.any():
            chosen = np.zeros(len(in_after), bool)
            chosen[positions[differs]] = True
            changes[name] = _row_changes(before.ids, chosen)
    alone = ([f for f in one if f not in other] for one, other in ((mine, theirs), (theirs, mine)))
    return changes, Change(*alone)


def _tag_columns(folder: Path) -> list[str]:
    return [
        field.name
        for field in split_schema(folder, SIDES[0])
        if field.name not in NO_TAGS and not pa.types.is_nested(field.type)
    ]


def _tag_values(rows: _CuratedSet, name: str) -> pa.Array:
    """A column of all splits: texts as they are, booleans and numbers as float64."""
    columns = [read_columns(rows.folder, side, [name]).column(name) for side in SIDES]
    kind = columns[0].type.value_type if pa.types.is_dictionary(columns[0].type) else columns[0].type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        return _one(columns)
    chunks = [chunk.cast(kind) for column in columns for chunk in column.chunks]
    if pa.types.is_boolean(kind):
        chunks = [chunk.cast(pa.int8()) for chunk in chunks]
    return pa.concat_arrays([pa.array([], pa.float64()), *(chunk.cast(pa.float64()) for chunk in chunks)])


def _equal(old: pa.Array, new: pa.Array) -> np.ndarray:
    """True where both are missing or NaN, or both are equal; a text is compared with a number as a text."""
    if old.type != new.type:
        old, new = old.cast(pa.large_string()), new.cast(pa.large_string())
    missing = [pc.call_function("is_null", [a], pc.NullOptions(nan_is_null=True)) for a in (old, new)]
    old_missing, new_missing = (mask.to_numpy(zero_copy_only=False) for mask in missing)
    same = pc.call_function("equal", [old, new]).fill_null(False).to_numpy(zero_copy_only=False)
    return same | (old_missing & new_missing)


def _settings(curation: Mapping[str, Any]) -> dict[str, Any]:
    return _flat({name: curation[name] for name in SETTINGS if name in curation})


def _figures(curation: Mapping[str, Any]) -> dict[str, Any]:
    """Single values only: a histogram or a list of ids says nothing in one line."""
    flat = _flat({name: value for name, value in curation.items() if name not in NO_FIGURES})
    return {path: value for path, value in flat.items() if not isinstance(value, (list, dict))}


def _differing(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Change]:
    return {path: _change(old, new) for path, old, new in _joined(before, after) if old != new}


def _change(old: Any, new: Any) -> Change:
    if not (isinstance(old, list) and isinstance(new, list)):
        return Change(_first(old), _first(new))
    lacking = Change(_first([v for v in old if v not in new]), _first([v for v in new if v not in old]))
    # The same values in another order, or another number of times.
    return lacking if lacking.before or lacking.after else Change(_first(old), _first(new))


def _first(value: Any) -> Any:
    if not isinstance(value, list) or len(value) <= SHOWN:
        return value
    return [*value[:SHOWN], f"and {len(value) - SHOWN} more"]


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {path: value}
    return {
        inner: found
        for name, part in value.items()
        for inner, found in _flat(part, f"{path}.{name}" if path else name).items()
    }


def _arrow(change: Change) -> str:
    return f"{change.before} -> {change.after}"


def _table(what: str, changes: Mapping[str, Change]) -> list[str]:
    return [f"{what} {name}: {_arrow(change)}" for name, change in changes.items() if change.before != change.after]


def _rows(what: str, change: RowChanges, why: Mapping[str, int] | None = None, lead: str = "now: ") -> str:
    reasons = f" ({lead}{', '.join(f'{name} {count}' for name, count in why.items())})" if why else ""
    shown = f", e.g. {', '.join(row_id[:12] for row_id in change.ids)}" if change.ids else ""
    return f"{what}: {change.rows}{reasons}{shown}"
