"""The dataset card: counted from curation.json alone, complete with every part on and honest with every part off."""

from typing import Any

import numpy as np
import pytest
import yaml

from qlora_core.data.card import make_card, summarise_lengths

CONFIG = {"split": {"salt": "qlora", "validation": 0.1, "test": 0.1}, "over_long": "drop"}


@pytest.fixture
def curation() -> dict[str, Any]:
    """What curation.json always holds."""
    return {
        "rows": {"in": 120, "kept": 100, "dropped": 17, "quarantined": 3},
        "splits": {"train": 80, "validation": 10, "test": 10},
        "by_source": {
            "a.jsonl": {"in": 120, "kept": 100, "dropped": 17, "quarantined": 3, "format": "messages", "trimmed": 4,
                        "rule": "best reply at each level", "reasons": {"duplicate": 17}},
        },
        "reasons": {"duplicate": 14, "over_long": 3},
        "quarantine_reasons": {"empty answer": 3},
        "tokens": {"total": 3000, "trained": 900},
        "digest": "d" * 64,
        "chat_template": {"origin": "file", "stop_token": "<|end|>", "bos_added": True},
        "max_tokens": 256,
        "samples": [],
    }  # fmt: skip


def test_card_with_every_part_off_says_so(curation: dict[str, Any]) -> None:
    card = make_card(curation, CONFIG)

    assert "Not looked at: languages, personal data and secrets, near-duplicates, overlap with evaluation sets" in card
    for sentence in (
        "Languages were not measured.",
        "Lengths were not summed up.",
        "Compared with no set",
        "No selection: all kept rows are there.",
        "Rows were not packed.",
        "Nothing was measured on the rows.",
        "No row says who wrote it.",
    ):
        assert sentence in card
    assert "None" not in card


def test_card_shows_every_figure_of_every_part(curation: dict[str, Any]) -> None:
    curation |= {
        "languages": {"en": 90, "und": 10},
        "licences": {"a.jsonl": {"CC BY-SA 3.0": 80, "not stated": 20}},
        "generators": {"human": 70, "some-model": 30},
        "lengths": summarise_lengths(np.arange(1, 101)),
        "reason_tokens": {"over_long": 4321},
        "personal_data": {"counts": {"EMAIL_ADDRESS": 41, "API_KEY": 2}, "rows": 39, "actions": {"secrets": "redact"}},
        "near_duplicates": {"action": "keep_one", "threshold": 0.8, "candidates": 512, "verified": 31, "dropped": 27,
                            "largest": [{"size": 12, "id": "e" * 64, "source": "a.jsonl", "members": []}]},
        "contamination": {"action": "drop", "hits": [], "sets": [
            {"name": "gsm8k", "items": 1319, "items_hit": 4, "rows_hit": 5, "rows_dropped": 2}]},
        "tags": {
            "refusal": {"missing": 0, "flagged": 6},
            "tox": {"missing": 1, "quantiles": {"p50": 0.25, "max": 1.0}},
        },
        "groups": {"groups": 88, "largest": 9},
        "packing": {"sequence_tokens": 256, "sequences": 15, "rows": 80, "fill": 0.98, "fill_unpacked": 0.12,
                    "trained_share": 0.3},
        "selection": {"budget_rows": 50, "tokens": 1500, "control_tokens": 1490},
    }  # fmt: skip

    card = make_card(curation, CONFIG)

    for part in (
        "| a.jsonl | messages | 120 | 100 | 17 | 3 | CC BY-SA 3.0 80, not stated 20 |",
        "a.jsonl: best reply at each level",
        "in 4 rows the turns after the last answer were trimmed",
        "human 70, some-model 30",
        "| dropped: over_long | 3 | 4321 |",
        "| quarantined: empty answer | 3 | - |",
        "| a.jsonl | duplicate | 17 |",
        "en 90, und 10",
        "| 1 | 10 | 25 | 50 | 75 | 90 | 99 | 100 | 50.5 |",
        "| EMAIL_ADDRESS | 41 |",
        "In 39 rows. Policy: secrets redact.",
        "512 pairs compared, 31 verified, 27 rows dropped.",
        f"| 12 | {'e' * 64} | a.jsonl |",
        "| gsm8k | 1319 | 4 | 5 | 2 |",
        "groups 88, largest 9",
        "3000 tokens, 900 of them trained. Window: 256 tokens; longer rows: drop.",
        "stop token `<|end|>`; its BOS was added",
        "budget_rows 50, tokens 1500, control_tokens 1490",
        "80 training rows in 15 sequences of 256 tokens, 98.0% full (12.0% with one row each)",
        "| refusal | flagged 6 | 0 |",
        "| tox | p50 0.25, max 1 | 1 |",
        "20 kept rows state none",
        "Not looked at: whether answers are true.",
    ):
        assert part in card


def test_head_is_yaml_that_names_splits_languages_and_licence(curation: dict[str, Any]) -> None:
    curation |= {"languages": {"en": 90, "und": 10}, "licences": {"a.jsonl": {"Apache 2.0": 100}}}

    _, head, _ = make_card(curation, CONFIG).split("---\n", 2)
    stated = yaml.safe_load(head)

    assert (stated["license"], stated["language"], stated["size_categories"]) == ("apache-2.0", ["en"], ["n<1K"])
    assert stated["configs"][0]["data_files"][0] == {"split": "train", "path": "train-*.parquet"}


@pytest.mark.parametrize(
    ("stated", "licence"),
    [({}, "unknown"), ({"a": {"not stated": 3}}, "unknown"), ({"a": {"MIT": 1, "not stated": 1}}, "other")],
)
def test_licence_of_the_whole_is_claimed_only_where_all_rows_state_one(
    curation: dict[str, Any], stated: dict[str, Any], licence: str
) -> None:
    curation["licences"] = stated

    assert f"license: {licence}\n" in make_card(curation, CONFIG)


def test_names_from_data_cannot_break_the_page(curation: dict[str, Any]) -> None:
    curation["by_source"] = {"a|b\n## Forged <b>`x`": curation["by_source"]["a.jsonl"]}

    card = make_card(curation, CONFIG)

    assert "| a\\|b ## Forged &lt;b>'x' | messages |" in card
    assert "\n## Forged" not in card


def test_lengths_agree_with_a_slow_count_and_cover_every_row() -> None:
    tokens = np.random.default_rng(0).integers(3, 900, 500)

    found = summarise_lengths(tokens)

    ordered = sorted(tokens.tolist())
    assert found["quantiles"]["p50"] == ordered[249]
    assert found["quantiles"]["p99"] == ordered[494]
    assert (found["quantiles"]["min"], found["quantiles"]["max"]) == (ordered[0], ordered[-1])
    for part in found["histogram"]:
        assert part["rows"] == sum(part["from"] <= length <= part["to"] for length in ordered)
    assert sum(part["rows"] for part in found["histogram"]) == 500


def test_lengths_of_nothing_and_of_equal_rows() -> None:
    assert summarise_lengths(np.array([], int)) == {"rows": 0, "mean": None, "quantiles": {}, "histogram": []}
    assert summarise_lengths(np.array([7, 7]))["histogram"] == [{"from": 7, "to": 7, "rows": 2}]
