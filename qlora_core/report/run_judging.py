"""What a run's report says of judging: leaders, matches, people, slices and disagreements, from an evaluation's files.

Knows the files of an evaluation and of a comparison with the champion; decides nothing. Every part can be missing: an
evaluation without prompts has no judge, and one without labels no slices.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from qlora_core.config.gate import SlicesConfig
from qlora_core.evaluation.answer_book import AnswerBook, Prompt
from qlora_core.evaluation.comparisons import Comparison, comparisons_of
from qlora_core.evaluation.disagreements import (
    Ranking,
    judge_against_itself,
    people_against_judge,
    system_against_system,
)
from qlora_core.evaluation.slices import (
    LEAST_PROMPTS,
    WIN_RATE_MARGIN,
    SliceTable,
    Unit,
    slice_table,
)
from qlora_core.evaluation.tournament_summary import (
    against_facts,
    judge_facts,
    leaders,
    matches_by_pair,
    people_facts,
    verdict_like,
)
from qlora_core.evaluation.verdict import Verdict, read_verdicts

BASE, ADAPTER, CHAMPION = "base", "adapter", "champion"
REFERENCE = "reference"
SHOWN = 30
SLICED_BY = "category"

Table = Mapping[str, Any]


def read_judging(
    evaluation: Table,
    decision: Table,
    answers: Sequence[Table],
    evaluation_folder: Path,
    *,
    comparison_folder: Path | None = None,
    slices: Table | None = None,
) -> dict[str, Any]:
    """Everything the report shows of judging. `answers` are the rows of answers.jsonl.

    `comparison_folder` holds what `compare_adapters` wrote of the champion (None: no such comparison), `slices` the
    gate's section, whose `min_items` and `margin` say what an underpowered slice of the loss is.

    Keys: leaders and matches (empty without scored verdicts), judge (facts of its rows, null without), verdict_like
    (answers in the form of a verdict, by model), order_effect,
    people, against, heat_maps (slice tables), disagreements (rankings).
    """
    verdicts = _rows(evaluation_folder / "verdicts.jsonl")
    votes = _rows(evaluation_folder / "votes.jsonl")
    comparisons = comparisons_of([*verdicts, *votes])
    rated = _document(evaluation_folder / "ratings.json")
    book = _book(answers)
    return {
        "leaders": leaders(rated) if rated else [],
        "matches": matches_by_pair(verdicts, list(rated["ratings"])) if rated else [],
        "judge": judge_facts(verdicts[0].judge, verdicts) if verdicts else None,
        "verdict_like": verdict_like(book, (ADAPTER, BASE)),
        "order_effect": rated.get("order_effect"),
        "people": people_facts(comparisons),
        "against": against_facts(comparisons),
        "heat_maps": _heat_maps(evaluation, decision, evaluation_folder, comparisons, book, slices or {}),
        "disagreements": [
            people_against_judge(comparisons, book, SHOWN),
            judge_against_itself(comparisons, book, SHOWN),
            _between_systems(evaluation, decision, answers, comparisons, comparison_folder),
        ],
    }


def _heat_maps(
    evaluation: Table,
    decision: Table,
    folder: Path,
    comparisons: Sequence[Comparison],
    book: AnswerBook,
    slices: Table,
) -> list[SliceTable]:
    found = []
    items = evaluation.get("items")
    if items is not None and any(items["rows"][SLICED_BY]):
        rows = items["rows"]
        labels = dict(zip(rows["id"], rows[SLICED_BY], strict=True))
        least = slices.get("min_items", SlicesConfig().min_items)
        margin = slices.get("margin", SlicesConfig().margin)
        columns = _loss_columns(rows, _champion_rows(decision), folder)
        found.append(slice_table("loss_gain", columns, labels, least=least, margin=margin))
    categories = {prompt_id: prompt.category for prompt_id, prompt in book.prompts.items()}
    if any(categories.values()):
        said = {
            "judge": {one.prompt_id: (one.judge_score, 1.0) for one in comparisons if one.judge_score is not None},
            "people": {one.prompt_id: (one.human_score, 1.0) for one in comparisons if one.human_score is not None},
        }
        # Scores are those of the first model by name, and `adapter` stands before `base`
        told = {who: scores for who, scores in said.items() if scores}
        if told:
            found.append(slice_table("win_rate", told, categories, least=LEAST_PROMPTS, margin=WIN_RATE_MARGIN))
    return found


def _loss_columns(rows: Table, champion: Table | None, folder: Path) -> dict[str, dict[str, Unit]]:
    """Nats gained over the base and tokens of each row: the champion, the adapter and a sweep's other candidates."""
    tokens = dict(zip(rows["id"], rows["tokens"], strict=True))
    base = dict(zip(rows["id"], rows["before"], strict=True))
    systems: dict[str, Mapping[str, float]] = {}
    if champion is not None:
        systems[CHAMPION] = dict(zip(champion["id"], champion["before"], strict=True))
    systems[ADAPTER] = dict(zip(rows["id"], rows["after"], strict=True))
    systems |= _other_candidates(folder)
    return {
        name: {one: (base[one] - nats[one], float(tokens[one])) for one in base if one in nats}
        for name, nats in systems.items()
    }


