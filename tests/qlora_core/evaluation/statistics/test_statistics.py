"""Each statistic against a published figure, an independent library, or a brute-force count."""

import json
import math
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from qlora_core.errors import EvaluationError
from qlora_core.evaluation.statistics.length_control import LengthRow, length_controlled_win_rate
from qlora_core.evaluation.statistics.paired import paired_difference
from qlora_core.evaluation.statistics.power import minimum_detectable_effect, prompts_needed
from qlora_core.evaluation.statistics.prediction_powered import prediction_powered_mean
from qlora_core.evaluation.statistics.rank_correlation import rank_correlation
from qlora_core.evaluation.statistics.relative_score import ScorePair, percent_of_reference

SETTINGS = {"confidence": 0.95, "resamples": 400, "seed": 0}


def test_minimum_detectable_effect_of_80_prompts_is_14_points() -> None:
    assert minimum_detectable_effect(0.45, 80) == pytest.approx(0.141, abs=5e-4)
    # Reference: statsmodels' one-sample z power, solved for the effect
    from statsmodels.stats.power import NormalIndPower

    solved = NormalIndPower(ddof=0).solve_power(nobs1=80, alpha=0.05, power=0.8, ratio=0, alternative="two-sided")
    assert minimum_detectable_effect(0.45, 80) == pytest.approx(0.45 * float(solved), abs=1e-4)


@pytest.mark.parametrize(("effect", "prompts"), [(0.05, 636), (0.03, 1766), (0.02, 3974)])
def test_prompts_needed_grow_with_the_square(effect: float, prompts: int) -> None:
    needed = prompts_needed(0.45, effect)
    assert needed == prompts
    assert minimum_detectable_effect(0.45, needed) <= effect < minimum_detectable_effect(0.45, needed - 1)


def test_minimum_detectable_effect_refuses_what_has_no_answer() -> None:
    with pytest.raises(EvaluationError, match="0 prompts"):
        minimum_detectable_effect(0.4, 0)
    with pytest.raises(EvaluationError, match="effect is 0"):
        prompts_needed(0.4, 0.0)


def test_paired_difference_equals_students_paired_t() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=40), rng.normal(0.3, 1, size=40)
    found = paired_difference(a - b, [f"p{i}" for i in range(40)], **SETTINGS)
    reference = stats.ttest_rel(a, b)
    low, high = reference.confidence_interval(0.95)
    assert found["p_value"] == pytest.approx(reference.pvalue, abs=1e-12)
    assert (found["t_low"], found["t_high"]) == pytest.approx((low, high), abs=1e-12)


def test_paired_difference_counts_prompts_not_comparisons() -> None:
    rng = np.random.default_rng(1)
    d = rng.normal(size=30)
    prompts = [f"p{i}" for i in range(30)]
    once = paired_difference(d, prompts, **SETTINGS)
    copied = paired_difference(np.repeat(d, 10), np.repeat(prompts, 10).tolist(), **SETTINGS)
    assert {**copied, "comparisons": 30} == pytest.approx(once, abs=1e-12)
    assert stats.sem(np.repeat(d, 10)) < 0.4 * once["standard_error"]  # negative control: copies counted


def test_paired_difference_without_spread_or_prompts() -> None:
    assert paired_difference([0.0, 0.0], ["p", "q"], **SETTINGS)["p_value"] is None
    with pytest.raises(EvaluationError, match="at least 2"):
        paired_difference([0.1, 0.2], ["p", "p"], **SETTINGS)
    with pytest.raises(EvaluationError, match="not finite"):
        paired_difference([0.1, math.nan], ["p", "q"], **SETTINGS)


def test_rank_correlation_gives_the_textbook_spearman() -> None:
    # Wikipedia, "Spearman's rank correlation coefficient": IQ against hours of television, rho = -29/165
    iq = [106, 86, 100, 101, 99, 103, 97, 113, 112, 110]
    hours = [7, 0, 27, 50, 28, 29, 20, 12, 6, 17]
    found = rank_correlation(iq, hours)
    assert found.spearman == pytest.approx(-29 / 165, abs=1e-12)
    assert found.spearman_p == pytest.approx(0.627188, abs=0.03)  # the page's t approximation


