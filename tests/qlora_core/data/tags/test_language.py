"""Languages are told where a text is long and clear, and left open elsewhere."""

from collections.abc import Callable

import pytest

from qlora_core.data.row import Row
from qlora_core.data.tags.language import LanguageTagger
from qlora_core.errors import ConfigError

GERMAN = "Der Hund lief gestern durch den alten Garten und suchte überall nach seinem verlorenen Ball."
ENGLISH = "Yesterday the dog ran through the old garden and looked everywhere for the ball that it had lost."


def test_long_clear_texts_get_their_language_and_the_others_are_undetermined(row: Callable[..., Row]) -> None:
    tagger = LanguageTagger(["en", "de", "fr"], 40, 0.8)
    made = tagger.tag([row("Frage", GERMAN), row("Hi", ENGLISH), row("Hi", "Yes."), row("1 + 1", "= 2 " * 40)])
    assert made.table.column("language").to_pylist() == ["de", "en", "und", "und"]
    confidences = made.table.column("language_confidence").to_pylist()
    assert min(confidences[:2]) > 0.8
    # Not measured is null, not 0.
    assert confidences[2:] == [None, None]
    assert not made.failed.any()


def test_uncertain_texts_are_undetermined_with_their_confidence(row: Callable[..., Row]) -> None:
    made = LanguageTagger(["en", "de", "fr"], 0, 1.0).tag([row("Hotel", "Restaurant Baguette Kindergarten")])
    assert made.table.to_pylist()[0]["language"] == "und"
    assert 0 < made.table.to_pylist()[0]["language_confidence"] < 1


def test_a_lone_expected_language_does_not_claim_foreign_texts(row: Callable[..., Row]) -> None:
    made = LanguageTagger(["en"], 40, 0.8).tag([row("Frage", GERMAN), row("Hi", ENGLISH)])
    assert made.table.column("language").to_pylist() == ["de", "en"]


def test_unknown_codes_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"data\.tags\.languages: 'xx' is no language.* en "):
        LanguageTagger(["en", "xx"], 40, 0.8)


def test_settings_change_the_fingerprint_and_their_order_does_not() -> None:
    one = LanguageTagger(["en", "de"], 40, 0.8)
    assert one.fingerprint == LanguageTagger(["de", "en"], 40, 0.8).fingerprint
    others = [LanguageTagger(["en", "fr"], 40, 0.8), LanguageTagger(["en", "de"], 41, 0.8)]
    assert one.fingerprint not in {other.fingerprint for other in others}


def test_no_rows_give_an_empty_table() -> None:
    made = LanguageTagger([], 40, 0.8).tag([])
    assert (made.table.num_rows, made.table.column_names) == (0, ["language", "language_confidence"])
