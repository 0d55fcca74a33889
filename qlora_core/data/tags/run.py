"""Tagging rows: what the cache has is taken from it, the rest is tagged in batches and kept. Knows no tagger."""

import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from qlora_core.data.row import Row
from qlora_core.data.row_store import RowStore, RowView
from qlora_core.data.tags.cache import TagCache
from qlora_core.data.tags.table import TagStats, TagTable
from qlora_core.data.tags.tagger import LabelTagger, Tagger, tag_keys
from qlora_core.errors import ConfigError
from qlora_core.progress import progress_bar

logger = logging.getLogger(__name__)

BATCH_ROWS = 1024
# What may be lost when a run dies: a slow tagger keeps its work every minute, a quick one every so many rows.
_KEPT_ROWS = 65_536
_KEPT_EVERY_S = 60.0


@dataclass
class _Task:
    """One tagger's work. Texts that occur more than once (equal keys or labels) are tagged once.

    `first` (u texts) is the position of each text's first row, `inverse` (n rows) each row's text; `hit` (u) says which
    were in the cache, `missing` (m) which texts are tagged now, by position, and `done` how many of them already are.
    """

    tagger: Tagger
    keys: np.ndarray | None
    first: np.ndarray
    inverse: np.ndarray
    hit: np.ndarray
    missing: np.ndarray
    parts: list[pa.Table]
    failed: np.ndarray
    done: int = 0
    kept: int = 0
    kept_at: float = field(default_factory=time.monotonic)


def tag_rows(rows: Sequence[Row], taggers: Sequence[Tagger], cache: TagCache | None) -> TagTable:
    """The tags of all rows, aligned with them; no rows give an empty table with all columns.

    Rows are built batch by batch; what stays in memory is the table and some 40 bytes a row and tagger. Failed rows
    hold nulls, are counted in `stats`, and are not kept in the cache. Raises ConfigError for two taggers of one column.
    """
    _check_columns(taggers)
    keys = tag_keys(rows) if cache is not None and any(tagger.cached for tagger in taggers) else None
    distinct = None if keys is None else np.unique(keys, return_index=True, return_inverse=True)
    tasks = [_task(tagger, rows, distinct, cache) for tagger in taggers]
    needed = np.unique(np.concatenate([task.first[task.missing] for task in tasks])) if tasks else np.empty(0, np.int64)
    with progress_bar("Tagging", len(needed)) as advance:
        for start in range(0, len(needed), BATCH_ROWS):
            positions = needed[start : start + BATCH_ROWS]
            batch = _rows_at(rows, positions)
            for task in tasks:
                _tag_batch(task, positions, batch)
                _keep(task, cache, at_once=False)
            advance(len(batch))
    for task in tasks:
        _keep(task, cache, at_once=True)
    tables = [_aligned(task) for task in tasks]
    columns = {name: table.column(name) for table in tables for name in table.column_names}
    schema = pa.schema([column for task in tasks for column in task.tagger.schema])
    stats = {task.tagger.name: _stats(task) for task in tasks}
    _log(stats)
    return TagTable(pa.table(columns, schema=schema), stats)


def _check_columns(taggers: Sequence[Tagger]) -> None:
    counts = Counter(name for tagger in taggers for name in [*tagger.schema.names, f"tagger {tagger.name}"])
    twice = sorted(name for name, count in counts.items() if count > 1)
    if twice:
        raise ConfigError(
            f"data.tags: {', '.join(twice)} would be there twice; a plug-in is named like its function, so give the "
            "function another name"
        )


