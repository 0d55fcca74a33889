"""What a file holds, before anyone asks which dataset format it is in: records, and records that cannot be read."""

from dataclasses import dataclass
from typing import Any

# A reason names a value at fault; one that is longer than this would be a row's text.
LONGEST_REASON = 400


@dataclass(frozen=True, slots=True)
class Record:
    """One parsed value and the line (from 1) on which it starts; in a Parquet file, its row's number."""

    line: int
    value: Any


@dataclass(frozen=True, slots=True)
class Quarantined:
    """A record set aside: its file's name, its line (from 1) and why. `reason` is `kind: detail`."""

    file: str
    line: int
    reason: str

    @property
    def kind(self) -> str:
        """The part of the reason before the first colon."""
        return self.reason.partition(":")[0]


def set_aside(file: str, line: int, reason: object) -> Quarantined:
    """A quarantine entry whose reason is storable whatever is in it: cut to `LONGEST_REASON`, without surrogates."""
    text = str(reason).encode(errors="replace").decode()
    return Quarantined(file, line, text if len(text) <= LONGEST_REASON else f"{text[:LONGEST_REASON]}…")


def too_long(max_row_bytes: int) -> str:
    """Why a record was not even parsed."""
    return f"too long: over {max_row_bytes / 2**20:g} MB; data.readers.max_row_mb allows no more"
