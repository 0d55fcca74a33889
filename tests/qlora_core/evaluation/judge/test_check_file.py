import json
from pathlib import Path
from typing import Any

import pytest

from qlora_core.errors import EvaluationError
from qlora_core.evaluation.answer_book import Prompt
from qlora_core.evaluation.judge.check_file import checks_for, read_check_rows
from qlora_core.evaluation.judge.checks import CheckJudge

PROMPTS = {
    "p1": Prompt("Say one.", "count", "one"),
    "p2": Prompt("Say two.", "count", "two"),
    "p3": Prompt("Say it in JSON.", "form", ""),
    "p4": Prompt("Anything.", None, None),
}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def regex(pattern: str, **selector: str) -> dict[str, Any]:
    return {"check": {"kind": "regex", "pattern": pattern}, **selector}


def test_the_narrowest_selector_wins(tmp_path: Path) -> None:
    rows = [
        regex("all"),
        regex("count", category="count"),
        regex("text", prompt="Say two."),
        regex("id", prompt_id="p2"),
    ]
    found = checks_for(read_check_rows(write(tmp_path / "c.jsonl", rows)), PROMPTS)
    assert {name: check.model_dump()["pattern"] for name, check in found.items()} == {
        "p1": "count", "p2": "id", "p3": "all", "p4": "all"
    }  # fmt: skip
    rows.pop()
    found = checks_for(read_check_rows(write(tmp_path / "c.jsonl", rows)), PROMPTS)
    assert found["p2"].model_dump()["pattern"] == "text"


def test_exact_match_takes_the_prompts_own_reference_and_leaves_prompts_without(tmp_path: Path) -> None:
    rows = read_check_rows(write(tmp_path / "c.jsonl", [{"check": {"kind": "exact_match"}}]))
    found = checks_for(rows, PROMPTS)
    assert sorted(found) == ["p1", "p2"]
    assert found["p1"].passes("One.")
    assert not found["p2"].passes("One.")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "has no checks"),
        ([regex("x", prompt_id="p1"), regex("y", prompt_id="p1")], "two rows are for prompt_id p1"),
        ([regex("x", prompt_id="p1", category="count")], "line 1: .*give at most one of prompt_id, prompt, category"),
        ([{"check": {"kind": "taste"}}], "line 1: .*'taste' is unknown"),
        ([{"check": {"kind": "regex"}}], "line 1: .*pattern: Field required"),
        ([{**regex("x"), "promt": "y"}], "line 1: promt: Extra inputs"),
    ],
)
def test_bad_files_say_what_is_wrong(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        read_check_rows(write(tmp_path / "c.jsonl", rows))


def test_fingerprint_follows_the_checks(tmp_path: Path) -> None:
    judges = [
        CheckJudge(checks_for(read_check_rows(write(tmp_path / "c.jsonl", [regex(pattern)])), PROMPTS))
        for pattern in ("x", "x", "y")
    ]
    first, same, other = (judge.fingerprint for judge in judges)
    assert first == same != other
