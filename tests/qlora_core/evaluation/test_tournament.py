import json
import math
import random
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from scipy import stats
from scipy.optimize import minimize

from qlora_core.errors import EvaluationError
from qlora_core.evaluation.statistics import bradley_terry
from qlora_core.evaluation.statistics.elo import Matches, elo_ratings, match_order, order_streams
from qlora_core.evaluation.tournament import Method, rate
from qlora_core.evaluation.verdict import Verdict

# Agresti, Categorical Data Analysis: American League 1987, home wins-losses; hosts in rows, visitors in columns
TEAMS = ["Milwaukee", "Detroit", "Toronto", "New York", "Boston", "Cleveland", "Baltimore"]
BASEBALL = [
    "x 4-3 4-2 4-3 6-1 4-2 6-0",
    "3-3 x 4-2 4-3 6-0 6-1 4-3",
    "2-5 4-3 x 2-4 4-3 4-2 6-0",
    "3-3 5-1 2-5 x 4-3 4-2 6-1",
    "5-1 2-5 3-3 4-2 x 5-2 6-0",
    "2-5 3-3 3-4 4-3 4-2 x 2-4",
    "2-5 1-5 1-6 2-4 1-6 3-4 x",
]
# Davidson 1970, six brands of pudding: pair, wins of the one, of the other, ties
PUDDINGS = (
    "12: 19 22 16; 13: 16 19 12; 23: 19 19 10; 14: 18 23 13; 24: 23 19 9; 34: 19 20 15; 15: 13 19 18; 25: 16 20 12; "
    "35: 16 15 17; 45: 17 14 16; 16: 18 21 12; 26: 22 20 12; 36: 13 18 10; 46: 14 19 18; 56: 11 21 12"
)


def _verdict(prompt: str, a: str, b: str, verdict: str | None, first: str = "a") -> Verdict:
    row = {"prompt_id": prompt, "model_a": a, "model_b": b, "verdict": verdict, "first": first, "judge": "j"}
    return Verdict.model_validate(row)


def _baseball() -> list[Verdict]:
    rows = []
    for host, line in zip(TEAMS, BASEBALL, strict=True):
        for visitor, cell in zip(TEAMS, line.split(), strict=True):
            if cell != "x":
                wins, losses = map(int, cell.split("-"))
                for game, verdict in enumerate(["a"] * wins + ["b"] * losses):
                    rows.append(_verdict(f"{host} {visitor} {game}", host, visitor, verdict))
    return rows


def _simulated(models: int, prompts: int, seed: int) -> list[Verdict]:
    rng = np.random.default_rng(seed)
    return [
        _verdict(f"p{p}", f"m{i}", f"m{j}", str(rng.choice(["a", "b", "tie"], p=[0.55, 0.3, 0.15])), first)
        for p in range(prompts)
        for i in range(models)
        for j in range(i)
        for first in ("a", "b")
    ]


def test_rate_bradley_terry_gives_agrestis_home_advantage_and_abilities() -> None:
    result = rate(_baseball(), "bradley-terry", resamples=20)
    assert result["order_effect"] == pytest.approx(0.302, abs=5e-4)
    logits = [(result["ratings"][team] - 1000) / 173.7178 for team in TEAMS]
    worths = sorted(math.exp(x) / sum(math.exp(y) for y in logits) for x in logits)
    assert worths == pytest.approx([0.044, 0.088, 0.137, 0.157, 0.164, 0.190, 0.220], abs=6e-4)
    assert (result["matches"], result["unscored"], result["ridge"]) == (len(_baseball()), 0, False)


def test_fit_without_order_effect_gives_agrestis_abilities() -> None:
    cells = [
        (i, j, *map(int, cell.split("-")), 0)
        for i, line in enumerate(BASEBALL)
        for j, cell in enumerate(line.split())
        if cell != "x"
    ]
    table = np.array(cells)
    design = bradley_terry.make_design(table[:, 0], table[:, 1], 7, order=False, ties=False)
    fitted = bradley_terry.fit(design, table[None, :, 2:].astype(float))
    abilities = fitted.abilities[0] - fitted.abilities[0, -1]
    assert abilities[:6] == pytest.approx([1.58, 1.44, 1.29, 1.25, 1.11, 0.68], abs=6e-3)


