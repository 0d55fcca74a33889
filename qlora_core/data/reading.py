"""From dataset files to canonical rows: recognise, read, set aside the unreadable. Decides nothing about good rows."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qlora_core.data.readers import oasst
from qlora_core.data.readers.format import Format
from qlora_core.data.readers.recognise import recognise
from qlora_core.data.records import Quarantined, Record, read_records
from qlora_core.data.row import Row, RowError, make_row
from qlora_core.data.source_files import SourceFile
from qlora_core.errors import DataError
from qlora_core.progress import progress_bar

logger = logging.getLogger(__name__)

SHOWN_FAULTS = 5


@dataclass(frozen=True, slots=True)
class SourceReading:
    """What one file held. `rows_in` counts rows and quarantined records; `rule` says how a nested record was read."""

    name: str
    format: str
    rows: list[Row]
    quarantined: list[Quarantined]
    rows_in: int
    rule: str | None = None

    @property
    def trimmed(self) -> int:
        """How many rows lost the turns that followed their last answer."""
        return sum(row.trimmed > 0 for row in self.rows)


def read_sources(files: Sequence[SourceFile]) -> list[SourceReading]:
    """Read every file, in order. Raises DataError for a file that cannot be read or whose format is not clear."""
    return [read_source(file) for file in files]


def read_source(file: SourceFile) -> SourceReading:
    """Read one file: every record becomes one row or more, or a quarantine entry."""
    records, faults = read_records(file)
    form = recognise(file.name, records)
    rows: list[Row] = []
    quarantined = list(faults)
    rows_in = len(faults)
    with progress_bar(f"Reading {file.name}", len(records)) as advance:
        for record in records:
            outcomes = [_read_part(form, part, file.name, record.line) for part in _parts(form, record)]
            rows_in += len(outcomes)
            rows += [outcome for outcome in outcomes if isinstance(outcome, Row)]
            quarantined += [outcome for outcome in outcomes if isinstance(outcome, Quarantined)]
            advance(1)
    quarantined.sort(key=lambda entry: (entry.line, entry.reason))
    rule = oasst.PATH_RULE if form is oasst.FORMAT else None
    reading = SourceReading(file.name, form.name, rows, quarantined, rows_in, rule)
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


def _parts(form: Format, record: Record) -> Sequence[object]:
    return form.parts(record.value) if isinstance(record.value, Mapping) else [record.value]


def _read_part(form: Format, part: object, source: str, line: int) -> Row | Quarantined:
    try:
        if not isinstance(part, Mapping):
            raise RowError("wrong type: the record is no object")
        return make_row(form.read(part), source, line)
    except RowError as error:
        return Quarantined(source, line, str(error))


def _log(reading: SourceReading) -> None:
    logger.info(
        "read %s as %s: %d rows in, %d usable, %d quarantined, %d with turns after the last answer trimmed%s",
        reading.name,
        reading.format,
        reading.rows_in,
        len(reading.rows),
        len(reading.quarantined),
        reading.trimmed,
        f" ({reading.rule})" if reading.rule else "",
    )
