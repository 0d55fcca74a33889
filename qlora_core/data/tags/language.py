"""The language of a row by lingua, and how sure that is. Drops nothing.

Lists of species, brands or dishes look foreign to any such model, so a text is `und` (undetermined) unless it is long
and clear enough. The candidates matter most: the fewer are expected, the fewer mistakes, and the faster it is.
"""

import functools
import re
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import pyarrow as pa

from qlora_core.data.row import Row
from qlora_core.data.tags.tagger import Tagged, fingerprint_of, tagged
from qlora_core.errors import ConfigError

UNDETERMINED = "und"
SCHEMA = pa.schema([("language", pa.string()), ("language_confidence", pa.float64())])

_VERSION = 1
# More text costs more and changes next to nothing: on 2,996 English rows 91 mistakes instead of 89.
_TURN_CHARACTERS = 300
_ROW_CHARACTERS = 600
# lingua sums in the order of a hash table, which differs from run to run in the last digits.
_DIGITS = 4


class LanguageTagger:
    """Columns `language` (ISO 639-1, or `und`) and `language_confidence` (0 to 1).

    What is looked at is the first 300 characters of each turn, 600 in all. A text of fewer than `min_letters` letters
    is `und` without a confidence; one whose likeliest language is less likely than `min_confidence` is `und` with it.
    `languages` limits the candidates; with none or only one of them all are candidates, since a lone candidate fits
    nearly every text of its script.

    Raises ConfigError for a code that lingua does not know.
    """

    name = "language"
    cached = True
    schema = SCHEMA

    def __init__(self, languages: Sequence[str], min_letters: int, min_confidence: float) -> None:
        check_language_codes(languages, "data.tags.languages")
        codes = sorted({code.lower() for code in languages})
        self._codes = tuple(codes) if len(codes) > 1 else ()
        self._min_letters = min_letters
        self._min_confidence = min_confidence
        # Possessive, so that a text with too few letters is given up after one walk through it.
        self._enough = re.compile(rf"(?:[\W\d_]*+[^\W\d_]){{{min_letters}}}+")
        settings = [self._codes, min_letters, min_confidence, version("lingua-language-detector")]
        self.fingerprint = fingerprint_of(self.name, _VERSION, SCHEMA, settings)

    def tag(self, rows: Sequence[Row]) -> Tagged:
        """Language and confidence of each row."""
        samples = [_sample(row) for row in rows]
        long_enough = [place for place, sample in enumerate(samples) if self._enough.match(sample)]
        languages: list[str] = [UNDETERMINED] * len(samples)
        confidences: list[float | None] = [None] * len(samples)
        if long_enough:
            found = _detector(self._codes).compute_language_confidence_values_in_parallel(
                [samples[place] for place in long_enough]
            )
            for place, ranking in zip(long_enough, found, strict=True):
                confidence = round(ranking[0].value, _DIGITS)
                confidences[place] = confidence
                if confidence > 0 and confidence >= self._min_confidence:
                    languages[place] = _code(ranking[0].language)
        return tagged(SCHEMA, [languages, confidences])


def check_language_codes(codes: Sequence[str], setting: str) -> None:
    """Raises ConfigError for codes that are no ISO 639-1 codes of languages that can be told apart."""
    if not codes:
        return
    known = sorted(_code(language) for language in _all_languages())
    wrong = [code for code in codes if code.lower() not in known]
    if wrong:
        raise ConfigError(
            f"{setting}: {', '.join(map(repr, wrong))} is no language that can be recognised; use ISO 639-1 codes out "
            f"of {' '.join(known)}"
        )


def _sample(row: Row) -> str:
    return "\n".join(message.content[:_TURN_CHARACTERS] for message in row.messages)[:_ROW_CHARACTERS]


def _code(language: Any) -> str:
    return language.iso_code_639_1.name.lower()


def _all_languages() -> list[Any]:
    from lingua import Language

    return list(Language.all())


@functools.lru_cache(maxsize=2)
def _detector(codes: tuple[str, ...]) -> Any:
    """The models are loaded once a process. Low accuracy: on instruction data the high one is wrong nearly as often."""
    from lingua import LanguageDetectorBuilder

    chosen = [language for language in _all_languages() if not codes or _code(language) in codes]
    return LanguageDetectorBuilder.from_languages(*chosen).with_low_accuracy_mode().build()
