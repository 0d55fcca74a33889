"""Values replaced by their types: all of them, nothing else, and once."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_core.config.curation import PolicyConfig
from qlora_core.data.redaction import Redactor
from qlora_core.data.row import Draft, Message, Row, make_row, row_id
from qlora_core.data.tags.text_marks import TextMarksTagger

KEY = "AKIA" + "Q3EGRT5WZ7KD2MLP"
MAIL = "jane.carter85@gmail.com"
PIECES = [KEY, MAIL, "text", "=", ": ", "\n", "password", "@", " ", "+1 650-253-0000"]
BOTH = PolicyConfig(secrets="redact", personal_data="redact")


def row_of(prompt: str, answer: str, **fields: Any) -> Row:
    return make_row(Draft((Message("user", prompt), Message("assistant", answer, train=True)), **fields), "s", 1)


def test_values_become_types_and_the_row_gets_the_id_of_its_text() -> None:
    redactor = Redactor(BOTH, [])
    row = row_of(f"Is {KEY} of {MAIL}?", f"No: {MAIL}.", rejected=f"{KEY}!", licence="MIT")
    made = redactor.redact(row)
    assert [message.content for message in made.messages] == ["Is <AWS_KEY> of <EMAIL>?", "No: <EMAIL>."]
    assert (made.rejected, made.licence, made.messages[1].train) == ("<AWS_KEY>!", "MIT", True)
    assert made.id == row_id(made.messages, made.tools, made.rejected) != row.id
    assert (redactor.counts, redactor.rows) == ({"EMAIL": 2, "AWS_KEY": 2}, 1)


@pytest.mark.parametrize(
    ("policy", "text"),
    [
        (PolicyConfig(), f"<AWS_KEY> {MAIL}"),
        (PolicyConfig(secrets="keep", personal_data="redact"), f"{KEY} <EMAIL>"),
        (PolicyConfig(secrets="drop", personal_data="keep"), f"{KEY} {MAIL}"),
    ],
)
def test_secrets_and_personal_data_are_two_settings(policy: PolicyConfig, text: str) -> None:
    assert Redactor(policy, []).redact(row_of(f"{KEY} {MAIL}", "Yes.")).opening == text


def test_clean_rows_are_the_very_same_objects_and_allowed_values_stay() -> None:
    redactor = Redactor(BOTH, [r".*@gmail\.com"])
    rows = [row_of("What is 0.621371?", "In 1990, 8.8.8.8."), row_of(MAIL, "Yes.", tools='[{"a":"b"}]')]
    assert all(redactor.redact(row) is row for row in rows)
    assert redactor.counts.total() == redactor.rows == 0


def test_tools_stay_json_and_the_id_follows_them() -> None:
    row = row_of("Hi", "Yes.", tools=json.dumps([{"name": "mail", "parameters": {"to": MAIL, "n": [1, None]}}]))
    made = Redactor(BOTH, []).redact(row)
    assert made.tools is not None
    assert json.loads(made.tools) == [{"name": "mail", "parameters": {"to": "<EMAIL>", "n": [1, None]}}]
    assert made.id == row_id(made.messages, made.tools) != row.id


def test_labels_group_keys_and_names_in_tools_are_cleaned() -> None:
    labels = dict.fromkeys(("category", "generator", "licence", "language"), f"by {MAIL}")
    tools = json.dumps([{"x": {MAIL: 1, f"z{MAIL}": 2, "plain": 3}}])
    row = row_of("Hi", "Yes.", **labels, group_keys=(MAIL, "z" + MAIL, "tree 1"), tools=tools)
    redactor = Redactor(BOTH, [])
    made = redactor.redact(row)
    assert [made.category, made.generator, made.licence, made.language] == ["by <EMAIL>"] * 4
    assert made.group_keys == ("<EMAIL>", "tree 1")
    assert json.loads(made.tools or "") == [{"x": {"<EMAIL>": 1, "<EMAIL> 2": 2, "plain": 3}}]
    assert (redactor.rows, redactor.counts) == (1, {"EMAIL": 8})
    labels_alone = Redactor(BOTH, []).redact(row_of("Hi", "Yes.", **labels))
    assert (labels_alone.category, labels_alone.id) == ("by <EMAIL>", row_of("Hi", "Yes.").id)
    assert Redactor(BOTH, []).redact(made) is made
    assert Redactor(PolicyConfig(), []).redact(row) is row


def test_rows_that_differ_in_a_key_alone_become_one() -> None:
    redactor = Redactor(PolicyConfig(), [])
    one, other = (redactor.redact(row_of(f"Use {key}", "Done.")) for key in (KEY, KEY.replace("Q3", "Z9")))
    assert one.id == other.id


@settings(deadline=None)
@given(st.lists(st.sampled_from(PIECES), min_size=1))
def test_redacting_twice_changes_nothing_more_and_leaves_no_value(parts: list[str]) -> None:
    row = row_of("Q" + "".join(parts), "Yes.")
    made = Redactor(BOTH, []).redact(row)
    assert Redactor(BOTH, []).redact(made) is made
    marks = TextMarksTagger().tag([made]).table.to_pylist()[0]
    assert (marks["placeholder"], marks["injection"]) == (False, False)