def _task(
    tagger: Tagger, rows: Sequence[Row], distinct: tuple[np.ndarray, ...] | None, cache: TagCache | None
) -> _Task:
    if tagger.cached and distinct is not None:
        unique, first, inverse = distinct
    elif isinstance(tagger, LabelTagger):
        unique, (first, inverse) = None, _by_labels(rows, tagger.labels)
    else:
        unique, first, inverse = None, np.arange(len(rows)), np.arange(len(rows))
    hit, found = np.zeros(len(first), dtype=bool), tagger.schema.empty_table()
    if cache is not None and unique is not None:
        hit, found = cache.lookup(tagger.fingerprint, tagger.schema, unique)
    missing = np.flatnonzero(~hit)
    missing = missing[np.argsort(first[missing], kind="stable")]
    return _Task(tagger, unique, first, inverse, hit, missing, [found], np.zeros(len(first), dtype=bool))


def _by_labels(rows: Sequence[Row], labels: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The first row of each group of rows with the same labels, and each row's group."""
    numbers = np.zeros(len(rows), np.int64)
    for name in labels:
        if isinstance(rows, RowStore | RowView):
            column = rows.column(name).cast(pa.string())
        else:
            column = pa.chunked_array([pa.array([getattr(row, name) for row in rows], pa.string())])
        codes = column.combine_chunks().dictionary_encode(null_encoding="encode")
        numbers = numbers * (len(codes.dictionary) + 1) + codes.indices.to_numpy()
        # Numbered anew, so that many labels do not exceed 64 bits
        numbers = np.unique(numbers, return_inverse=True)[1]
    _, first, inverse = np.unique(numbers, return_index=True, return_inverse=True)
    return first, inverse


def _rows_at(rows: Sequence[Row], positions: np.ndarray) -> list[Row]:
    if isinstance(rows, RowStore | RowView):
        return list(rows.select(positions))
    return [rows[position] for position in positions.tolist()]


def _tag_batch(task: _Task, positions: np.ndarray, batch: Sequence[Row]) -> None:
    """Tag those rows of the batch that this tagger lacks: the next ones of `missing`, since both are in order."""
    end = task.done + int(np.searchsorted(task.first[task.missing[task.done :]], positions[-1], side="right"))
    texts = task.missing[task.done : end]
    if not len(texts):
        return
    places = np.searchsorted(positions, task.first[texts])
    made = task.tagger.tag([batch[place] for place in places.tolist()])
    task.parts.append(made.table)
    task.failed[texts] = made.failed
    task.done = end


def _keep(task: _Task, cache: TagCache | None, *, at_once: bool) -> None:
    waiting = task.done - task.kept
    late = time.monotonic() - task.kept_at > _KEPT_EVERY_S
    if cache is None or task.keys is None or not waiting or not (at_once or late or waiting >= _KEPT_ROWS):
        return
    texts = task.missing[task.kept : task.done]
    table = pa.concat_tables(task.parts[1:]).slice(task.kept, waiting)
    good = np.flatnonzero(~task.failed[texts])
    cache.append(task.tagger.fingerprint, task.keys[texts[good]], table.take(pa.array(good)))
    task.kept, task.kept_at = task.done, time.monotonic()


def _aligned(task: _Task) -> pa.Table:
    """The found and the made tags, each row's at its place."""
    if len(task.missing) == len(task.inverse) and (np.diff(task.inverse) == 1).all():
        return pa.concat_tables(task.parts)
    place = np.empty(len(task.first), dtype=np.int64)
    place[np.concatenate([np.flatnonzero(task.hit), task.missing])] = np.arange(len(task.first))
    return pa.concat_tables(task.parts).take(pa.array(place[task.inverse]))


def _stats(task: _Task) -> TagStats:
    cached = int(task.hit[task.inverse].sum())
    return TagStats(len(task.inverse) - cached, cached, int(task.failed[task.inverse].sum()))


def _log(stats: dict[str, TagStats]) -> None:
    told = ", ".join(f"{name} {one.computed} ({one.cached} more found)" for name, one in stats.items())
    logger.info("rows tagged now, and found as tagged before: %s", told)
    for name, one in stats.items():
        if one.failed:
            logger.warning("tagger %s failed on %d rows; they have no such tag", name, one.failed)
