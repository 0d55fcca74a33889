"""The results page's figures. Knows which figures and in what order, not how they are drawn."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from qlora_core.evaluation.statistics.agreement import agreement_table
from qlora_core.evaluation.verdict import Verdict
from qlora_core.evaluation.vote.assignment import StudySettings
from qlora_core.evaluation.vote.pairs import Pair
from qlora_core.evaluation.vote.quality import human_against_judge, human_agreement, rater_quality
from qlora_core.evaluation.vote.records import VoteRecord, counted

SHOWN_DISAGREEMENTS = 20


def summarise_study(
    records: Sequence[VoteRecord], pairs: Mapping[str, Pair], settings: StudySettings, judge: Sequence[Verdict]
) -> dict[str, Any]:
    """Coverage, votes by pair of models, agreement, rater quality and, with a judge's rows, people against it."""
    rated = Counter(record.item_id for record in counted(records))
    items = [item for item, pair in pairs.items() if pair.gold is None]
    against = human_against_judge(records, judge) if judge else None
    return {
        "votes": len(counted(records)),
        "items": len(items),
        "covered": sum(rated[item] >= settings.raters_per_item for item in items),
        "raters_per_item": settings.raters_per_item,
        "matches": _matches(records),
        "agreement": agreement_table(human_agreement(records)),
        "agreement_merged": agreement_table(human_agreement(records, merge_ties=True)),
        "raters": rater_quality(records),
        "against": None if against is None else {**against, "rows": agreement_table(against["agreement"])},
        "telling": [] if against is None else _telling(against["disagreements"], pairs),
    }


def _matches(records: Sequence[VoteRecord]) -> list[dict[str, Any]]:
    """Votes by pair of models: {first, second, first_wins, second_wins, tie, both_bad, votes}."""
    tally: dict[tuple[str, ...], Counter[str]] = {}
    for record in counted(records):
        names = {"a": record.model_a, "b": record.model_b}
        models = tuple(sorted(names.values()))
        tally.setdefault(models, Counter())[names.get(str(record.label), str(record.label))] += 1
    return [
        {
            "first": first,
            "second": second,
            "first_wins": counts[first],
            "second_wins": counts[second],
            "tie": counts["tie"],
            "both_bad": counts["both_bad"],
            "votes": counts.total(),
        }
        for (first, second), counts in sorted(tally.items())
    ]


def _telling(disagreements: Sequence[Mapping[str, Any]], pairs: Mapping[str, Pair]) -> list[dict[str, Any]]:
    return [{**row, "pair": pairs[row["item_id"]]} for row in disagreements[:SHOWN_DISAGREEMENTS]]
