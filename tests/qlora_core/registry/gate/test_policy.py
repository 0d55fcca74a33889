"""The policy's primary rule, slices, judge and votes, on evidence made by hand; statistics against plain references."""

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from scipy import stats

from qlora_core.config.gate import GateConfig
from qlora_core.registry.gate.decide import check, decide, minimum_detectable_gain
from qlora_core.registry.gate.items import fixed_estimate, mean_and_error, read_items
from qlora_core.registry.gate.slices import holm_rejected

sys.path.insert(0, str(Path(__file__).parent))
from gate_evidence import answers, columns, evaluation, prompts_table, rows_table, scattered

CERTIFIED = {
    "kind": "openai",
    "model": "judge-1",
    "certified": True,
    "fingerprint": "f1",
    "snapshot": "s1",
    "certificate": {"fingerprint": "f1", "snapshot": "s1", "passed": True},
    "scored": 400,
    "unscored": 0,
}


def policy(**settings: Any) -> GateConfig:
    return GateConfig.model_validate(settings)


def judged(scores: list[float], **changes: Any) -> dict[str, Any]:
    mean = float(np.mean(scores))
    half = 1.96 * float(np.std(scores, ddof=1)) / math.sqrt(len(scores))
    figures = {**CERTIFIED, "win_rate": mean, "low": mean - half, "high": mean + half, "prompts": len(scores)}
    return {**figures, **changes}


def verdicts(found: dict[str, Any], rules: GateConfig, check_name: str) -> list[str]:
    return [finding.verdict for finding in check(found, None, rules) if finding.check == check_name]


@pytest.mark.parametrize(
    ("mean", "rule", "verdict"),
    [
        (0.0, {}, "HOLD"),
        (0.0, {"rule": "non_inferiority", "margin": 0.05}, "PROMOTE"),
        (-0.04, {"rule": "non_inferiority", "margin": 0.05}, "HOLD"),
        (-0.2, {"rule": "non_inferiority", "margin": 0.05}, "REJECT"),
        (0.1, {"min_gain": 0.05}, "PROMOTE"),
        (0.06, {"min_gain": 0.05}, "HOLD"),
    ],
)
def test_superiority_and_non_inferiority(mean: float, rule: dict[str, Any], verdict: str) -> None:
    found = evaluation(scattered(mean, 0.1, 100))  # a standard error of .01
    assert decide(found, None, policy(primary=rule)).verdict == verdict


def test_default_policy_gives_the_recorded_interval_its_say() -> None:
    found = evaluation(scattered(0.1, 0.1, 100))
    without = {key: value for key, value in found.items() if key == "metrics"}
    assert decide(found, None, GateConfig()) == decide(without, None, GateConfig())


def test_another_alpha_is_computed_from_the_items() -> None:
    found = evaluation(scattered(0.025, 0.1, 100))  # 2.5 standard errors
    assert decide(found, None, policy(primary={"alpha": 0.1})).verdict == "PROMOTE"
    assert decide(found, None, policy(primary={"alpha": 0.001})).verdict == "HOLD"
    bare = {"metrics": found["metrics"]}
    assert decide(bare, None, policy(primary={"alpha": 0.1})).verdict == "INVALID"


def test_always_valid_interval_contains_the_fixed_one_and_decides_with_more_rows() -> None:
    rules = policy(primary={"test": "always_valid"})
    few, many = (evaluation(scattered(0.1, 0.1, count)) for count in (40, 800))
    assert decide(few, None, GateConfig()).verdict == "PROMOTE"
    assert decide(few, None, rules).verdict == "HOLD"
    decision = decide(many, None, rules)
    assert decision.verdict == "PROMOTE" and "valid however often it is read" in decision.reasons[0]
    fixed, always = (minimum_detectable_gain(few, None, each) for each in (GateConfig(), rules))
    assert fixed is not None and always is not None and fixed < always


