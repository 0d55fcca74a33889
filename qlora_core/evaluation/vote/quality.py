"""How good the votes are: agreement of raters, each rater's checks, and people against a judge.

Knows vote records and verdict rows; the statistics are those of `agreement`.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from statistics import median
from typing import Any

from qlora_core.evaluation.statistics.agreement import Label, agreement
from qlora_core.evaluation.verdict import Verdict
from qlora_core.evaluation.vote.records import VoteRecord, counted

HUMAN = "human majority"
JUDGE = "judge"


def rater_quality(records: Sequence[VoteRecord]) -> list[dict[str, Any]]:
    """One row per rater, by name: what they did and how they did on the checks.

    `gold`, `self` and `repeat` are [passed, given]: the known preference was chosen (both bad passes where gold is a
    tie), a self-pair was called a tie or both bad, a hidden repeat got the label of the first time. `left` is
    [left chosen, left or right chosen] over all but self-pairs. `median_seconds` is null where all was imported.
    """
    by_rater: dict[str, list[VoteRecord]] = defaultdict(list)
    for record in records:
        by_rater[record.rater].append(record)
    return [_quality_of(rater, rows) for rater, rows in sorted(by_rater.items())]


def human_agreement(records: Sequence[VoteRecord], *, merge_ties: bool = False) -> dict[str, Any] | None:
    """Agreement of raters on the pairs, checks left out; None without votes. `merge_ties` takes both bad as a tie."""
    labels = [
        Label(item_id=row.item_id, rater_id=row.rater, label=preference(row) if merge_ties else row.label)
        for row in counted(records)
    ]
    return agreement(labels) if labels else None


def preference(record: VoteRecord) -> str:
    """The label as a preference: both bad prefers neither."""
    return "tie" if record.label == "both_bad" else str(record.label)


def human_against_judge(records: Sequence[VoteRecord], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """The raters' majority beside a judge, over the pairs both decided.

    A majority is the label most raters gave, alone at the top; else the item counts in `no_majority`. A judge's rows
    on one pair (both orders) must say the same; else it counts in `judge_conflicts`, and where no row is scored in
    `judge_unscored`. `unjudged` are items with votes without any row. `agreement` is null where no pair is left;
    `disagreements` lists the rest, most decided humans first.
    """
    judged: dict[tuple, list[str | None]] = defaultdict(list)
    for row in verdicts:
        judged[_comparison(row.prompt_id, row.model_a, row.model_b)].append(
            _winner(row.model_a, row.model_b, row.verdict)
        )
    votes: dict[str, list[VoteRecord]] = defaultdict(list)
    for record in counted(records):
        votes[record.item_id].append(record)
    counts: Counter[str] = Counter()
    labels: list[Label] = []
    disagreements = []
    for item, rows in votes.items():
        said = judged.get(_comparison(rows[0].prompt_id, rows[0].model_a, rows[0].model_b))
        human = _majority([preference(row) for row in rows])
        judge, fault = _one_verdict(said)
        if fault is not None or human is None:
            counts[fault or "no_majority"] += 1
            continue
        human = _winner(rows[0].model_a, rows[0].model_b, human)
        labels += [
            Label(item_id=item, rater_id=name, label=str(label)) for name, label in ((HUMAN, human), (JUDGE, judge))
        ]
        if human != judge:
            tally = dict(Counter(_winner(row.model_a, row.model_b, preference(row)) for row in rows))
            disagreements.append({"item_id": item, "human": human, "judge": judge, "votes": tally})
    disagreements.sort(key=lambda row: -row["votes"][row["human"]])
    return {
        "items": len(labels) // 2,
        "agreement": agreement(labels) if labels else None,
        **{name: counts[name] for name in ("no_majority", "judge_conflicts", "judge_unscored", "unjudged")},
        "disagreements": disagreements,
    }


def _quality_of(rater: str, rows: Sequence[VoteRecord]) -> dict[str, Any]:
    decided = [row for row in rows if row.label is not None]
    first = {row.item_id: row.label for row in decided if row.occasion == "rating"}
    gold = [(row.gold == preference(row)) for row in decided if row.occasion == "gold"]
    selves = [row.label in ("tie", "both_bad") for row in decided if row.occasion == "self"]
    repeats = [row.label == first[row.item_id] for row in decided if row.occasion == "repeat" and row.item_id in first]
    sides = [row.choice == "left" for row in decided if row.choice in ("left", "right") and row.occasion != "self"]
    seconds = [row.seconds for row in decided if row.seconds is not None]
    return {
        "rater": rater,
        "excluded": rows[0].excluded,
        "votes": sum(row.occasion in ("rating", "import") for row in decided),
        "skipped": sum(row.label is None for row in rows),
        **{
            name: [sum(passed), len(passed)]
            for name, passed in (("gold", gold), ("self", selves), ("repeat", repeats), ("left", sides))
        },
        "median_seconds": median(seconds) if seconds else None,
    }


def _comparison(prompt_id: str, model_a: str, model_b: str) -> tuple[str, ...]:
    return (prompt_id, *sorted((model_a, model_b)))


def _winner(model_a: str, model_b: str, label: str | None) -> str | None:
    return {"a": model_a, "b": model_b}.get(label or "", label)


def _majority(labels: Sequence[str]) -> str | None:
    ranked = Counter(labels).most_common(2)
    return None if len(ranked) == 2 and ranked[0][1] == ranked[1][1] else ranked[0][0]


def _one_verdict(said: Sequence[str | None] | None) -> tuple[str | None, str | None]:
    """The judge's verdict on a pair, or why there is none."""
    if said is None:
        return None, "unjudged"
    scored = {winner for winner in said if winner is not None}
    if not scored:
        return None, "judge_unscored"
    return (scored.pop(), None) if len(scored) == 1 else (None, "judge_conflicts")
