"""Which characters a tokenizer loses: those that encoding and decoding do not bring back.

A tokenizer without byte fallback maps what it has never seen to nothing or to its unknown token; the model then
learns answers with holes. Blanks are left out of account, for decoders set their own. Knows nothing of masks.
"""

import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from qlora_core.data.row import Row
from qlora_core.data.row_store import RowView
from qlora_core.errors import MaskError

# Losing characters of more than this share of rows, a tokenizer is none for this data; on fewer, those rows go.
MAX_LOSSY_SHARE = 0.01
SHOWN_CHARACTERS = 12
BATCH_ROWS = 512
NEXT_STEP = (
    "Use a base model whose tokenizer knows every byte (byte-level BPE, or SentencePiece with byte_fallback), replace "
    "these characters in the data, or leave out the sources that hold them"
)


class Codec(Protocol):
    """A tokenizer, both ways, with special tokens neither added nor hidden."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text."""
        ...

    def decode(self, ids: Sequence[list[int]]) -> list[str]:
        """Text of each list of ids."""
        ...


def lost_characters(codec: Codec, text: str, decoded: str) -> str:
    """The characters of `text` that are missing in `decoded`, each once, by code point; empty where none is.

    A word that became the unknown token takes good letters along, so those that survive alone are not named unless
    all do.
    """
    missing = sorted(Counter(_visible(text)) - Counter(_visible(decoded)))
    return "".join(lossy_characters(codec, missing) or missing)


def lossy_characters(codec: Codec, characters: Iterable[str]) -> list[str]:
    """Those of the characters that do not survive encoding and decoding when they stand alone; blanks always do."""
    visible = [character for character in characters if not character.isspace()]
    decoded = codec.decode(codec.encode(visible))
    return [character for character, back in zip(visible, decoded, strict=True) if character not in back]


def name_characters(characters: Iterable[str]) -> str:
    """`'#' (U+0023), 'é' (U+00E9)`: the first SHOWN_CHARACTERS of them, and how many more there are."""
    named = [_name(character) for character in characters]
    more = len(named) - SHOWN_CHARACTERS
    return ", ".join(named[:SHOWN_CHARACTERS]) + (f" and {more} more" if more > 0 else "")


def check_text(codec: Codec, text: str, what: str) -> None:
    """Raises MaskError, naming the characters, if `text` loses any; `what` says whose text it is."""
    [decoded] = codec.decode(codec.encode([text]))
    lost = lost_characters(codec, text, decoded)
    if lost:
        raise MaskError(f"the base tokenizer loses characters of {what}: {name_characters(lost)}. {NEXT_STEP}")


def check_tokenizer(codec: Codec, rows: Sequence[Row], max_share: float = MAX_LOSSY_SHARE) -> None:
    """Raises MaskError if more than `max_share` (0 to 1) of the rows hold a character the tokenizer loses.

    A quick look before any row is tokenized: every distinct character is tried once. It names the characters and the
    rows that hold them. The proof of each row finds what a character alone does not show.
    """
    lossy = frozenset(lossy_characters(codec, _all_characters(rows)))
    if lossy:
        found = [hit for row in rows if (hit := lossy & _characters(row))]
        holders = Counter(character for hit in found for character in hit)
        check_lossy_share(len(found), len(rows), holders, max_share)


def check_lossy_share(
    rows_hit: int, rows_seen: int, characters: Mapping[str, int], max_share: float = MAX_LOSSY_SHARE
) -> None:
    """Raises MaskError if `rows_hit` is more than `max_share` of `rows_seen`; `characters` counts rows by character."""
    if rows_hit <= max_share * rows_seen:
        return
    ranked = sorted(characters.items(), key=lambda item: (-item[1], item[0]))
    named = ", ".join(f"{_name(character)} in {count} rows" for character, count in ranked[:SHOWN_CHARACTERS])
    more = f" and {len(ranked) - SHOWN_CHARACTERS} more characters" if len(ranked) > SHOWN_CHARACTERS else ""
    raise MaskError(
        f"the base tokenizer loses characters of {rows_hit} of {rows_seen} rows, a share of "
        f"{rows_hit / rows_seen:.3f}; {max_share:g} is allowed. Lost: {named or 'none by itself'}{more}. {NEXT_STEP}"
    )


def _all_characters(rows: Sequence[Row]) -> list[str]:
    """Every distinct character of the rows' turns, by code point; rows in Arrow are not made for it."""
    seen = np.zeros(sys.maxunicode + 1, bool)
    for texts in _contents(rows):
        seen[np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32)] = True
    return [chr(point) for point in np.flatnonzero(seen).tolist()]


def _contents(rows: Sequence[Row]) -> Iterator[Sequence[str]]:
    for start in range(0, len(rows), BATCH_ROWS):
        batch = rows[start : start + BATCH_ROWS]
        if isinstance(batch, RowView):
            yield batch.batch().column("contents").flatten().to_pylist()
        else:
            yield [message.content for row in batch for message in row.messages]


def _characters(row: Row) -> set[str]:
    return {character for message in row.messages for character in set(message.content)}


def _visible(text: str) -> str:
    return "".join(text.split())


def _name(character: str) -> str:
    # A combining mark or a control character alone shows nothing, or spoils the line; its name does not.
    hidden = unicodedata.category(character)[0] in "CMZ"
    shown = unicodedata.name(character, "a control character") if hidden else repr(character)
    return f"{shown} (U+{ord(character):04X})"