def test_always_valid_false_promotion_stays_below_alpha_when_read_at_every_item() -> None:
    """Exact match that changes at random, read after each of 150 prompts; a fixed-n interval is the control."""
    draws = np.random.default_rng(5)
    rules = policy(primary={"metric": "exact_match", "test": "always_valid"}, min_rows=10)
    runs, wrong, peeked = 60, 0, 0
    for _ in range(runs):
        d = draws.choice([-1, 0, 1], 150, p=[0.2, 0.6, 0.2])
        table = {**columns(150), "before": {"matches": [1 - max(0, x) for x in d]}}
        table["after"] = {"matches": [b + x for b, x in zip(table["before"]["matches"], d, strict=True)]}
        # Running intersection: the last interval lies above zero wherever an earlier one did
        whole = {"metrics": {"heldout": evaluation([0.0] * 2)["metrics"]["heldout"]}, "items": {"prompts": table}}
        wrong += decide(whole, None, rules).verdict == "PROMOTE"
        means = np.cumsum(d) / np.arange(1, 151)
        errors = np.sqrt(np.maximum(np.cumsum(d**2) / np.arange(1, 151) - means**2, 1e-9) / np.arange(1, 151))
        peeked += bool((means - 1.96 * errors > 0)[20:].any())
    assert wrong / runs <= 0.05
    assert peeked / runs > 0.1


def test_exact_match_as_the_primary_metric() -> None:
    gained = prompts_table(100, before=answers(100, matches=[False] * 100), after=answers(100, matches=[True] * 100))
    found = evaluation([0.0] * 100, prompts=gained)
    rules = policy(primary={"metric": "exact_match", "alpha": 0.05})
    assert decide(found, None, rules).verdict == "PROMOTE"
    lost = prompts_table(100, before=answers(100, matches=[True] * 100), after=answers(100, matches=[False] * 100))
    assert decide(evaluation([1.0] * 100, prompts=lost), None, rules).verdict == "REJECT"
    assert decide(evaluation([1.0] * 100), None, rules).verdict == "INVALID"


def test_standard_error_equals_the_plain_one_and_the_ratio_estimators() -> None:
    gains = scattered(0.1, 0.2, 50)
    items = read_items({"rows": rows_table(gains)}, "loss", "metrics")
    mean, error = mean_and_error(items)
    assert (mean, error) == (pytest.approx(0.1), pytest.approx(float(stats.sem(gains)), rel=1e-12))
    # Unequal rows: the linearised error against the bootstrap's own spread (float64, 2000 resamples)
    weighted = {**rows_table(gains), "tokens": [1 + i % 7 for i in range(50)]}
    items = read_items({"rows": weighted}, "loss", "metrics")
    wide = fixed_estimate(items, 0.05)
    assert (wide.high - wide.low) / (2 * 1.96) == pytest.approx(mean_and_error(items)[1], rel=0.1)


def test_exact_match_error_is_agresti_and_mins() -> None:
    # n = 100, 12 gained, 4 lost. Half an item in each cell: 12.5 and 4.5 of 102
    d = [1.0] * 12 + [-1.0] * 4 + [0.0] * 84
    before = [x < 0 or (x == 0) for x in d]
    after = [x > 0 or (x == 0) for x in d]
    table = prompts_table(100, before=answers(100, matches=before), after=answers(100, matches=after))
    mean, error = mean_and_error(read_items({"prompts": table}, "exact_match", "metrics"))
    p, q = 12.5 / 102, 4.5 / 102
    assert mean == pytest.approx(p - q)
    assert error == pytest.approx(math.sqrt((p + q - (p - q) ** 2) / 102))


def test_holm_against_a_worked_example() -> None:
    # Four p-values at .05: .005 <= .0125 and .01 <= .0167 fall, .03 > .025 stops; .04 alone would have been below .05
    assert holm_rejected({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}, 0.05) == {"a", "d"}
    assert holm_rejected({}, 0.05) == set()


SLICES = {"by": "category", "margin": 0.05, "min_items": 30}


def test_a_slice_that_got_worse_is_named_though_the_whole_is_better() -> None:
    gains = scattered(0.4, 0.1, 150)
    categories = ["qa"] * 100 + ["code"] * 50
    gains[100:] = scattered(-0.3, 0.1, 50)
    found = evaluation(gains, categories=categories)
    assert decide(found, None, GateConfig()).verdict == "PROMOTE"
    decision = decide(found, None, policy(slices=SLICES))
    assert decision.verdict == "REJECT"
    named = [reason for reason in decision.reasons if "category 'code'" in reason]
    assert len(named) == 1 and "-0.3000" in named[0] and "0.05 is tolerated" in named[0]