def test_fit_with_ties_gives_davidsons_pudding_worths() -> None:
    rows = [part.split(":") for part in PUDDINGS.split("; ")]
    first = np.array([int(pair[0]) - 1 for pair, _ in rows])
    second = np.array([int(pair[1]) - 1 for pair, _ in rows])
    counts = np.array([[[float(n) for n in numbers.split()] for _, numbers in rows]])
    fitted = bradley_terry.fit(bradley_terry.make_design(first, second, 6, order=False, ties=True), counts)
    worths = np.exp(fitted.abilities[0]) / np.exp(fitted.abilities[0]).sum()
    assert worths == pytest.approx([0.1388, 0.1730, 0.1617, 0.1654, 0.1587, 0.2024], abs=2e-4)
    assert math.exp(fitted.log_tie[0]) == pytest.approx(0.7468, abs=1e-3)
    assert fitted.log_likelihood[0] == pytest.approx(-809.710, abs=1e-3)


def test_covariance_gives_agrestis_errors_and_statsmodels_clusters() -> None:
    import statsmodels.api as sm

    rows = [row.model_copy(update={"prompt_id": row.model_a}) for row in _baseball()]  # clustered by host
    index = {team: i for i, team in enumerate(TEAMS)}
    first = np.array([index[row.model_a] for row in rows])
    second = np.array([index[row.model_b] for row in rows])
    won = np.array([row.verdict == "a" for row in rows], dtype=float)
    counts = np.zeros((7, len(rows), 3))
    counts[first, np.arange(len(rows)), np.where(won, 0, 1)] = 1.0
    design = bradley_terry.make_design(first, second, 7, order=False, ties=False)
    fitted = bradley_terry.fit(design, counts.sum(axis=0, keepdims=True))
    found = bradley_terry.covariance(design, counts, fitted)
    against_baltimore = np.eye(7)[:6] - np.eye(7)[6]
    errors = np.sqrt(np.diag(against_baltimore @ found.curvature @ against_baltimore.T))
    assert errors == pytest.approx([0.343, 0.339, 0.337, 0.336, 0.335, 0.333], abs=8e-3)
    # The same model as a logistic regression on differences, Baltimore left out
    contrasts = np.zeros((len(rows), 7))
    contrasts[np.arange(len(rows)), first] += 1
    contrasts[np.arange(len(rows)), second] -= 1
    logit = sm.GLM(won, contrasts[:, :6], family=sm.families.Binomial())
    clustered = logit.fit(cov_type="cluster", cov_kwds={"groups": first, "use_correction": False})
    reference = np.asarray(clustered.cov_params()) * 7 / 6
    assert against_baltimore @ found.sandwich @ against_baltimore.T == pytest.approx(reference, abs=1e-6)


def test_rate_sandwich_errors_agree_with_the_bootstrap() -> None:
    result = rate(_simulated(4, 150, seed=5), resamples=600)
    for name, (low, high) in result["intervals"].items():
        assert (high - low) / 3.92 == pytest.approx(result["standard_errors"][name], rel=0.15)
    assert sum(result["best_share"].values()) == pytest.approx(1.0)
    assert all(1 <= low <= high <= 4 for low, high in result["rank_intervals"].values())


def test_elo_ratings_do_not_depend_on_threads_and_refuse_other_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    matches = Matches(np.array([0, 1, 2]), np.array([1, 2, 0]), np.array([1.0, 0.5, 0.0]))
    settings = {"orders": 200, "seed": 1, "confidence": 0.95}
    many = elo_ratings(matches, 3, **settings)
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    assert elo_ratings(matches, 3, **settings).mean.tolist() == many.mean.tolist()
    with pytest.raises(EvaluationError, match=r"\[0, 1\]"):
        elo_ratings(matches._replace(score=np.array([2.0, 0, 0])), 3, **settings)
    with pytest.raises(EvaluationError, match="0 match orders"):
        elo_ratings(matches, 3, orders=0, seed=1, confidence=0.95)


