from typing import Any

import pytest

from qlora_core.report.answers import match_table, sample_answers


def row(category: str | None, base: bool | None, adapter: bool | None) -> dict[str, Any]:
    return {"category": category, "base_matches": base, "adapter_matches": adapter}


def test_match_table_gives_wilson_intervals() -> None:
    table = match_table([row("a", False, hit) for hit in [True] * 8 + [False] * 2], 0.95)
    # statsmodels 0.14: proportion_confint(8, 10, method="wilson") = (0.490162, 0.943318); (0, 10) = (0, 0.277533)
    assert table[0]["adapter"] == pytest.approx({"share": 0.8, "low": 0.490162, "high": 0.943318}, abs=1e-5)
    assert table[0]["base"] == pytest.approx({"share": 0.0, "low": 0.0, "high": 0.277533}, abs=1e-5)


def test_match_table_leaves_out_what_cannot_be_compared() -> None:
    table = match_table(
        [row("a", True, True), row("a", None, None), row("b", None, None), row(None, False, True)], 0.95
    )
    assert [(entry["category"], entry["prompts"]) for entry in table] == [("a", 1), ("no category", 1)]
    assert match_table([], 0.95) == []


def test_sample_answers_takes_categories_in_turn() -> None:
    rows = [row("a", True, True)] * 5 + [row("b", True, True)]
    assert [entry["category"] for entry in sample_answers(rows, 4)] == ["a", "b", "a", "a"]
    assert sample_answers([], 4) == []