def _p_worse(gains: Any) -> float:
    found: Any = stats.ttest_1samp(gains, -0.05, alternative="less")
    return float(found.pvalue)


def test_holm_keeps_twenty_sound_slices_from_a_chance_rejection() -> None:
    """Twenty slices at just the tolerated fall: without a correction, some p-value is below .05 two times in three."""
    draws = np.random.default_rng(3)
    rejected = uncorrected = 0
    for _ in range(40):
        names = [f"c{i % 20:02d}" for i in range(800)]
        gains = (draws.normal(-0.05, 0.1, 800)).tolist()
        found = evaluation(gains, categories=names)
        rejected += "REJECT" in verdicts(found, policy(slices=SLICES), "slices")
        groups = [np.array(gains)[np.array(names) == name] for name in sorted(set(names))]
        uncorrected += any(_p_worse(g) < 0.05 for g in groups)
    assert rejected <= 6 and uncorrected >= 15


@pytest.mark.parametrize(("underpowered", "verdict"), [("waive", "PROMOTE"), ("hold", "HOLD"), ("pool", "PROMOTE")])
def test_small_slices_are_waived_held_or_pooled_as_the_policy_says(underpowered: str, verdict: str) -> None:
    gains = scattered(0.3, 0.1, 100) + scattered(0.2, 0.05, 40)
    categories = ["qa"] * 100 + ["brainstorming", "code"] * 20
    found = evaluation(gains, categories=categories)
    decision = decide(found, None, policy(slices={**SLICES, "underpowered": underpowered}))
    assert decision.verdict == verdict
    if underpowered == "pool":
        assert any("2 small slices together (brainstorming, code)" in reason for reason in decision.reasons)


def test_a_pool_of_small_slices_that_fell_is_rejected() -> None:
    gains = scattered(0.3, 0.1, 100) + scattered(-0.4, 0.05, 40)
    categories = ["qa"] * 100 + ["brainstorming", "code"] * 20
    found = evaluation(gains, categories=categories)
    assert decide(found, None, policy(slices={**SLICES, "underpowered": "pool"})).verdict == "REJECT"


def test_slices_under_an_always_valid_test_use_its_intervals() -> None:
    rules = policy(primary={"test": "always_valid"}, slices={**SLICES, "margin": 0.2})
    worse = evaluation(scattered(0.5, 0.1, 400) + [-0.9] * 200, categories=["qa"] * 400 + ["code"] * 200)
    assert "REJECT" in verdicts(worse, rules, "slices")
    sound = evaluation(scattered(0.5, 0.1, 600), categories=["qa"] * 400 + ["code"] * 200)
    assert verdicts(sound, rules, "slices") == ["PROMOTE", "PROMOTE"]


def test_slices_without_a_table_or_label_are_invalid() -> None:
    found = evaluation(scattered(0.4, 0.1, 100))
    assert decide({**found, "items": None}, None, policy(slices=SLICES)).verdict == "INVALID"
    assert decide(found, None, policy(slices={**SLICES, "by": "language"})).verdict == "PROMOTE"


def test_rows_without_a_label_are_a_slice_of_their_own() -> None:
    found = evaluation(scattered(0.4, 0.1, 60), categories=[None] * 60)
    assert any("rows without a category" in reason for reason in decide(found, None, policy(slices=SLICES)).reasons)


SCORES = [1.0] * 130 + [0.0] * 70
JUDGE = {"primary": {"metric": "judge"}}


def test_certified_judge_decides_as_the_primary_metric() -> None:
    found = evaluation([0.0] * 50, judge=judged(SCORES), prompts=prompts_table(200, judge=SCORES))
    assert decide(found, None, policy(**JUDGE)).verdict == "PROMOTE"
    worse = [1 - score for score in SCORES]
    found = evaluation([0.0] * 50, judge=judged(worse), prompts=prompts_table(200, judge=worse))
    assert decide(found, None, policy(**JUDGE)).verdict == "REJECT"


