"""The per-item table of a comparison: what each held-out row and prompt says of both systems, in columns.

`before` is the system compared with (the base, or a champion), `after` the evaluated adapter. It is kept with the
evidence, so that slices, guards and tests can be computed again without a model. Knows no statistics and no model.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from qlora_core.data.dataset import PromptRow, RowLabels
from qlora_core.evaluation.answer_checks import is_degenerate, is_refusal, keeps_form, word_count
from qlora_core.evaluation.heldout import RowLoss
from qlora_core.evaluation.human_votes import HumanScores
from qlora_core.evaluation.judge.prompt import is_verdict_like
from qlora_core.evaluation.verdict import Verdict


class Answered(NamedTuple):
    """One system's answers to all prompts, and whether each matches its reference (None: not comparable)."""

    answers: Sequence[str]
    matches: Sequence[bool | None]


def item_table(
    *,
    losses: tuple[Sequence[RowLoss], Sequence[RowLoss]],
    labels: Mapping[str, RowLabels],
    prompts: Sequence[PromptRow],
    questions: Sequence[str],
    answered: tuple[Answered, Answered],
    judge: Mapping[str, float],
    human: HumanScores | None,
) -> dict[str, Any]:
    """The table, each pair being (before, after).

    `rows`: id, category, language, tokens, before and after (nats). `prompts`: id, category, language, before and after
    ({words, refusal, degenerate, verdict_like, format, matches}), judge and human (score of `after` in [0, 1], null
    where there is none). `human_alpha`: the raters' agreement, null without votes. `judge` maps prompt ids to scores.
    """
    before, after = losses
    ids = [row.id for row in before]
    return {
        "rows": {
            **_labels(ids, labels),
            "tokens": [row.tokens for row in before],
            "before": [row.nats for row in before],
            "after": [row.nats for row in after],
        },
        "prompts": {
            **_labels([row.id for row in prompts], labels),
            **{
                side: _answer_columns(prompts, questions, system)
                for side, system in zip(("before", "after"), answered, strict=True)
            },
            "judge": [judge.get(row.id) for row in prompts],
            "human": [None] * len(prompts) if human is None else list(human.scores),
        },
        "human_alpha": None if human is None else human.alpha,
    }


def judge_scores(verdicts: Sequence[Verdict], model: str) -> dict[str, float]:
    """`model`'s score per prompt: the mean over both orders (win 1, tie .5) of prompts whose orders are both scored."""
    grouped: dict[str, list[Verdict]] = defaultdict(list)
    for row in verdicts:
        grouped[row.prompt_id].append(row)
    scores = {}
    for prompt, rows in grouped.items():
        scored = [row for row in rows if row.scored]
        if {row.first for row in scored} == {"a", "b"}:
            each = [row.score_a if row.model_a == model else 1 - row.score_a for row in scored]
            scores[prompt] = sum(each) / len(each)
    return scores


def _labels(ids: Sequence[str], labels: Mapping[str, RowLabels]) -> dict[str, list[Any]]:
    found = [labels.get(one, RowLabels(None, None)) for one in ids]
    return {
        "id": list(ids),
        "category": [label.category for label in found],
        "language": [label.language for label in found],
    }


def _answer_columns(
    prompts: Sequence[PromptRow], questions: Sequence[str], system: Answered
) -> dict[str, list[int | bool | None]]:
    asked = list(zip(system.answers, prompts, questions, strict=True))
    return {
        "words": [word_count(answer) for answer, _, _ in asked],
        "refusal": [is_refusal(answer) for answer, _, _ in asked],
        "degenerate": [is_degenerate(answer, question) for answer, _, question in asked],
        "verdict_like": [is_verdict_like(answer) for answer, _, _ in asked],
        "format": [keeps_form(answer, row.reference) for answer, row, _ in asked],
        "matches": list(system.matches),
    }
