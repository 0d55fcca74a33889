from typing import Any

import numpy as np
import pytest

from qlora_core.evaluation.comparisons import comparisons_of
from qlora_core.evaluation.slices import ALL, MAX_SLICES, UNLABELLED, Unit, slice_table, win_rate_slices
from qlora_core.evaluation.statistics.power import minimum_detectable_effect
from qlora_core.evaluation.verdict import Verdict


def units(values: list[float], prefix: str = "p") -> dict[str, Unit]:
    return {f"{prefix}{i}": (value, 1.0) for i, value in enumerate(values)}


def verdicts(outcomes: dict[str, str], a: str = "x", b: str = "y") -> list[Verdict]:
    names = {"model_a": a, "model_b": b, "judge": "j"}
    return [
        Verdict.model_validate({"prompt_id": prompt, "verdict": {"t": "tie"}.get(v, v), "first": first, **names})
        for prompt, v in outcomes.items()
        for first in ("a", "b")
    ]


def test_win_rates_are_means_over_prompts_of_all_a_model_met() -> None:
    rows = verdicts({"p0": "a", "p1": "b", "p2": "a"}) + verdicts({"p0": "b"}, "x", "z")
    labels = {"p0": "maths", "p1": "maths", "p2": "code"}
    table = win_rate_slices(comparisons_of(rows), labels, ["x", "y", "z"])
    cells: dict[str, dict[str, Any]] = {
        name: dict(zip(table.columns, found, strict=True)) for name, found in table.rows
    }
    assert list(cells) == [ALL, "code", "maths"]
    # x on p0: a win over y and a loss to z, one half; on p1 0, on p2 1
    assert cells[ALL]["x"].value == pytest.approx((0.5 + 0 + 1) / 3)
    assert cells["maths"]["x"].value == pytest.approx(0.25)
    assert (cells["maths"]["z"].value, cells["maths"]["z"].size) == (1.0, 1)
    assert cells["code"]["z"] is None
    assert all(cell.underpowered for row in cells.values() for cell in row.values() if cell)


def test_detectable_is_the_textbook_figure_for_the_standard_deviation() -> None:
    values = [1.0, 0.0, 0.5, 1.0] * 20
    table = slice_table("win_rate", {"m": units(values)}, {}, least=30, margin=0.15)
    (_, (cell,)) = table.rows[0]
    assert cell is not None and cell.detectable is not None
    assert cell.detectable == pytest.approx(minimum_detectable_effect(float(np.std(values, ddof=1)), 80))
    assert (cell.low or 0.0) < cell.value < (cell.high or 0.0)


@pytest.mark.parametrize(
    ("values", "underpowered"),
    [
        ([1.0, 0.0] * 14, True),  # 28 are fewer than 30
        ([1.0] * 29, True),  # even where all agree
        ([1.0, 0.0] * 20, True),  # 40 with sd .5 show 22 points, not 15, and one half is in the interval
        ([1.0, 0.0] * 60, False),  # 120 show 13 points
        ([1.0] * 36 + [0.0] * 4, False),  # 40 that have decided need no more power
    ],
)
def test_underpowered_is_few_or_undecided_and_blind(values: list[float], underpowered: bool) -> None:
    table = slice_table("win_rate", {"m": units(values)}, {}, least=30, margin=0.15)
    cell = table.rows[0][1][0]
    assert cell is not None
    assert cell.underpowered is underpowered


def test_a_loss_is_weighed_by_tokens() -> None:
    table = slice_table("loss_gain", {"m": {"a": (2.0, 1.0), "b": (3.0, 9.0)}}, {}, least=2, margin=1.0)
    cell = table.rows[0][1][0]
    assert cell is not None
    assert cell.value == pytest.approx(0.5)


def test_slices_beyond_the_largest_are_one_and_unlabelled_units_have_their_own() -> None:
    labels: dict[str, str | None] = {f"p{i}": f"c{i // 2}" for i in range(2 * MAX_SLICES)}
    labels |= {"p900": "rare", "p901": "rarer"}
    scored = dict.fromkeys([*labels, "p902"], (1.0, 1.0))
    table = slice_table("win_rate", {"m": scored}, labels, least=30, margin=0.15)
    names = [name for name, _ in table.rows]
    assert len(names) == MAX_SLICES + 2
    assert names[0] == ALL
    assert names[-1] == "3 smaller ones"
    assert UNLABELLED not in names
    assert sum(found[0].size for _, found in table.rows[1:] if found[0]) == table.rows[0][1][0].size  # pyright: ignore[reportOptionalMemberAccess]
