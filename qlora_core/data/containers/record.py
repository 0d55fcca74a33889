"""What a file holds, before anyone asks which dataset format it is in: records, and records that cannot be read."""

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# A reason names a value at fault; one that is longer than this would be a row's text.
LONGEST_REASON = 400
# A value from a record may be quoted in a reason if it is no longer than this and a plain word.
LONGEST_QUOTE = 40
# What is looked through for secrets: more than is kept, for one may lie across the cut.
_LOOKED_THROUGH = 16 * LONGEST_REASON

_PLAIN_WORD = re.compile(rf"[\w.<>-]{{0,{LONGEST_QUOTE}}}|[^\w\s]")
# What repr writes for a text; an apostrophe within a word opens none.
_QUOTED = re.compile(r"""(?<!\w)(?:'((?:[^'\\]|\\.)*)'|"((?:[^"\\]|\\.)*)")""", re.DOTALL)


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


def quoted(value: object) -> str:
    """A record's value for a message: itself if it is a short plain word and no secret, else its length or type."""
    if not isinstance(value, str):
        return f"a value of type {type(value).__name__}"
    if _PLAIN_WORD.fullmatch(value) and _without_values(value) == value:
        return repr(value)
    return f"a text of {len(value)} characters"


def set_aside(file: str, line: int, reason: object) -> Quarantined:
    """A quarantine entry whose reason is storable whatever is in it.

    It is without surrogates and cut to `LONGEST_REASON`. A text quoted in it stays only as by `quoted`, and secrets and
    personal data that are left, which have no place in a ledger, are replaced by their types. What no pattern finds,
    such as a name of one word, stays.
    """
    text = str(reason).encode(errors="replace").decode()
    text = _QUOTED.sub(lambda found: _requoted(found[0], found[1] if found[1] is not None else found[2]), text)
    text = _without_values(text[:_LOOKED_THROUGH])
    return Quarantined(file, line, text if len(text) <= LONGEST_REASON else f"{text[:LONGEST_REASON]}…")


def _requoted(literal: str, value: str) -> str:
    made = quoted(value)
    return literal if made == repr(value) else made


@functools.lru_cache(maxsize=4096)
def _without_values(text: str) -> str:
    masked = _masking()
    # Again, until nothing is left: what touched a replaced value may have been taken for a part of it.
    while (made := masked(text)) != text:
        text = made
    return text


@functools.cache
def _masking() -> Callable[[str], str]:
    # The recogniser takes long to load, and most files have nothing to set aside.
    from qlora_core.data.tags.personal_data import Recogniser

    return Recogniser().masked


def too_long(max_row_bytes: int) -> str:
    """Why a record was not even parsed."""
    return f"too long: over {max_row_bytes / 2**20:g} MB; data.readers.max_row_mb allows no more"