def test_rank_correlation_equals_brute_force_over_all_permutations() -> None:
    a, b = [1.0, 2.0, 2.0, 4.0, 5.0, 6.0], [2.0, 1.0, 3.0, 3.0, 6.0, 5.0]

    def tau_b(x: list[float], y: list[float]) -> float:
        pairs = [(x[i] - x[j], y[i] - y[j]) for i in range(6) for j in range(i)]
        both = sum(np.sign(dx) * np.sign(dy) for dx, dy in pairs)
        return float(both / math.sqrt(sum(dx != 0 for dx, _ in pairs) * sum(dy != 0 for _, dy in pairs)))

    found = rank_correlation(a, b)
    assert found.kendall_tau == pytest.approx(tau_b(a, b), abs=1e-12)
    as_far = [abs(tau_b(a, list(order))) >= abs(tau_b(a, b)) - 1e-12 for order in permutations(b)]
    assert found.kendall_p == pytest.approx(np.mean(as_far), abs=1e-12)
    with pytest.raises(EvaluationError, match="all scores of one side are equal"):
        rank_correlation(a, [1.0] * 6)


def test_percent_of_reference_is_a_ratio_of_sums_over_both_orders() -> None:
    pairs = [
        ScorePair("p1", 8, 9, "system"), ScorePair("p1", 6, 9, "reference"),
        ScorePair("p2", 7, 7, "system"), ScorePair("p2", 9, 10, "reference"),
        ScorePair("p3", 10, 1, "system"),
    ]  # fmt: skip
    found = percent_of_reference(pairs, **SETTINGS)
    assert found["percent"] == pytest.approx(100 * 30 / 35)
    assert (found["system_first"], found["reference_first"]) == pytest.approx((100 * 15 / 16, 100 * 15 / 19))
    assert (found["prompts"], found["incomplete"]) == (2, 1)
    assert found["low"] <= found["percent"] <= found["high"]
    with pytest.raises(EvaluationError, match="both orders"):
        percent_of_reference(pairs[-1:], **SETTINGS)


