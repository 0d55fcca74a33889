import numpy as np
import pytest

from qlora_core.errors import EvaluationError
from qlora_core.evaluation.heldout import RowLoss, compare_losses
from qlora_core.evaluation.statistics.bootstrap import ratio_interval

SETTINGS = {"confidence": 0.95, "resamples": 400, "seed": 3}


def _rows(nats: list[float], tokens: list[int]) -> list[RowLoss]:
    return [RowLoss(f"r{i}", value, count) for i, (value, count) in enumerate(zip(nats, tokens, strict=True))]


def test_compare_losses_weights_rows_by_their_tokens() -> None:
    result = compare_losses(_rows([10.0, 40.0], [5, 10]), _rows([5.0, 30.0], [5, 10]), **SETTINGS)
    assert result["base_loss"] == pytest.approx(50 / 15, abs=1e-12)
    assert result["gain"] == pytest.approx(15 / 15, abs=1e-12)
    assert (result["rows"], result["tokens"]) == (2, 15)


def test_ratio_interval_equals_brute_force_over_the_same_draws() -> None:
    rng = np.random.default_rng(0)
    top, bottom = rng.normal(0.3, 1.0, 40), rng.integers(1, 30, 40).astype(float)
    result = ratio_interval(top, bottom, confidence=0.9, resamples=300, seed=11)
    draws = np.random.default_rng(11).integers(40, size=(300, 40))
    ratios = sorted(sum(top[i] for i in draw) / sum(bottom[i] for i in draw) for draw in draws)
    assert (result.low, result.high) == pytest.approx(tuple(np.quantile(np.array(ratios), [0.05, 0.95])), abs=1e-12)
    assert result.value == pytest.approx(top.sum() / bottom.sum(), abs=1e-12)


def test_ratio_interval_covers_the_truth_at_about_its_confidence() -> None:
    rng = np.random.default_rng(5)
    hits = 0
    for seed in range(200):
        tokens = rng.integers(5, 50, 80).astype(float)
        interval = ratio_interval(tokens * rng.normal(0.1, 0.3, 80), tokens, confidence=0.95, resamples=300, seed=seed)
        hits += interval.low <= 0.1 <= interval.high
    assert 0.88 <= hits / 200 <= 0.99  # three binomial standard errors around .94


def test_compare_losses_equal_models_give_an_interval_of_zero() -> None:
    rows = _rows([1.0, 2.0, 3.0], [1, 1, 1])
    result = compare_losses(rows, rows, **SETTINGS)
    assert (result["gain"], result["gain_low"], result["gain_high"]) == (0.0, 0.0, 0.0)


def test_compare_losses_row_without_trained_tokens_weighs_nothing() -> None:
    result = compare_losses(_rows([0.0, 4.0, 2.0], [0, 2, 2]), _rows([0.0, 2.0, 2.0], [0, 2, 2]), **SETTINGS)
    assert result["gain"] == pytest.approx(0.5, abs=1e-12)


@pytest.mark.parametrize(
    ("base", "adapter", "message"),
    [
        (_rows([1.0], [1]), _rows([1.0], [1]), "needs at least 2"),
        (_rows([1.0, 2.0], [1, 1]), _rows([1.0, 2.0], [1, 2]), "same rows"),
        (_rows([1.0, 2.0], [1, 1]), _rows([1.0, float("nan")], [1, 1]), "adapter's loss on row 'r1' is not finite"),
        (_rows([0.0, 0.0], [0, 0]), _rows([0.0, 0.0], [0, 0]), "sum to 0"),
    ],
)
def test_compare_losses_unusable_input_is_refused(base: list[RowLoss], adapter: list[RowLoss], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        compare_losses(base, adapter, **SETTINGS)
