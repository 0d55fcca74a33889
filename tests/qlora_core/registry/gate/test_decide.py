"""Each branch of the gate, on figures chosen by hand; and that deciding needs no heavy library."""

import math
import subprocess
import sys
from typing import Any

import pytest

from qlora_core.config.gate import GateConfig
from qlora_core.registry.gate.decide import decide

EXACT = {"prompts": 50, "base": 0.2, "adapter": 0.6, "difference": 0.4, "low": 0.3, "high": 0.5}
JUDGE = {
    "kind": "openai",
    "model": "gpt-4.1",
    "certified": True,
    "win_rate": 0.7,
    "low": 0.6,
    "high": 0.8,
    "scored": 100,
    "unscored": 0,
}
REQUIRED = GateConfig(judge="require")


def evaluation(*, exact: Any = None, judge: Any = None, **heldout: Any) -> dict[str, Any]:
    figures = {"rows": 100, "base_loss": 2.0, "adapter_loss": 1.5, "gain": 0.5, "gain_low": 0.4, "gain_high": 0.6}
    return {"metrics": {"heldout": {**figures, **heldout}, "exact_match": exact, "judge": judge}}


def rival(gain: float, low: float, high: float, *, exact: Any = None) -> dict[str, Any]:
    heldout = {"gain": gain, "gain_low": low, "gain_high": high, "rows": 100}
    return {"version": "3", "heldout": heldout, "exact_match": exact}


def test_better_than_base_without_champion_promotes() -> None:
    decision = decide(evaluation(exact=EXACT), None, GateConfig())
    assert decision.verdict == "PROMOTE"
    assert "+0.5000 nats per token (interval +0.4000 to +0.6000, 100 rows)" in decision.reasons[0]
    assert "the base" in decision.reasons[0]


@pytest.mark.parametrize(
    ("low", "high", "verdict"), [(-0.1, 0.3, "HOLD"), (-0.3, -0.1, "REJECT"), (-0.3, 0.0, "REJECT"), (0.0, 0.2, "HOLD")]
)
def test_loss_interval_decides(low: float, high: float, verdict: str) -> None:
    gains = {"gain": (low + high) / 2, "gain_low": low, "gain_high": high}
    assert decide(evaluation(**gains), None, GateConfig()).verdict == verdict


def test_gain_below_required_minimum_holds() -> None:
    assert decide(evaluation(), None, GateConfig(min_loss_gain=0.45)).verdict == "HOLD"
    assert decide(evaluation(), None, GateConfig(min_loss_gain=0.39)).verdict == "PROMOTE"


@pytest.mark.parametrize(("low", "high"), [(0.4, 0.6), (-0.1, 0.6)])
def test_gain_shown_to_be_less_than_required_is_not_called_inconclusive(low: float, high: float) -> None:
    decision = decide(evaluation(gain=0.5, gain_low=low, gain_high=high), None, GateConfig(min_loss_gain=9))
    assert decision.verdict == "HOLD"
    assert decision.reasons[0].startswith("Less than is required: the held-out loss gain over the base is +0.5000")
    assert "all of it below the required 9" in decision.reasons[0]
    assert "score more items" not in decision.reasons[0]
    assert "could detect a true gain of" in decision.reasons[0]
    reached = decide(evaluation(), None, GateConfig(min_loss_gain=0.6))  # the interval's end is not below it
    assert reached.reasons[0].startswith("Inconclusive:") and "score more items" in reached.reasons[0]


def test_too_few_rows_hold_even_when_worse() -> None:
    worse = evaluation(rows=10, gain=-0.5, gain_low=-0.6, gain_high=-0.4)
    decision = decide(worse, None, GateConfig(min_rows=30))
    assert decision.verdict == "HOLD"
    assert "10 rows" in decision.reasons[0] and "30" in decision.reasons[0]


def test_exact_match_shown_to_fall_rejects_despite_better_loss() -> None:
    fallen = {**EXACT, "difference": -0.2, "low": -0.3, "high": -0.1}
    assert decide(evaluation(exact=fallen), None, GateConfig()).verdict == "REJECT"


