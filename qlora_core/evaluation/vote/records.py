"""Votes as flat rows, one for each decision that stands or imported vote: what every count and export reads."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict

from qlora_core.evaluation.vote.pairs import Pair, Preference
from qlora_core.evaluation.vote.state import Choice, LabelName, Side, StudyState


class VoteRecord(BaseModel):
    """One decision. `label` says in terms of a and b what `choice` says in terms of sides; both are null if skipped.

    `first` is the answer on the left; null where an imported file does not say. Of an imported vote `choice` is null.
    `seconds` run from showing the pair to the decision. `excluded` rows count nowhere.
    """

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    item_id: str
    prompt_id: str
    category: str | None
    model_a: str
    model_b: str
    rater: str
    occasion: Literal["rating", "gold", "repeat", "self", "import"]
    choice: Choice | None
    label: LabelName | None
    first: Side | None
    gold: Preference | None
    at: str | None
    seconds: float | None
    note: str
    excluded: bool

    @property
    def counts(self) -> bool:
        """Whether it is a person's judgement on the compared models: no check, not skipped, not excluded."""
        return self.occasion in ("rating", "import") and self.label is not None and not self.excluded


def vote_records(state: StudyState, pairs: Mapping[str, Pair]) -> list[VoteRecord]:
    """Every standing decision, by rater and in the order taken, then imported votes."""
    records = [
        VoteRecord(
            **_item_fields(pairs[decision.task.item], decision.task.item),
            rater=rater,
            occasion=decision.task.occasion,
            choice=decision.choice,
            label=decision.label,
            first=decision.task.left,
            at=_iso(decision.at),
            seconds=round(decision.at - decision.task.shown_at, 1),
            note=decision.note,
            excluded=rater in state.excluded,
        )
        for rater, decisions in sorted(state.decisions.items())
        for decision in decisions
    ]
    return records + [
        VoteRecord(
            **_item_fields(pairs[vote.item], vote.item),
            rater=vote.rater,
            occasion="import",
            choice=None,
            label=vote.label,
            first=vote.first,
            at=_iso(vote.at),
            seconds=None,
            note="",
            excluded=vote.rater in state.excluded,
        )
        for vote in state.imported
    ]


def counted(records: Sequence[VoteRecord]) -> list[VoteRecord]:
    """Those that count, see `VoteRecord.counts`."""
    return [record for record in records if record.counts]


def _item_fields(pair: Pair, item: str) -> dict:
    return {
        "item_id": item,
        "prompt_id": pair.prompt_id,
        "category": pair.category,
        "model_a": pair.model_a,
        "model_b": pair.model_b,
        "gold": pair.gold,
    }


def _iso(at: float | None) -> str | None:
    return None if at is None else datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")
