import importlib.util
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from qlora_core.errors import EvaluationError
from qlora_core.evaluation.schedule import Duel, next_pairs, play, standing
from qlora_core.evaluation.verdict import Verdict


def _benchmark() -> ModuleType:
    """The simulation is the benchmark's own, which is no part of the installed packages."""
    path = Path(__file__).resolve().parents[3] / "benchmarks" / "ratings_schedule.py"
    spec = importlib.util.spec_from_file_location("ratings_schedule", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _rows(outcomes: dict[tuple[str, str], str], prompts: int) -> list[Verdict]:
    """`outcomes[a, b]` cycles over prompts: one letter per prompt, a, b or t."""
    return [
        Verdict.model_validate(
            {
                "prompt_id": f"p{i}", "model_a": a, "model_b": b, "first": first, "judge": "j",
                "verdict": {"a": "a", "b": "b", "t": "tie"}[letters[i % len(letters)]],
            }
        )
        for (a, b), letters in outcomes.items()
        for i in range(prompts)
        for first in ("a", "b")
    ]  # fmt: skip


def test_standing_is_none_until_every_model_is_compared() -> None:
    rows = _rows({("x", "y"): "ab"}, 20)
    assert standing(rows, ["x", "y", "z"]) is None
    assert standing([], ["x", "y"]) is None
    apart = _rows({("x", "y"): "ab", ("v", "w"): "ab"}, 20)
    assert standing(apart, ["v", "w", "x", "y"]) is None  # two fields without a common scale


def test_standing_of_a_model_that_never_won_is_finite_and_settled_by_enough_prompts() -> None:
    now = standing(_rows({("x", "y"): "a"}, 40), ["x", "y"])
    assert now is not None
    assert (now.leader, now.settled) == ("x", True)
    assert 2 < now.behind["y"] < 20
    # The base that loses to all must not keep the others from being told apart
    rows = _rows({("x", "y"): "aabab", ("base", "x"): "b", ("base", "y"): "b"}, 40)
    now = standing(rows, ["base", "x", "y"])
    assert now is not None
    assert now.leader == "x"
    assert set(next_pairs(rows, ["base", "x", "y"], 5)) == {("x", "y")}


def test_next_pairs_go_to_the_leader_and_its_nearest_rival() -> None:
    rows = _rows({("x", "y"): "aabab", ("x", "z"): "aaaaaaaaab", ("y", "z"): "aaab"}, 40)
    now = standing(rows, ["x", "y", "z"])
    assert now is not None
    assert now.leader == "x"
    assert now.behind["y"] < now.behind["z"]
    assert set(next_pairs(rows, ["x", "y", "z"], 5)) == {("x", "y")}
    assert sorted(next_pairs([], ["x", "y", "z"], 3)) == [("x", "y"), ("x", "z"), ("y", "z")]
    with pytest.raises(EvaluationError, match="two models"):
        next_pairs([], ["x", "x"], 1)


def test_play_stops_when_prompts_run_out_and_meets_each_once() -> None:
    met: list[tuple[str, str, str]] = []

    def judge(duels: Sequence[Duel]) -> list[Verdict]:
        met.extend(duels)
        return [row for a, b, _ in duels for row in _rows({(a, b): "ab"}, 1)]

    played = play(["x", "y", "z"], [f"p{i}" for i in range(6)], judge)
    assert played.standing is None or not played.standing.settled
    assert played.ended == "no prompts left"
    assert len(met) == len(set(met)) <= 18
    assert played.calls == 2 * len(met)


def test_adaptive_choice_saves_two_fifths_of_the_calls_at_the_same_certainty() -> None:
    figures = _benchmark().measure(runs=12, prompts=400)
    assert figures["saved"] >= 0.4
    assert figures["adaptive"]["settled"] == figures["round_robin"]["settled"] == 1.0
    assert figures["adaptive"]["right"] >= figures["round_robin"]["right"] - 0.1
    assert figures["adaptive"]["right"] >= 0.9


def test_simulation_is_seeded() -> None:
    first, second = (_benchmark().simulate(3, adaptive=True, prompts=100) for _ in range(2))
    assert first.verdicts == second.verdicts
    assert np.isfinite(list(first.standing.behind.values())).all() if first.standing else True
