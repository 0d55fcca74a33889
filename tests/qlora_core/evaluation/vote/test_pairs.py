"""Files of pairs: what is read, named and refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_core.errors import EvaluationError
from qlora_core.evaluation.vote.pairs import named_answers, read_pairs


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_item_ids_are_prompt_ids_where_those_tell_pairs_apart(tmp_path: Path, make_rows: Callable) -> None:
    rows = make_rows(2)
    third = {**rows[0], "model_b": "third"}
    pairs = read_pairs(write(tmp_path / "p.jsonl", [*rows, third]))
    assert pairs[1].item_id == "p1"
    assert {pairs[0].item_id, pairs[2].item_id} == {"p0/wizard-beta/zephyr-alpha", "p0/third/wizard-beta"}


def test_answers_of_an_evaluation_are_pairs_of_adapter_and_base(tmp_path: Path) -> None:
    row = {"prompt_id": "p", "category": "c", "question": "Why?", "reference": "r", "base": "old", "adapter": "new"}
    write(tmp_path / "answers.jsonl", [row])
    for path in (tmp_path, tmp_path / "answers.jsonl"):
        (pair,) = read_pairs(path)
        assert (pair.model_a, pair.answer_a, pair.model_b, pair.answer_b) == ("adapter", "new", "base", "old")
        assert (pair.prompt, pair.category) == ("Why?", "c")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gold": "left"}, "line 2: gold"),
        ({"model_b": "zephyr-alpha", "model_a": "zephyr-alpha"}, "self-pairs are made by the page"),
        ({"prompt_id": "p0", "model_a": "wizard-beta", "model_b": "zephyr-alpha"}, "2 rows have the comparison"),
    ],
)
def test_bad_rows_are_refused_by_name(tmp_path: Path, make_rows: Callable, change: dict, message: str) -> None:
    first, second = make_rows(2)
    path = write(tmp_path / "p.jsonl", [first, {**second, **change}])
    with pytest.raises(EvaluationError, match=message):
        read_pairs(path)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="has no rows"):
        read_pairs(write(tmp_path / "p.jsonl", []))


def test_answers_that_name_a_model_are_counted(tmp_path: Path, make_rows: Callable) -> None:
    rows = make_rows(3)
    assert named_answers(read_pairs(write(tmp_path / "p.jsonl", rows))) == 0
    rows[1]["answer_b"] = "As Zephyr-Alpha, I think so."
    assert named_answers(read_pairs(write(tmp_path / "p.jsonl", rows))) == 1
