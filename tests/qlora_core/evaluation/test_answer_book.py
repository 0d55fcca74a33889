import json
from pathlib import Path
from typing import Any

import pytest

from qlora_core.errors import EvaluationError
from qlora_core.evaluation.answer_book import Prompt, read_answer_book


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def answer(prompt: str, text: str, **fields: Any) -> dict[str, Any]:
    return {"prompt_id": prompt, "question": f"question {prompt}", "answer": text, **fields}


def evaluation(folder: Path) -> Path:
    folder.mkdir()
    rows = [
        {"prompt_id": f"p{i}", "question": f"question p{i}", "category": "c", "reference": "r", "base": f"base {i}",
         "adapter": f"adapter {i}", "base_matches": None, "adapter_matches": None}
        for i in range(2)
    ]  # fmt: skip
    write(folder / "answers.jsonl", rows)
    return folder


def test_names_come_from_the_source_or_the_row_and_common_prompts_are_those_of_all(tmp_path: Path) -> None:
    old = write(tmp_path / "old.jsonl", [answer("p0", "o0"), answer("p1", "o1")])
    mixed = write(
        tmp_path / "more.jsonl", [answer("p1", "n1", model="new", category="code"), answer("p2", "n2", model="new")]
    )
    book = read_answer_book([f"old={old}", mixed])
    assert book.answers == {"old": {"p0": "o0", "p1": "o1"}, "new": {"p1": "n1", "p2": "n2"}}
    assert book.common == ["p1"]
    assert book.prompts["p1"] == Prompt("question p1", "code", None)
    assert read_answer_book([]).common == []


def test_an_evaluation_gives_base_adapter_and_other_candidates(tmp_path: Path) -> None:
    folder = evaluation(tmp_path / "evaluation")
    write(
        folder / "candidate_answers.jsonl",
        [{"prompt_id": f"p{i}", "trial": trial, "answer": f"{trial} {i}", "matches": None}
         for trial in ("t003", "t001") for i in range(2)],
    )  # fmt: skip
    book = read_answer_book([str(folder)])
    assert sorted(book.answers) == ["adapter", "base", "t001"]  # t003 comes first: it is the adapter
    assert book.answers["t001"]["p1"] == "t001 1"
    assert book.prompts["p0"] == Prompt("question p0", "c", "r")
    champion = read_answer_book([str(folder), f"champion={evaluation(tmp_path / 'earlier')}"])
    assert champion.answers["champion"] == {"p0": "adapter 0", "p1": "adapter 1"}


def test_pairs_of_a_vote_are_taken(tmp_path: Path) -> None:
    pair = {"prompt_id": "p", "prompt": "What?", "model_a": "x", "answer_a": "1", "model_b": "y", "answer_b": "2"}
    book = read_answer_book([write(tmp_path / "pairs.jsonl", [pair])])
    assert book.answers == {"x": {"p": "1"}, "y": {"p": "2"}}
    with pytest.raises(EvaluationError, match="leave out z="):
        read_answer_book([f"z={tmp_path / 'pairs.jsonl'}"])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([answer("p", "x")], "names no model; give NAME="),
        ([answer("p", "x", model="m"), answer("p", "y", model="m")], "two answers to prompt 'p'"),
        ([answer("p", "x", model="m"), {**answer("p", "y", model="n"), "question": "other"}], "'p' has two texts"),
        ([{"prompt_id": "p", "answer": "x", "model": "m"}], "line 1: question: Field required"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        read_answer_book([write(tmp_path / "a.jsonl", rows)])


def test_missing_and_foreign_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"gone\.jsonl cannot be read"):
        read_answer_book([f"x={tmp_path / 'gone.jsonl'}"])
    with pytest.raises(EvaluationError, match="no evaluation's answers"):
        read_answer_book([str(tmp_path)])
    with pytest.raises(EvaluationError, match="is no NAME=PATH"):
        read_answer_book(["=x.jsonl"])