def test_exact_match_fall_not_ruled_out_holds() -> None:
    unsure = {**EXACT, "difference": 0.0, "low": -0.1, "high": 0.1}
    assert decide(evaluation(exact=unsure), None, GateConfig()).verdict == "HOLD"
    assert decide(evaluation(exact=unsure), None, GateConfig(max_exact_match_loss=0.1)).verdict == "PROMOTE"


def test_champion_is_what_must_be_beaten() -> None:
    decision = decide(evaluation(), rival(-0.2, -0.3, -0.1), GateConfig())
    assert decision.verdict == "REJECT"
    assert "champion version 3" in decision.reasons[0]
    assert decide(evaluation(), rival(0.2, 0.1, 0.3), GateConfig()).verdict == "PROMOTE"
    assert decide(evaluation(), rival(0.0, -0.1, 0.1), GateConfig()).verdict == "HOLD"


def test_beating_champion_but_not_base_rejects() -> None:
    worse_than_base = evaluation(gain=-0.2, gain_low=-0.3, gain_high=-0.1)
    assert decide(worse_than_base, rival(0.2, 0.1, 0.3), GateConfig()).verdict == "REJECT"


def test_exact_match_against_champion_guards() -> None:
    fallen = {"difference": -0.2, "low": -0.3, "high": -0.1}
    assert decide(evaluation(exact=EXACT), rival(0.2, 0.1, 0.3, exact=fallen), GateConfig()).verdict == "REJECT"


def test_incomparable_champion_holds_with_its_reason() -> None:
    decision = decide(evaluation(), {"incomparable": "it was trained over another base"}, GateConfig())
    assert decision.verdict == "HOLD"
    assert "another base" in decision.reasons[0]


@pytest.mark.parametrize("key", ["gain", "gain_low", "gain_high", "rows", "base_loss", "adapter_loss"])
@pytest.mark.parametrize("value", [math.nan, math.inf, None, "0.5", True])
def test_unusable_figure_is_invalid_and_named(key: str, value: Any) -> None:
    decision = decide(evaluation(**{key: value}), None, GateConfig())
    assert decision.verdict == "INVALID"
    assert f"metrics.heldout.{key}" in decision.reasons[0]


@pytest.mark.parametrize("evidence", [{}, {"metrics": {}}, {"metrics": {"heldout": None}}, {"metrics": []}])
def test_missing_evidence_is_invalid(evidence: dict[str, Any]) -> None:
    assert decide(evidence, None, GateConfig()).verdict == "INVALID"


def test_champion_comparison_without_figures_is_invalid() -> None:
    assert decide(evaluation(), {"version": "3"}, GateConfig()).verdict == "INVALID"


def test_gain_outside_its_own_interval_is_invalid() -> None:
    assert decide(evaluation(gain=0.9), None, GateConfig()).verdict == "INVALID"


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({}, "PROMOTE"),
        ({"certified": False}, "HOLD"),
        ({"low": 0.4}, "HOLD"),
        ({"win_rate": 0.3, "low": 0.2, "high": 0.4}, "REJECT"),
        ({"unscored": 2}, "PROMOTE"),
        ({"unscored": 3}, "INVALID"),
        ({"scored": 0, "unscored": 0}, "INVALID"),
        ({"win_rate": math.nan}, "INVALID"),
    ],
)
def test_required_judge(change: dict[str, Any], verdict: str) -> None:
    assert decide(evaluation(judge={**JUDGE, **change}), None, REQUIRED).verdict == verdict


def test_required_judge_missing_is_invalid_and_ignored_judge_is_not_read() -> None:
    assert decide(evaluation(), None, REQUIRED).verdict == "INVALID"
    assert decide(evaluation(judge={**JUDGE, "low": math.nan}), None, GateConfig()).verdict == "PROMOTE"


def test_gate_imports_neither_mlflow_nor_torch() -> None:
    code = "import sys, qlora_core.registry.gate.decide; print([m for m in ('mlflow', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