@pytest.mark.parametrize(
    ("changes", "verdict", "said"),
    [
        ({"certified": False}, "HOLD", "not certified"),
        ({"fingerprint": "f2"}, "INVALID", "fingerprint is 'f2'"),
        ({"snapshot": "s2"}, "INVALID", "snapshot is 's2'"),
        ({"unscored": 20}, "INVALID", "unscored"),
    ],
)
def test_a_judge_that_may_not_be_believed(changes: dict[str, Any], verdict: str, said: str) -> None:
    found = evaluation([0.0] * 50, judge=judged(SCORES, **changes), prompts=prompts_table(200, judge=SCORES))
    decision = decide(found, None, policy(**JUDGE))
    assert decision.verdict == verdict and any(said in reason for reason in decision.reasons)


def test_verdicts_against_the_champion_by_another_judge_are_invalid() -> None:
    found = evaluation([0.1] * 50, judge=judged(SCORES))
    champion = {
        "version": "3",
        "heldout": found["metrics"]["heldout"],
        "exact_match": None,
        "judge": judged(SCORES, fingerprint="f2", certificate={"fingerprint": "f2", "snapshot": "s1"}),
        "items": {"prompts": prompts_table(200, judge=SCORES)},
    }
    decision = decide(found, champion, policy(**JUDGE))
    assert decision.verdict == "INVALID" and "evaluate again with one judge" in decision.reasons[0]
    champion["judge"] = judged(SCORES)
    assert "PROMOTE" in verdicts_of(found, champion, policy(**JUDGE), "primary")


def verdicts_of(found: dict[str, Any], champion: dict[str, Any], rules: GateConfig, name: str) -> list[str]:
    return [finding.verdict for finding in check(found, champion, rules) if finding.check == name]


def test_human_votes_correct_a_biased_uncertified_judge() -> None:
    """A judge that likes the challenger always; people, asked on half of the prompts, do not."""
    draws = np.random.default_rng(1)
    people = draws.choice([0.0, 1.0], 200, p=[0.75, 0.25]).tolist()
    judge = [1.0 if draws.random() < 0.8 else person for person in people]
    votes: list[float | None] = [score if i % 2 else None for i, score in enumerate(people)]
    prompts = prompts_table(200, judge=judge, human=votes)
    found = evaluation([0.0] * 50, judge=judged(judge, certified=False), prompts=prompts, human_alpha=0.6)
    decision = decide(found, None, policy(**JUDGE))
    assert decision.verdict == "REJECT" and "from votes on 100 prompts" in decision.reasons[0]
    ignoring = policy(**JUDGE, humans={"combine": "ignore"})
    assert decide(found, None, ignoring).verdict == "HOLD"  # uncertified, whatever it says
    assert decide(found, None, policy(**JUDGE, humans={"min_prompts": 101})).verdict == "REJECT"
    assert "HOLD" in verdicts(found, policy(**JUDGE, humans={"min_prompts": 101}), "humans")
    assert "HOLD" in verdicts(found, policy(**JUDGE, humans={"min_alpha": 0.7}), "humans")
    assert verdicts(found, policy(**JUDGE, humans={"min_alpha": 0.5}), "humans") == []


def test_votes_alone_where_no_other_prompt_was_judged() -> None:
    people = [1.0] * 60 + [0.0] * 20
    found = evaluation([0.0] * 50, judge=judged([1.0] * 79 + [0.0]), prompts=prompts_table(80, human=people))
    reason = decide(found, None, policy(**JUDGE)).reasons[0]
    expected = stats.t.interval(0.95, 79, loc=0.25, scale=stats.sem(people))
    assert f"interval {expected[0]:+.4f} to {expected[1]:+.4f}" in reason and "alone" in reason


@pytest.mark.parametrize(
    "settings",
    [
        {"primary": {"rule": "non_inferiority"}},
        {"primary": {"margin": 0.1}},
        {"primary": {"rule": "non_inferiority", "margin": 0.1, "min_gain": 0.1}},
        {"primary": {"metric": "perplexity"}},
        {"guards": {"length_ratio": [1.6, 0.6]}},
        {"guards": {"base_digest": "short"}},
        {"slices": {"underpowered": "ignore"}},
    ],
)
def test_contradictory_policies_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        policy(**settings)
