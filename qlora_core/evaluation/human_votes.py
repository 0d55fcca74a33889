"""Human votes of a study, as scores of an evaluation's answers. Knows a study's file and answers, not who wrote them.

A vote counts for an answer's text, not for a model's name: votes on the answers of another adapter are never counted.
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from qlora_core.digest import digest_json
from qlora_core.errors import EvaluationError
from qlora_core.evaluation.verdict import Verdict
from qlora_core.evaluation.vote.ballots import BallotBox
from qlora_core.evaluation.vote.export import HUMAN_PREFIX
from qlora_core.evaluation.vote.quality import human_agreement, preference
from qlora_core.evaluation.vote.records import VoteRecord, counted, vote_records

_SCORE = {"a": 1.0, "b": 0.0, "tie": 0.5}


class HumanScores(NamedTuple):
    """Per prompt the mean vote for `after` (win 1, tie or both bad .5; None without votes), and the raters' agreement.

    `alpha` is Krippendorff's, nominal, over the votes counted; None where it has no value. `rows` are the votes as
    verdict rows of `adapter` (after) and `base` (before); a vote that does not say which answer came first has none.
    """

    scores: list[float | None]
    alpha: float | None
    rows: list[Verdict]


def votes_digest(study: Path) -> str:
    """Identity of all that people decided in a study so far. Raises EvaluationError where it is no study."""
    box, records = _records(study)
    return digest_json({"pairs": box.pairs_digest, "votes": [record.model_dump(mode="json") for record in records]})


def human_scores(study: Path, prompt_ids: Sequence[str], before: Sequence[str], after: Sequence[str]) -> HumanScores:
    """The votes on these very answers, per prompt; checks and excluded raters left out.

    Raises EvaluationError where the file is no study.
    """
    box, records = _records(study)
    wanted = {one: (b, a) for one, b, a in zip(prompt_ids, before, after, strict=True) if b != a}
    sides = {
        item: "a" if (pair.answer_b, pair.answer_a) == wanted[pair.prompt_id] else "b"
        for item, pair in box.pairs.items()
        if pair.prompt_id in wanted and {pair.answer_a, pair.answer_b} == set(wanted[pair.prompt_id])
    }
    used = [record for record in counted(records) if record.item_id in sides]
    votes: dict[str, list[float]] = defaultdict(list)
    for record in used:
        score = _SCORE[preference(record)]
        votes[record.prompt_id].append(score if sides[record.item_id] == "a" else 1 - score)
    agreed = human_agreement(used) if used else None
    means = [sum(votes[one]) / len(votes[one]) if one in votes else None for one in prompt_ids]
    rows = [_row(record, sides[record.item_id]) for record in used if record.first is not None]
    return HumanScores(means, None if agreed is None else agreed["krippendorff_alpha"], rows)


def _row(record: VoteRecord, after: str) -> Verdict:
    """The vote in terms of `after` as a; it is the study's side `after`."""
    swap = {"a": "b", "b": "a", "tie": "tie"} if after == "b" else {"a": "a", "b": "b", "tie": "tie"}
    row = {
        "prompt_id": record.prompt_id,
        "model_a": "adapter",
        "model_b": "base",
        "verdict": swap[preference(record)],
        "first": swap[str(record.first)],
        "judge": HUMAN_PREFIX + record.rater,
        "reason": "both_bad" if record.label == "both_bad" else None,
    }
    return Verdict.model_validate(row)


def _records(study: Path) -> tuple[BallotBox, list[VoteRecord]]:
    if not study.is_file():
        raise EvaluationError(
            f"evaluate.votes: {study} is no file; name the votes.sqlite of a `qlora vote serve` study"
        )
    box = BallotBox(study)
    with box.state() as state:
        return box, vote_records(state, box.pairs)
