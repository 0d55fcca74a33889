from pathlib import Path

import pytest

from qlora_core.errors import EvaluationError
from qlora_core.evaluation.verdict import Verdict, read_verdicts, write_verdicts

GOOD = '{"prompt_id": "p1", "model_a": "x", "model_b": "y", "verdict": "a", "first": "b", "judge": "j"}'


def _read(folder: Path, *lines: str) -> list[Verdict]:
    path = folder / "verdicts.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return read_verdicts(path)


def test_read_verdicts_written_file_gives_the_same_rows(tmp_path: Path) -> None:
    rows = [
        Verdict(prompt_id="p\u2028", model_a="x", model_b="y", verdict="tie", first="a", judge="j"),
        Verdict(prompt_id="p2", model_a="x", model_b="y", verdict=None, first="b", judge="j", reason="timeout"),
    ]
    write_verdicts(tmp_path / "v.jsonl", rows)
    assert read_verdicts(tmp_path / "v.jsonl") == rows
    assert "reason" not in (tmp_path / "v.jsonl").read_text(encoding="utf-8").split("\n")[0]


def test_read_verdicts_row_of_other_origin_keeps_known_fields(tmp_path: Path) -> None:
    row = GOOD.replace('"p1"', "7").replace("}", ', "category": "math"}')
    assert _read(tmp_path, row, "")[0].prompt_id == "7"


def test_read_verdicts_null_without_reason_is_unscored_and_says_so(tmp_path: Path) -> None:
    row = _read(tmp_path, GOOD.replace('"verdict": "a"', '"verdict": null'))[0]
    assert (row.scored, row.reason) == (False, "unstated")
    with pytest.raises(ValueError, match="unscored"):
        _ = row.score_a


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", "Invalid JSON"),
        (GOOD.replace('"verdict": "a"', '"verdict": "A"'), "'a', 'b' or 'tie'.*got 'A'"),
        (GOOD.replace('"first": "b", ', ""), "first: Field required"),
        (GOOD.replace('"verdict": "a", ', ""), "verdict: Field required"),
        (GOOD.replace('"y"', '"x"'), "needs two models"),
        (GOOD.replace('"p1"', "true"), "prompt_id"),
    ],
)
def test_read_verdicts_bad_line_is_named_by_number(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(EvaluationError, match=rf"(?s)line 3: .*{message}"):
        _read(tmp_path, GOOD, "", line)


def test_read_verdicts_missing_file_says_what_to_name(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"absent\.jsonl: cannot be read"):
        read_verdicts(tmp_path / "absent.jsonl")