def _length_rows(count: int, theta: float, phi: float, seed: int, gamma: float = 0.0) -> list[LengthRow]:
    rng = np.random.default_rng(seed)
    delta = rng.normal(0.8, 1.0, count)
    squashed = np.tanh(np.repeat(delta, 2) / np.repeat(delta, 2).std())
    places = np.tile([0.5, -0.5], count)
    wins = rng.random(2 * count) < 1 / (1 + np.exp(-(theta + phi * squashed + gamma * places)))
    return [
        LengthRow(f"p{i // 2}", float(win), float(delta[i // 2]), 0.0, bool(places[i] > 0))
        for i, win in enumerate(wins)
    ]


def test_length_controlled_win_rate_equals_statsmodels_regression() -> None:
    import statsmodels.api as sm

    rows = _length_rows(200, 0.3, 0.8, seed=0, gamma=0.5)
    found = length_controlled_win_rate(rows, **SETTINGS)
    delta = np.array([row.length for row in rows])
    place = np.where([row.shown_first for row in rows], 0.5, -0.5)
    design = np.stack([np.ones(len(rows)), np.tanh(delta / delta.std()), place], axis=1)
    reference = sm.GLM([row.score for row in rows], design, family=sm.families.Binomial()).fit().params
    assert (found["length_effect"], found["order_effect"]) == pytest.approx(tuple(reference[1:]), abs=1e-6)
    expected = np.mean([1 / (1 + np.exp(-(reference[0] + side * reference[2] / 2))) for side in (1, -1)])
    assert found["win_rate"] == pytest.approx(expected, abs=1e-7)
    assert found["low"] < found["win_rate"] < found["high"]


def test_length_controlled_win_rate_undoes_a_bias_for_length() -> None:
    rows = _length_rows(4000, 0.0, 1.5, seed=1)  # equal systems; the judge likes length and ours writes more
    found = length_controlled_win_rate(rows, confidence=0.95, resamples=100, seed=0)
    assert found["raw_win_rate"] > 0.6
    assert found["win_rate"] == pytest.approx(0.5, abs=0.03)


def test_length_controlled_win_rate_won_always_is_finite_and_says_so() -> None:
    rows = [LengthRow(f"p{i}", 1.0, float(i), 3.0, True) for i in range(10)]
    found = length_controlled_win_rate(rows, confidence=0.95, resamples=100, seed=0)
    assert found["ridge"] is True
    assert found["order_effect"] is None
    assert 0.5 < found["win_rate"] < 1


def test_prediction_powered_mean_tunes_to_the_smallest_variance() -> None:
    rng = np.random.default_rng(3)
    truth = rng.random(1000)
    human = (truth + rng.normal(0, 0.3, 1000) > 0.5).astype(float)
    judge = (truth + rng.normal(0.1, 0.3, 1000) > 0.5).astype(float)
    labelled, rest = slice(0, 150), slice(150, None)
    tuned = prediction_powered_mean(human[labelled], judge[labelled], judge[rest], confidence=0.95)
    widths = {}
    for weight in np.linspace(0, 1, 101).tolist():
        at = prediction_powered_mean(human[labelled], judge[labelled], judge[rest], confidence=0.95, weight=weight)
        widths[weight] = at.high - at.low
    assert tuned.weight == pytest.approx(min(widths, key=lambda weight: widths[weight]), abs=0.06)
    assert tuned.high - tuned.low <= widths[0.0]
    alone = prediction_powered_mean(human[labelled], judge[labelled], judge[rest], confidence=0.95, weight=0.0)
    half = stats.norm.ppf(0.975) * stats.sem(human[labelled])
    assert (alone.low, alone.high) == pytest.approx((alone.human_value - half, alone.human_value + half), abs=1e-12)


def test_prediction_powered_mean_ignores_a_judge_of_noise() -> None:
    rng = np.random.default_rng(4)
    found = prediction_powered_mean(rng.random(200), rng.random(200), rng.random(2000), confidence=0.95)
    assert found.weight < 0.2
    assert found.value == pytest.approx(found.human_value, abs=0.02)


def test_prediction_powered_mean_weights_undo_uneven_sampling() -> None:
    rng = np.random.default_rng(5)
    hard = rng.random(20_000) < 0.5
    human = np.where(hard, 0.2, 0.8) + rng.normal(0, 0.1, 20_000)
    judge = human + rng.normal(0, 0.05, 20_000)
    chance = np.where(hard, 0.05, 0.01)
    drawn = rng.random(20_000) < chance
    settings = {"confidence": 0.95, "weight": 0.0}
    even = prediction_powered_mean(human[drawn], judge[drawn], judge[~drawn], **settings)
    weighted = prediction_powered_mean(
        human[drawn], judge[drawn], judge[~drawn], sampling_weights=1 / chance[drawn], **settings
    )
    assert abs(even.value - 0.5) > 0.1  # negative control
    assert weighted.low < 0.5 < weighted.high


@pytest.mark.integration
def test_prediction_powered_mean_on_pandalm_is_narrower_at_nominal_coverage(shared_data: Path) -> None:
    folder = shared_data / "human/pandalm"
    items = json.loads((folder / "testset-v1.json").read_text(encoding="utf-8"))
    recorded = json.loads((folder / "pandalm-7b-testset-v1.json").read_text(encoding="utf-8"))
    score = {0: 0.5, 1: 1.0, 2: 0.0}
    human = np.array([np.mean([score[item[f"annotator{i}"]] for i in (1, 2, 3)]) for item in items])
    judge = np.array([score[int(row["pandalm_result"])] for row in recorded])
    rng = np.random.default_rng(0)
    covered, narrower, judge_alone = [], [], []
    for _ in range(500):
        labelled = np.zeros(999, dtype=bool)
        labelled[rng.choice(999, 100, replace=False)] = True
        found = prediction_powered_mean(human[labelled], judge[labelled], judge[~labelled], confidence=0.95)
        covered.append(found.low <= human.mean() <= found.high)
        narrower.append((found.high - found.low) / (found.human_high - found.human_low))
        judge_alone.append(found.judge_value)
    # 500 draws: the standard error of a coverage of .95 is .01
    assert np.mean(covered) > 0.93
    assert 0.7 < np.mean(narrower) < 0.87  # about a fifth
    assert np.std(judge_alone) < 1e-12