def _other_candidates(folder: Path) -> dict[str, dict[str, float]]:
    """Nats by row of each trial but the first, which is the adapter itself; none where a sweep has one candidate."""
    path = folder / "candidate_rows.parquet"
    if not path.is_file():
        return {}
    table = pq.read_table(path, columns=["trial", "id", "nats"])
    trial_of, ids, nats = (column.to_pylist() for column in table.columns)
    found: dict[str, dict[str, float]] = {}
    for trial, one, value in zip(trial_of, ids, nats, strict=True):
        found.setdefault(trial, {})[one] = value
    return {trial: found[trial] for trial in list(found)[1:]}


def _between_systems(
    evaluation: Table,
    decision: Table,
    answers: Sequence[Table],
    comparisons: Sequence[Comparison],
    comparison_folder: Path | None,
) -> Ranking:
    """The adapter against the champion where they were compared, else against the base."""
    items = (decision.get("comparison") or {}).get("items")
    by_champion = _answers_of(comparison_folder) if items is not None else {}
    if items is None or not by_champion:
        items, rival = evaluation.get("items"), BASE
        theirs = {row["prompt_id"]: row[BASE] for row in answers}
    else:
        rival, theirs = CHAMPION, by_champion
        said = _rows((comparison_folder or Path()) / "reference_verdicts.jsonl")
        comparisons = comparisons_of([_with_champion(row) for row in said])
    losses, hits = _per_prompt(items)
    rows = [
        {
            "prompt_id": row["prompt_id"],
            "category": row.get("category"),
            "question": row["question"],
            "reference": row.get("reference"),
            "answers": (theirs[row["prompt_id"]], row[ADAPTER]),
            "losses": losses.get(row["prompt_id"], (None, None)),
            "matches": hits.get(row["prompt_id"], (None, None)),
        }
        for row in answers
        if row["prompt_id"] in theirs
    ]
    return system_against_system(rows, comparisons, (rival, ADAPTER), SHOWN)


def _per_prompt(items: Table | None) -> tuple[dict[str, tuple], dict[str, tuple]]:
    """Losses per token and exact matches of both systems, by prompt."""
    if items is None:
        return {}, {}
    rows, prompts = items["rows"], items["prompts"]
    losses = {
        one: (before / count, after / count)
        for one, count, before, after in zip(rows["id"], rows["tokens"], rows["before"], rows["after"], strict=True)
        if count
    }
    both = zip(prompts["before"]["matches"], prompts["after"]["matches"], strict=True)
    return losses, dict(zip(prompts["id"], both, strict=True))


def _champion_rows(decision: Table) -> Table | None:
    items = (decision.get("comparison") or {}).get("items")
    return None if items is None else items["rows"]


def _with_champion(row: Verdict) -> Verdict:
    named = {side: CHAMPION for side in ("model_a", "model_b") if getattr(row, side) == REFERENCE}
    return row.model_copy(update=named)


def _book(answers: Sequence[Table]) -> AnswerBook:
    book = AnswerBook()
    for row in answers:
        prompt = Prompt(row["question"], row.get("category"), row.get("reference"))
        for model in (ADAPTER, BASE):
            book.add(model, row["prompt_id"], prompt, row[model])
    return book


def _answers_of(folder: Path | None) -> dict[str, str]:
    path = None if folder is None else folder / "reference_answers.jsonl"
    if path is None or not path.is_file():
        return {}
    rows = (json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line)
    return {row["prompt_id"]: row["answer"] for row in rows}


def _rows(path: Path) -> list[Verdict]:
    return read_verdicts(path) if path.is_file() else []


def _document(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
