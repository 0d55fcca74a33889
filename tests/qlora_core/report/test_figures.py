from typing import Any

from qlora_core.report.figures import curves_figure, funnel_figure, quantization_figure, smoothed, sweep_figure


def scored(number: int, loss: float | None, **params: Any) -> dict[str, Any]:
    return {"id": f"t{number}", "params": params, "loss": loss, "curve": [], "rungs": []}


def test_nothing_to_draw_gives_none() -> None:
    assert sweep_figure([scored(0, None, learning_rate=1e-3)], ["learning_rate"], None) is None
    assert sweep_figure([scored(0, 1.0)], [], "t0") is None
    assert curves_figure([scored(0, 1.0)]) is None
    assert quantization_figure([]) is None


def test_sweep_figure_takes_words_and_missing_values() -> None:
    trials = [scored(0, 1.0, schedule="cosine", lora_rank=8), scored(1, 2.0, schedule="linear")]
    assert "<svg" in (sweep_figure(trials, ["schedule", "lora_rank"], "t0") or "")


def test_funnel_of_nothing_is_drawn() -> None:
    assert "<svg" in funnel_figure([("read", 0), ("kept", 0)])


def test_curves_skip_losses_that_are_not_known() -> None:
    curve = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": None}, {"step": 3, "loss": 1.0}]
    trials = [{"id": "t0", "curve": curve, "rungs": [{"step": 3, "loss": 1.1}]}]
    assert "<svg" in (curves_figure(trials) or "")


def test_smoothed_keeps_short_curves_and_thins_long_ones() -> None:
    assert smoothed([(1, 3.0), (2, 2.0)]) == ([1, 2], [3.0, 2.0])
    steps, losses = smoothed([(step, 1.0) for step in range(1, 10_001)])
    assert len(steps) <= 200
    assert steps[-1] == 10_000
    assert set(losses) == {1.0}
    assert smoothed([]) == ([], [])
