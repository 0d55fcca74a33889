"""From dataset files to canonical rows: recognise, read, set aside the unreadable. Decides nothing about good rows."""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from qlora_core.config.curation import ReadersConfig
from qlora_core.data.containers.record import Quarantined, Record, set_aside
from qlora_core.data.readers.format import Format
from qlora_core.data.readers.recognise import SAMPLE_RECORDS, known_formats, recognise
from qlora_core.data.records import read_records
from qlora_core.data.row import Row, RowError, make_row
from qlora_core.data.row_store import RowStore
from qlora_core.data.source_files import SourceFile
from qlora_core.errors import DataError
from qlora_core.progress import progress_bar

logger = logging.getLogger(__name__)

SHOWN_FAULTS = 5


@dataclass(frozen=True, slots=True)
class SourceReading:
    """What one file held. `rows_in` counts rows and quarantined records: it is the sum of both.

    `trimmed` counts the rows that lost the turns after their last answer. `rule` says how a nested record was read, and
    `rule_counts` what that came to.
    """

    name: str
    format: str
    rows: RowStore
    quarantined: list[Quarantined]
    rows_in: int
    trimmed: int
    rule: str | None
    rule_counts: Mapping[str, int]


def read_sources(files: Sequence[SourceFile], readers: ReadersConfig) -> list[SourceReading]:
    """Read every file, in order. Raises DataError for a file that cannot be read or whose format is not clear."""
    return [read_source(file, readers) for file in files]


def read_source(file: SourceFile, readers: ReadersConfig) -> SourceReading:
    """Read one file: every record becomes one row or more, or a quarantine entry.

    The file is read once and never held: memory grows by what the rows take in Arrow.
    """
    records = read_records(file, int(readers.max_row_mb * 2**20))
    head = _take_sample(records)
    sample = [record for record in head if isinstance(record, Record)]
    form = recognise(file.name, sample, known_formats(readers))
    rows = RowStore()
    quarantined: list[Quarantined] = []
    trimmed, counts = 0, Counter[str]()
    with progress_bar(f"Reading {file.name}", None) as advance:
        for outcome in _outcomes(form, file.name, chain(head, records), counts):
            if isinstance(outcome, Row):
                rows.append(outcome)
                trimmed += outcome.trimmed > 0
            else:
                quarantined.append(outcome)
            advance(1)
    rows_in = len(rows) + len(quarantined)
    quarantined.sort(key=lambda entry: (entry.line, entry.reason))
    reading = SourceReading(file.name, form.name, rows, quarantined, rows_in, trimmed, form.rule, dict(counts))
    _log(reading)
    return reading


def check_quarantine(readings: Sequence[SourceReading], max_share: float) -> None:
    """Raises DataError if more than `max_share` (0 to 1) of all that was read had to be set aside."""
    rows_in = sum(reading.rows_in for reading in readings)
    faults = [entry for reading in readings for entry in reading.quarantined]
    if rows_in and len(faults) / rows_in > max_share:
        shown = "\n".join(f"  {entry.file}, line {entry.line}: {entry.reason}" for entry in faults[:SHOWN_FAULTS])
        raise DataError(
            f"{len(faults)} of {rows_in} rows cannot be used, a share of {len(faults) / rows_in:.3f}; "
            f"data.max_quarantined_share allows {max_share}. The first:\n{shown}\n"
            "Mend these rows, or raise data.max_quarantined_share"
        )


def _take_sample(records: Iterator[Record | Quarantined]) -> list[Record | Quarantined]:
    """The beginning of a file up to its record number `SAMPLE_RECORDS`, and what is no record before that."""
    taken: list[Record | Quarantined] = []
    found = 0
    for record in records:
        taken.append(record)
        found += isinstance(record, Record)
        if found == SAMPLE_RECORDS:
            break
    return taken


def _outcomes(
    form: Format, source: str, records: Iterator[Record | Quarantined], counts: Counter[str]
) -> Iterator[Row | Quarantined]:
    for record in records:
        if isinstance(record, Quarantined):
            yield record
        elif not isinstance(record.value, Mapping):
            yield set_aside(source, record.line, "wrong type: the record is no object")
        else:
            parts = form.parts(record.value)
            counts.update(form.count(parts))
            yield from (_read_part(form, part, source, record.line) for part in parts)


def _read_part(form: Format, part: Mapping[str, object], source: str, line: int) -> Row | Quarantined:
    try:
        return make_row(form.read(part), source, line)
    except RowError as error:
        return set_aside(source, line, error)


def _log(reading: SourceReading) -> None:
    logger.info(
        "read %s as %s: %d rows in, %d usable, %d quarantined, %d with turns after the last answer trimmed%s",
        reading.name,
        reading.format,
        reading.rows_in,
        len(reading.rows),
        len(reading.quarantined),
        reading.trimmed,
        f" ({reading.rule}: {dict(reading.rule_counts)})" if reading.rule else "",
    )
