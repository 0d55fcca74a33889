"""Decisions by tags alone: each rule, their order, and what is never dropped."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from qlora_core.config.curation import PolicyConfig, ScoreRange
from qlora_core.data.policy import check_score_names, decide
from qlora_core.data.row import Draft, Message, Row, make_row
from qlora_core.data.row_store import RowStore
from qlora_core.data.tags import language, licence, personal_data, text_marks
from qlora_core.data.tags.table import TagTable
from qlora_core.errors import ConfigError

CLEAN: dict[str, Any] = {
    "language": "en", "language_confidence": 0.9, "licence_id": "MIT", "licence_class": "permissive",
    "provider_terms": None, "personal_data": [], "secrets": [], "has_personal_data": False, "has_secrets": False,
    "injection": False, "truncated": False, "repeated_turns": False, "refusal": False, "placeholder": False,
    "mojibake": False, "repetition": 0.1, "answer_words": 10,
}  # fmt: skip
SCHEMA = pa.schema(
    [*licence.SCHEMA, *text_marks.SCHEMA, *language.SCHEMA, *personal_data.SCHEMA, pa.field("toxicity", pa.float64())]
)
FOUND = [{"type": "EMAIL", "count": 2}, {"type": "PHONE", "count": 1}]


def rows_of(count: int) -> list[Row]:
    turns = [(Message("user", f"Q{n}"), Message("assistant", "A", train=True)) for n in range(count)]
    return [make_row(Draft(pair), "s", place) for place, pair in enumerate(turns, start=1)]


def decided(policy: PolicyConfig, *lines: Mapping[str, Any]) -> tuple[list[int], list[tuple[int, str, float | None]]]:
    rows = rows_of(len(lines))
    table = pa.Table.from_pylist([{**CLEAN, "toxicity": 0.0, **line} for line in lines], schema=SCHEMA)
    kept, dropped = decide(rows, TagTable(table), policy)
    # Arrow-backed rows, and a table in several pieces, are judged alike.
    pieces = pa.concat_tables([table.slice(0, 1), table.slice(1)])
    again, dropped_again = decide(RowStore(rows), TagTable(pieces), policy)
    assert kept.dtype == np.int64 and again.tolist() == kept.tolist() and dropped_again == dropped
    assert [drop.id for drop in dropped] == [rows[drop.line - 1].id for drop in dropped]
    return kept.tolist(), [(drop.line - 1, drop.rule, drop.score) for drop in dropped]


def test_the_default_drops_injection_alone() -> None:
    lines = [{}, {"injection": True}, {"truncated": True, "has_secrets": True, "language": "und", "mojibake": True}]
    assert decided(PolicyConfig(), *lines) == ([0, 2], [(1, "injection", None)])


@pytest.mark.parametrize(
    ("setting", "tag", "rule"),
    [
        ("truncated", "truncated", "truncated"),
        ("repeated_turns", "repeated_turns", "repeated_turns"),
        ("refusals", "refusal", "refusal"),
        ("placeholders", "placeholder", "placeholder"),
        ("mojibake", "mojibake", "mojibake"),
    ],
)
def test_each_mark_drops_its_rows_and_never_those_without_a_tag(setting: str, tag: str, rule: str) -> None:
    policy = PolicyConfig.model_validate({setting: "drop"})
    assert decided(policy, {tag: True}, {tag: None}, {}) == ([1, 2], [(0, rule, None)])


def test_languages_keep_the_undetermined_unless_told_otherwise() -> None:
    lines = [{}, {"language": "de", "language_confidence": 0.95}, {"language": "und", "language_confidence": None}]
    lines += [{"language": None, "language_confidence": None}]
    assert decided(PolicyConfig(languages=["en"]), *lines) == ([0, 2, 3], [(1, "language", 0.95)])
    kept, dropped = decided(PolicyConfig(languages=["EN"], undetermined_language="drop"), *lines)
    assert (kept, [rule for _, rule, _ in dropped]) == ([0], ["language"] * 3)
    assert decided(PolicyConfig(undetermined_language="drop"), *lines)[0] == [0, 1]


def test_licences_by_preset() -> None:
    classes = ["permissive", "share_alike", "unknown", "non_commercial", "no_derivatives", "proprietary"]
    lines = [{"licence_class": kind} for kind in classes]
    kept = {
        name: decided(PolicyConfig(licence=name), *lines)[0]
        for name in ("any", "research", "share_alike", "commercial")
    }
    assert kept == {"any": [*range(6)], "research": [*range(5)], "share_alike": [0, 1, 2], "commercial": [0]}


def test_personal_data_and_secrets_are_two_settings_and_count_values() -> None:
    lines = [{"personal_data": FOUND, "has_personal_data": True}, {}, {"secrets": FOUND[:1], "has_secrets": True}]
    assert decided(PolicyConfig(personal_data="drop"), *lines) == ([1, 2], [(0, "personal_data", 3.0)])
    assert decided(PolicyConfig(secrets="drop"), *lines) == ([0, 1], [(2, "secret", 2.0)])
    assert decided(PolicyConfig(secrets="redact", personal_data="redact"), *lines)[0] == [0, 1, 2]


def test_score_ranges_include_their_ends_and_keep_rows_without_a_score() -> None:
    policy = PolicyConfig(scores={"toxicity": ScoreRange(max=0.5), "answer_words": ScoreRange(min=3, max=9)})
    lines = [
        {"toxicity": 0.5, "answer_words": 3},
        {"toxicity": 0.6, "answer_words": 2},
        {"toxicity": None, "answer_words": 10},
        {"toxicity": None, "answer_words": None},
        {"toxicity": 0.9, "answer_words": 5},
    ]
    # By tag name: answer_words comes before toxicity.
    assert decided(policy, *lines) == (
        [0, 3],
        [(1, "score:answer_words", 2.0), (2, "score:answer_words", 10.0), (4, "score:toxicity", 0.9)],
    )


def test_the_first_rule_in_the_fixed_order_counts() -> None:
    everything = {
        "language": "de", "licence_class": "proprietary", "has_personal_data": True, "personal_data": FOUND,
        "has_secrets": True, "secrets": FOUND, "injection": True, "truncated": True, "repeated_turns": True,
        "refusal": True, "placeholder": True, "mojibake": True, "toxicity": 1.0,
    }  # fmt: skip
    policy = PolicyConfig(
        languages=["en"], licence="commercial", personal_data="drop", secrets="drop", truncated="drop",
        repeated_turns="drop", refusals="drop", placeholders="drop", mojibake="drop",
        scores={"toxicity": ScoreRange(max=0.5)},
    )  # fmt: skip
    order = [
        ("language", ["language"]), ("licence", ["licence_class"]), ("personal_data", ["has_personal_data"]),
        ("secret", ["has_secrets"]), ("injection", ["injection"]), ("truncated", ["truncated"]),
        ("repeated_turns", ["repeated_turns"]), ("refusal", ["refusal"]), ("placeholder", ["placeholder"]),
        ("mojibake", ["mojibake"]), ("score:toxicity", ["toxicity"]),
    ]  # fmt: skip
    for rule, columns in order:
        assert decided(policy, everything)[1][0][1] == rule
        everything.update({column: {**CLEAN, "toxicity": 0.0}[column] for column in columns})
    assert decided(policy, everything) == ([0], [])


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"scores": {"toxic": {"max": 1}}}, r"no numeric tag 'toxic'; there are answer_words, .*toxicity"),
        ({"scores": {"ifd": {"max": 1}}}, r"no numeric tag 'ifd' \(data\.tags\.model_scores is off\)"),
        ({"scores": {"refusal": {"max": 1}}}, "no numeric tag 'refusal'"),
        ({"languages": ["english"]}, r"data\.policy\.languages: 'english' is no language"),
    ],
)
def test_rules_that_nothing_can_meet_are_refused(policy: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        decided(PolicyConfig.model_validate(policy), {})


def test_a_rule_without_its_tag_is_refused_with_the_switch() -> None:
    table = TagTable(pa.table({"injection": pa.array([False])}))
    with pytest.raises(ConfigError, match=r"needs the tag 'has_secrets'.*data\.tags\.personal_data to true"):
        decide(rows_of(1), table, PolicyConfig(secrets="drop"))
    check_score_names(PolicyConfig(scores={"tokens": ScoreRange(max=9)}), ["tokens"])


def test_no_rows() -> None:
    kept, dropped = decide([], TagTable(SCHEMA.empty_table()), PolicyConfig(personal_data="drop", languages=["en"]))
    assert (kept.tolist(), dropped) == ([], [])