def test_match_order_is_a_fair_permutation() -> None:
    orders = np.array([match_order(4, stream) for stream in order_streams(24_000, 0)])
    assert (np.sort(orders, axis=1) == np.arange(4)).all()
    codes = orders @ np.array([64, 16, 4, 1])
    _, counts = np.unique(codes, return_counts=True)
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > 1e-3


def test_fit_equals_scipy_on_ties_with_an_order_effect() -> None:
    rng = np.random.default_rng(1)
    first, second = np.array([0, 1, 0, 2, 1, 2]), np.array([1, 0, 2, 0, 2, 1])
    counts = rng.integers(1, 30, (6, 3)).astype(float)
    fitted = bradley_terry.fit(bradley_terry.make_design(first, second, 3, order=True, ties=True), counts[None])

    def negative_log_likelihood(x: np.ndarray) -> float:
        worth, g, v = np.exp([x[0], x[1], 0.0]), math.exp(x[2]), math.exp(x[3])
        total = 0.0
        for (a, b, tie), i, j in zip(counts, first, second, strict=True):
            odds = np.array([g * worth[i], worth[j], v * math.sqrt(g * worth[i] * worth[j])])
            total -= float(np.array([a, b, tie]) @ np.log(odds / odds.sum()))
        return total

    reference = minimize(negative_log_likelihood, np.zeros(4), method="BFGS", options={"gtol": 1e-8})
    abilities = fitted.abilities[0] - fitted.abilities[0, 2]
    found = [abilities[0], abilities[1], fitted.log_order[0], fitted.log_tie[0]]
    assert found == pytest.approx(list(reference.x), abs=1e-5)
    assert -fitted.log_likelihood[0] == pytest.approx(reference.fun, abs=1e-8)


def test_elo_ratings_equal_a_plain_loop_over_the_same_orders() -> None:
    a, b = np.array([0, 1, 2, 0, 1]), np.array([1, 2, 0, 2, 0])
    score = np.array([1.0, 0.5, 0.0, 1.0, 0.0])
    result = elo_ratings(Matches(a, b, score), 3, orders=50, seed=4, confidence=0.95)
    turns = np.array([match_order(5, stream) for stream in order_streams(50, 4)]).T
    finals = []
    for order in turns.T:
        ratings = [1000.0] * 3
        for match in order:
            i, j = a[match], b[match]
            move = float(32 * (score[match] - 1 / (1 + 10 ** ((ratings[j] - ratings[i]) / 400))))
            ratings[i] += move
            ratings[j] -= move
        finals.append(ratings)
    assert result.mean == pytest.approx(np.array(finals).mean(axis=0), abs=1e-9)
    assert result.low == pytest.approx(np.quantile(np.array(finals), 0.025, axis=0), abs=1e-9)


def test_rate_elo_one_win_moves_by_half_of_k() -> None:
    result = rate([_verdict("p", "x", "y", "a")], "elo", orders=10)
    assert result["ratings"] == {"x": 1016.0, "y": 984.0}


@pytest.mark.parametrize("method", ["elo", "bradley-terry"])
def test_rate_does_not_depend_on_row_order_or_names_of_sides(method: Method) -> None:
    rows = _simulated(3, 12, seed=2)
    shuffled = random.Random(0).sample(rows, len(rows))
    settings = {"orders": 200, "resamples": 50}
    assert rate(rows, method, **settings) == rate(shuffled, method, **settings)
    flip = {"a": "b", "b": "a", "tie": "tie"}
    flipped = [_verdict(r.prompt_id, r.model_b, r.model_a, flip[r.verdict or "tie"], flip[r.first]) for r in rows]
    first, second = (rate(each, method, **settings) for each in (rows, flipped))
    assert second["ratings"] == pytest.approx(first["ratings"], abs=1e-6 if method == "bradley-terry" else 15)
    assert second["order_effect"] == pytest.approx(first["order_effect"], abs=1e-9)


