"""Figures about raters, on votes whose answer is known by construction."""

import json
from pathlib import Path

import pytest

from qlora_core.evaluation.verdict import Verdict
from qlora_core.evaluation.vote.quality import human_against_judge, human_agreement, rater_quality
from qlora_core.evaluation.vote.records import VoteRecord

EMPTY = {
    "category": None, "model_a": "new", "model_b": "old", "gold": None, "at": None, "seconds": 4.0, "note": "",
    "excluded": False, "occasion": "rating", "first": "a",
}  # fmt: skip


def vote(item: str, rater: str, label: str | None, **changes: object) -> VoteRecord:
    fields = {**EMPTY, "item_id": item, "prompt_id": item, "rater": rater, "label": label, **changes}
    sides = {"a": "left", "b": "right"} if fields["first"] == "a" else {"a": "right", "b": "left"}
    return VoteRecord.model_validate({"choice": sides.get(str(label), label), **fields})


def verdict(item: str, label: str | None, first: str = "a", a: str = "new", b: str = "old") -> Verdict:
    row = {"prompt_id": item, "model_a": a, "model_b": b, "verdict": label, "first": first, "judge": "j"}
    return Verdict.model_validate(row)


def test_a_raters_checks_are_counted() -> None:
    (ann,) = rater_quality(
        [
            vote("1", "ann", "a"),
            vote("2", "ann", "b", first="b"),
            vote("3", "ann", None),
            vote("4", "ann", "a", occasion="gold", gold="a"),
            vote("5", "ann", "a", occasion="gold", gold="tie"),
            vote("6", "ann", "both_bad", occasion="gold", gold="tie"),
            vote("1", "ann", "a", occasion="repeat", first="b", seconds=10.0),
            vote("2", "ann", "tie", occasion="repeat"),
            vote("1", "ann", "both_bad", occasion="self"),
            vote("2", "ann", "a", occasion="self"),
        ]
    )
    assert ann["votes"] == 2 and ann["skipped"] == 1
    assert (ann["gold"], ann["self"], ann["repeat"]) == ([2, 3], [1, 2], [1, 2])
    assert ann["left"] == [4, 5]
    assert ann["median_seconds"] == 4.0


def test_agreement_is_over_ratings_that_count() -> None:
    records = [vote(str(n), rater, "ab"[n % 2]) for n in range(6) for rater in ("ann", "ben")]
    checks = [vote("0", "ann", "b", occasion="self"), vote("1", "ben", None), vote("2", "eve", "b", excluded=True)]
    measured = human_agreement([*records, *checks])
    assert measured is not None
    assert measured["krippendorff_alpha"] == pytest.approx(1.0)
    assert (measured["items"], measured["raters"]) == (6, 2)
    assert human_agreement(checks) is None


def test_both_bad_is_a_label_of_its_own_and_no_preference() -> None:
    records = [vote("1", "ann", "tie"), vote("1", "ben", "both_bad"), vote("2", "ann", "a"), vote("2", "ben", "a")]
    apart, merged = human_agreement(records), human_agreement(records, merge_ties=True)
    assert apart is not None and merged is not None
    assert (apart["raw"], merged["raw"]) == (0.5, 1.0)


def test_people_are_set_beside_the_judge_and_what_cannot_be_is_counted() -> None:
    records = [
        *(vote("1", rater, "a") for rater in ("ann", "ben", "eve")),
        vote("2", "ann", "b"), vote("2", "ben", "b"), vote("2", "eve", "a"),
        vote("3", "ann", "a"), vote("3", "ben", "b"),
        *(vote(item, "ann", "a") for item in ("4", "5", "6")),
    ]  # fmt: skip
    verdicts = [
        verdict("1", "a"), verdict("1", "b", first="b", a="old", b="new"),  # the other order, named the other way round
        verdict("2", "a"), verdict("3", "a"), verdict("4", "a"), verdict("4", "b", first="b"), verdict("5", None),
    ]  # fmt: skip
    compared = human_against_judge(records, verdicts)
    assert compared["items"] == 2
    assert {name: compared[name] for name in ("no_majority", "judge_conflicts", "judge_unscored", "unjudged")} == {
        "no_majority": 1, "judge_conflicts": 1, "judge_unscored": 1, "unjudged": 1,
    }  # fmt: skip
    assert compared["disagreements"] == [
        {"item_id": "2", "human": "old", "judge": "new", "votes": {"old": 2, "new": 1}}
    ]
    assert compared["agreement"]["raw"] == 0.5


def test_published_kappas_of_real_raters_come_back(shared_data: Path) -> None:
    # PandaLM's three annotators, pairwise Cohen's kappa as published: .85, .88, .86.
    rows = json.loads((shared_data / "human" / "pandalm" / "testset-v1.json").read_text())
    names = {0: "tie", 1: "a", 2: "b"}
    records = [
        vote(str(n), f"r{who}", names[int(row[f"annotator{who}"])]) for n, row in enumerate(rows) for who in (1, 2, 3)
    ]
    measured = human_agreement(records)
    assert measured is not None
    assert [round(pair["kappa"], 2) for pair in measured["cohen_pairs"]] == [0.85, 0.88, 0.86]
