"""Worst slices: found where they were put, examples of the worst rows, requests with their arithmetic."""

import json
import math
from typing import Any

import numpy as np
import pytest

from qlora_core.evaluation.diagnosis import diagnose, diagnosis_lines

SETTINGS: dict[str, Any] = {"effect": 0.05, "confidence": 0.95, "resamples": 500, "seed": 0}


def world(weak: str = "math", *, regressed: str | None = None) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """60 rows of three categories; half a nat gained everywhere, `weak` stays high, `regressed` gets worse."""
    random = np.random.default_rng(0)
    categories = [("math", "prose", "code")[index % 3] for index in range(60)]
    tokens = random.integers(5, 20, 60)
    level = np.array([3.0 if one == weak else 1.0 for one in categories]) + random.normal(0, 0.05, 60)
    gain = np.array([-0.5 if one == regressed else 0.5 for one in categories])
    ids = [f"r{index}" for index in range(60)]
    items = {
        "rows": {
            "id": ids,
            "category": categories,
            "language": ["en"] * 60,
            "tokens": tokens.tolist(),
            "before": (level * tokens).tolist(),
            "after": ((level - gain) * tokens).tolist(),
        },
        "prompts": {
            "id": ids[:12],
            "category": categories[:12],
            "language": ["en"] * 12,
            "after": {
                "matches": [one != weak for one in categories[:12]],
                "degenerate": [False] * 12,
                "refusal": [None] * 12,
            },
        },
    }
    answers = [{"prompt_id": one, "question": f"q {one}", "reference": "right", "adapter": "wrong"} for one in ids[:12]]
    return items, answers


def test_weak_slice_is_named_with_the_rows_it_fails_on() -> None:
    items, answers = world()
    train = {"category": {"math": 10, "prose": 90, "code": 200}, "language": {"en": 300}}
    found = diagnose(items, answers, train, **SETTINGS)
    (worst,) = found["slices"]
    assert (worst["by"], worst["value"], worst["rows"], worst["regressed"]) == ("category", "math", 20, False)
    rows = items["rows"]
    mine = [index for index, one in enumerate(rows["category"]) if one == "math"]
    exact = math.fsum(rows["after"][i] for i in mine) / math.fsum(rows["tokens"][i] for i in mine)
    overall = math.fsum(rows["after"]) / math.fsum(rows["tokens"])
    assert worst["loss"] == pytest.approx(exact, abs=1e-12)
    assert worst["excess"] == pytest.approx(exact - overall, abs=1e-12)
    assert (worst["matched"], worst["degenerate"], worst["refused"]) == (0.0, 0.0, None)
    losses = {rows["id"][i]: rows["after"][i] / rows["tokens"][i] for i in mine}
    asked = [one for one in sorted(losses, key=lambda name: -losses[name]) if int(one[1:]) < 12]
    assert [example["id"] for example in worst["examples"]] == asked[:3]
    assert worst["examples"][0]["answer"] == "wrong"
    (request,) = found["requests"]
    assert (request["train_rows"], request["wanted_train_rows"]) == (10, 80)  # the middle one has 90
    assert request["like"] == sorted(losses, key=lambda name: -losses[name])[:3]
    json.dumps(found, allow_nan=False)


def test_regressed_slice_comes_first_though_its_loss_is_lower() -> None:
    items, answers = world(regressed="prose")
    found = diagnose(items, answers, {}, **SETTINGS)
    assert [one["value"] for one in found["slices"]] == ["prose", "math"]
    assert found["slices"][0]["regressed"] and found["requests"][0]["why"] == "it got worse"
    assert "it got worse" in diagnosis_lines(found)[0]


def test_rows_wanted_for_the_test_follow_from_the_scatter() -> None:
    items, answers = world()
    rows = items["rows"]
    noise = np.where(np.arange(60) // 3 % 2 == 0, 0.4, -0.4)
    rows["before"] = (np.array(rows["before"]) + noise * np.array(rows["tokens"])).tolist()
    (request,) = diagnose(items, answers, {}, **SETTINGS)["requests"]
    spread = np.std([0.5 + 0.4 * (-1) ** index for index in range(20)], ddof=1)
    assert request["wanted_test_rows"] == math.ceil((2.8 * spread / 0.05) ** 2) - 20


def test_slices_too_small_to_speak_of_are_left_out_and_even_data_ask_for_nothing() -> None:
    items, answers = world(weak="none of them")
    items["rows"]["after"] = items["rows"]["tokens"]
    found = diagnose(items, answers, {}, **SETTINGS)
    assert found["slices"] == found["requests"] == diagnosis_lines(found) == []
    items, answers = world()
    for label in ("category", "language"):
        items["rows"][label] = [None] * 56 + ["rare"] * 4
    assert diagnose(items, answers, {}, **SETTINGS)["slices"] == []