def test_rate_resamples_prompts_not_matches() -> None:
    rng = np.random.default_rng(0)
    once = [_verdict(f"p{p}", "x", "y", str(rng.choice(["a", "b"])), first) for p in range(40) for first in ("a", "b")]
    # Ten copies of each row are no new prompts: the interval must not shrink
    copies = [row for row in once for _ in range(10)]
    one, ten = (rate(rows, resamples=400)["intervals"]["x"] for rows in (once, copies))
    assert ten[1] - ten[0] == pytest.approx(one[1] - one[0], rel=0.02)


def test_rate_counts_unscored_rows_and_never_rates_them() -> None:
    rows = _simulated(2, 10, seed=1)
    unscored = [_verdict(f"q{i}", "m1", "m0", None) for i in range(50)]
    result = rate(rows + unscored, resamples=20)
    assert (result["matches"], result["unscored"]) == (len(rows), 50)
    assert result["ratings"] == rate(rows, resamples=20)["ratings"]


def test_rate_model_that_never_lost_is_finite_and_reported() -> None:
    result = rate([_verdict(f"p{i}", "x", "y", "a", first) for i in range(10) for first in ("a", "b")], resamples=20)
    assert result["ridge"] is True
    assert "strongly connected" in result["warnings"][0]
    assert 1000 < result["ratings"]["x"] < 3000


def test_rate_order_that_decides_all_is_reported_not_infinite() -> None:
    rows = [_verdict(f"p{i}", "x", "y", first, first) for i in range(10) for first in ("a", "b")]
    result = rate(rows, resamples=20)
    assert result["order_effect"] > 3
    assert result["ratings"]["x"] == pytest.approx(1000, abs=1e-6)
    assert "no finite maximum" in result["warnings"][0]


def test_rate_order_and_rating_that_decide_every_match_are_reported_not_infinite() -> None:
    # The win graph is strongly connected, yet shown first wins always
    rows = [_verdict("p1", "x", "y", "a", "a"), _verdict("p1", "x", "y", "b", "b"), _verdict("p2", "x", "y", "a", "a")]
    result = rate(rows, resamples=20)
    assert result["ridge"] is True
    assert abs(result["order_effect"]) < 6


def test_rate_one_fixed_order_has_no_order_effect() -> None:
    rows = [_verdict(f"p{i}", "x", "y", "a" if i % 3 else "b") for i in range(12)]
    result = rate(rows, resamples=20)
    assert result["order_effect"] is None
    assert (result["ratings"]["x"] - result["ratings"]["y"]) / 173.7178 == pytest.approx(math.log(8 / 4), abs=1e-6)


def test_rate_all_ties_gives_equal_ratings() -> None:
    result = rate([_verdict(f"p{i}", "x", "y", "tie", f) for i in range(5) for f in ("a", "b")], resamples=20)
    assert result["ratings"]["x"] == pytest.approx(1000, abs=1e-6)


def test_rate_nothing_scored_is_an_error_with_the_count() -> None:
    with pytest.raises(EvaluationError, match="none of the 1 verdicts"):
        rate([_verdict("p", "x", "y", None)])


def test_rate_unknown_method_names_the_known_ones() -> None:
    with pytest.raises(EvaluationError, match=r"glicko.*elo, bradley-terry"):
        rate(_simulated(2, 2, seed=0), cast(Method, "glicko"))


@pytest.mark.integration
def test_rate_pandalm_votes_of_five_models(shared_data: Path) -> None:
    items = json.loads((shared_data / "human/pandalm/testset-v1.json").read_text(encoding="utf-8"))
    rows = []
    for item in items:
        a, b = item["cmp_key"].split("_")
        for rater in (1, 2, 3):
            verdict = {0: "tie", 1: "a", 2: "b"}[item[f"annotator{rater}"]]
            rows.append(_verdict(item["instruction"] + item["input"], a, b, verdict))
    result = rate(rows, resamples=100)
    assert result["matches"] == 2997
    assert len(result["ratings"]) == 5
    assert all(low < result["ratings"][name] < high for name, (low, high) in result["intervals"].items())
