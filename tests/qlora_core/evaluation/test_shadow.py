"""The rules of a shadow period: silent under chance however often they are read, loud when an arm breaks."""

import numpy as np
import pytest

from qlora_core.config.shadow import ShadowConfig
from qlora_core.evaluation.shadow import ShadowPair, shadow_figures

RULES = ShadowConfig()
GOOD = "a plain answer of some words"


def pair(number: int, candidate: str, champion: str = GOOD) -> ShadowPair:
    return ShadowPair(f"question {number}", champion, candidate)


def test_equal_arms_break_nothing_and_figures_are_shares() -> None:
    pairs = [pair(number, "" if number % 10 == 0 else GOOD, "" if number % 10 == 1 else GOOD) for number in range(100)]
    found = shadow_figures(pairs, RULES)
    assert found["broken"] == [] and found["prompts"] == 100
    assert found["degenerate"]["champion"] == found["degenerate"]["candidate"] == pytest.approx(0.1)
    assert found["degenerate"]["low"] < 0 < found["degenerate"]["high"]
    assert found["words"]["share"] == pytest.approx(0.5)


def test_no_prompts_no_figures() -> None:
    found = shadow_figures([], RULES)
    assert (found["prompts"], found["degenerate"], found["broken"]) == (0, None, [])


@pytest.mark.parametrize(
    ("candidate", "said"),
    [
        ("", "degenerate answers"),
        ("I'm sorry, but I can't help with that.", "refused answers"),
        (GOOD * 20, "answers are longer"),
        ("yes", "answers are shorter"),
    ],
)
def test_broken_arm_is_named_by_the_rule_it_breaks(candidate: str, said: str) -> None:
    broken = shadow_figures([pair(number, candidate) for number in range(80)], RULES)["broken"]
    assert any(said in sentence for sentence in broken), broken
    # The champion's fault is not the candidate's.
    turned = shadow_figures([pair(number, GOOD, candidate) for number in range(80)], RULES)["broken"]
    assert not any(said in sentence for sentence in turned)


def test_good_candidate_is_seldom_sent_back_though_the_rules_are_read_after_every_answer() -> None:
    random = np.random.default_rng(0)
    rules = ShadowConfig(max_degenerate_increase=0.0, max_refusal_increase=1.0)
    wronged = 0
    tries = 100
    for _ in range(tries):
        empty = random.random((60, 2)) < 0.2
        pairs = [
            pair(number, "" if mine else GOOD, "" if theirs else GOOD) for number, (theirs, mine) in enumerate(empty)
        ]
        wronged += any(
            "degenerate" in sentence
            for size in range(5, 61, 5)
            for sentence in shadow_figures(pairs[:size], rules)["broken"]
        )
    assert wronged <= 0.05 * tries


def test_period_needs_prompts_and_bounds_in_order() -> None:
    with pytest.raises(ValueError, match=r"shadow\.prompts"):
        ShadowConfig(period_s=9.0)
    with pytest.raises(ValueError, match="length_ratio"):
        ShadowConfig(length_ratio=(2.0, 0.5))
