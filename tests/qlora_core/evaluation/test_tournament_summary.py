import json
from pathlib import Path
from typing import Any

import pytest

from qlora_core.evaluation.answer_book import AnswerBook
from qlora_core.evaluation.comparisons import comparisons_of
from qlora_core.evaluation.tournament import rate
from qlora_core.evaluation.tournament_summary import matches_by_pair, people_facts, summarise_tournament
from qlora_core.evaluation.verdict import Verdict

PANDALM = Path(__file__).resolve().parents[4] / "shared" / "data" / "human" / "pandalm" / "testset-v1.json"


def row(prompt: str, a: str, b: str, verdict: str | None, first: str = "a", judge: str = "j") -> Verdict:
    named = {"prompt_id": prompt, "model_a": a, "model_b": b, "judge": judge}
    return Verdict.model_validate(
        {**named, "verdict": verdict, "first": first, "reason": None if verdict else "timeout: x"}
    )


def both(prompt: str, a: str, b: str, verdict: str | None, other: str | None) -> list[Verdict]:
    return [row(prompt, a, b, verdict), row(prompt, a, b, other, "b")]


def test_matches_name_the_better_rated_first_and_count_every_row() -> None:
    rows = [*both("p1", "old", "new", "b", "b"), *both("p2", "new", "old", "tie", None), row("p3", "new", "old", "b")]
    assert matches_by_pair(rows, ["new", "old"]) == [
        {"first": "new", "second": "old", "wins": 2, "ties": 1, "losses": 1, "unscored": 1}
    ]


def test_summary_counts_each_judge_by_itself_and_people_apart() -> None:
    rows = [*both("p1", "x", "y", "a", "a"), *both("p2", "x", "y", "a", "b"), *both("p3", "x", "y", "b", None)]
    rows += [row("p1", "x", "y", "a", judge=f"human:{name}") for name in ("ann", "ben")]
    rows += [row("p2", "x", "y", "b", judge="human:ann"), row("p3", "x", "y", "a", judge="human:ann")]
    summary = summarise_tournament(rate(rows, resamples=50), rows, AnswerBook())
    (judge,) = summary["judges"]
    assert (judge["judge"], judge["scored"], judge["unscored"], judge["reasons"]) == ("j", 5, 1, {"timeout": 1})
    assert judge["order_consistency"] == 0.5  # p3 has one scored order: it can neither agree nor contradict
    assert (summary["people"]["votes"], summary["people"]["raters"], summary["people"]["items"]) == (4, 2, 3)
    # p1 agrees, p3 does not, and on p2 the judge contradicts itself
    assert (summary["against"]["items"], summary["against"]["conflicts"]) == (2, 1)
    assert summary["against"]["statistics"][0]["value"] == 0.5
    assert summary["slices"] is None
    assert [ranking.found for ranking in summary["disagreements"]][:2] == [2, 1]


def test_without_votes_there_are_no_people() -> None:
    rows = both("p1", "x", "y", "a", "b")
    summary = summarise_tournament(rate(rows, resamples=50), rows, AnswerBook())
    assert (summary["people"], summary["against"]) == (None, None)


@pytest.mark.skipif(not PANDALM.is_file(), reason="needs ../shared/data/human/pandalm")
def test_people_of_pandalm_agree_as_their_pairwise_kappas_say() -> None:
    labels = {0: "tie", 1: "a", 2: "b"}
    rows: list[Verdict] = []
    for item in json.loads(PANDALM.read_text(encoding="utf-8")):
        a, b = item["cmp_key"].split("_")
        rows += [row(str(item["idx"]), a, b, labels[item[f"annotator{i}"]], judge=f"human:{i}") for i in (1, 2, 3)]
    people: Any = people_facts(comparisons_of(rows))
    assert (people["raters"], people["items"], people["votes"]) == (3, 999, 2997)
    # The published .85, .88 and .86 of its three pairs of raters
    (cohen,) = [one for one in people["statistics"] if one["name"] == "Cohen's kappa"]
    assert cohen["value"] == pytest.approx((0.85 + 0.88 + 0.86) / 3, abs=0.005)
