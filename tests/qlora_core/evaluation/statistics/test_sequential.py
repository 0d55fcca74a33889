import math

import numpy as np
import pytest
from scipy import stats
from scipy.integrate import quad

from qlora_core.errors import EvaluationError
from qlora_core.evaluation.statistics.sequential import confidence_sequence, sign_test, win_share_sequence


def test_sign_test_equals_the_integral_it_stands_for() -> None:
    scores = [1, 1, 0, 0.5, 1, 0, 1, 1]
    found = sign_test(scores)
    for n in range(1, len(scores) + 1):
        wins, losses = scores[:n].count(1), scores[:n].count(0)
        ratio, _ = quad(lambda p, w=wins, k=losses: 2 * p**w * (1 - p) ** k, 0.5, 1)
        assert found.e_values[n - 1] == pytest.approx(ratio / 0.5 ** (wins + losses), rel=1e-9)
    assert found.p_values.tolist() == sorted(found.p_values.tolist(), reverse=True)


def test_sign_test_read_after_every_item_errs_at_most_nominally() -> None:
    rng = np.random.default_rng(0)
    streams = rng.integers(0, 2, (1000, 400)).astype(float)
    assert np.mean([(sign_test(stream).p_values <= 0.05).any() for stream in streams]) <= 0.05 + 0.015
    # Negative control: the fixed-sample test read every 25 items errs several times too often
    reads = np.arange(25, 401, 25)
    fixed = [
        any(stats.binomtest(int(s[:n].sum()), int(n), alternative="greater").pvalue <= 0.05 for n in reads)
        for s in streams[:300]
    ]
    assert np.mean(fixed) > 0.12


def test_sign_test_finds_a_better_system() -> None:
    rng = np.random.default_rng(1)
    found = [(sign_test((rng.random(400) < 0.65).astype(float)).p_values <= 0.05).any() for _ in range(100)]
    assert np.mean(found) > 0.95


def test_sign_test_ties_move_nothing_and_other_scores_are_refused() -> None:
    assert sign_test([0.5] * 5).e_values.tolist() == pytest.approx([1.0] * 5)
    assert sign_test([]).p_values.shape == (0,)
    with pytest.raises(EvaluationError, match=r"0, 0\.5 and 1"):
        sign_test([0.3])


def test_win_share_sequence_bounds_solve_the_mixture() -> None:
    low, high = win_share_sequence(30, 10, confidence=0.95)

    def evidence(p: float) -> float:
        ratio, _ = quad(lambda q: math.exp(30 * math.log(q / p) + 10 * math.log((1 - q) / (1 - p))), 1e-9, 1 - 1e-9)
        return ratio

    assert evidence(low) == pytest.approx(20, rel=1e-4)
    assert evidence(high) == pytest.approx(20, rel=1e-4)
    assert low < 0.75 < high
    assert win_share_sequence(0, 0, confidence=0.95) == (0.0, 1.0)
    assert win_share_sequence(10, 0, confidence=0.95)[1] == 1.0


def test_confidence_sequence_equals_a_plain_loop() -> None:
    x = np.random.default_rng(2).choice([0.0, 0.5, 1.0], 60)
    found = confidence_sequence(x, confidence=0.9)
    kept = set(range(1001))
    capital = {(g, side): 1.0 for g in range(1001) for side in (1, -1)}
    total, spread = 0.5, 0.25
    for t, value in enumerate(x.tolist(), start=1):
        bet = math.sqrt(2 * math.log(2 / 0.1) / (spread / t * t * math.log(1 + t)))
        for g in range(1001):
            m = g / 1000
            up = min(bet, 0.5 / m) if m else bet
            down = min(bet, 0.5 / (1 - m)) if m < 1 else bet
            capital[g, 1] *= 1 + up * (value - m)
            capital[g, -1] *= 1 - down * (value - m)
        kept &= {g for g in range(1001) if max(capital[g, 1], capital[g, -1]) / 2 < 10}
        low, high = max(0.0, min(kept) / 1000 - 0.001), min(1.0, max(kept) / 1000 + 0.001)
        assert found[t - 1].tolist() == pytest.approx([low, high], abs=2e-3 if t > 1 else 1e-9)
        total += value
        spread += (value - total / (t + 1)) ** 2


def test_confidence_sequence_covers_at_every_read() -> None:
    rng = np.random.default_rng(3)
    missed = 0
    for _ in range(150):
        bounds = confidence_sequence(rng.choice([0.0, 0.5, 1.0], 200, p=[0.3, 0.3, 0.4]), confidence=0.9)
        missed += bool(((bounds[:, 0] > 0.55) | (bounds[:, 1] < 0.55)).any())
    assert missed / 150 <= 0.1 + 0.05
    assert confidence_sequence(np.full(400, 0.5), confidence=0.95)[-1].tolist() == pytest.approx([0.5, 0.5], abs=0.05)


def test_confidence_sequence_refuses_unbounded_scores() -> None:
    with pytest.raises(EvaluationError, match=r"\(d \+ 1\) / 2"):
        confidence_sequence([-0.5], confidence=0.95)
