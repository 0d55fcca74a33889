"""Pairs of answers with a known better one: the project's own set, LLMBar and PandaLM by path, and what was recorded.

Knows these files' forms, not how a judge is run.
"""

import gzip
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from qlora_core.errors import EvaluationError
from qlora_core.evaluation.jsonl import read_rows
from qlora_core.evaluation.judge.replay import ReplayJudge
from qlora_core.evaluation.pairwise import Judgement
from qlora_core.evaluation.verdict import Identifier

OWN = "own"


class GoldPair(BaseModel):
    """Two answers to one prompt and which is better by people (a tie where they say so)."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    id: Identifier
    prompt: str
    answer_a: str
    answer_b: str
    label: Literal["a", "b", "tie"]
    category: str | None = None


def read_gold(source: str) -> list[GoldPair]:
    """The pairs of `own`, an LLMBar set's folder or dataset.json, a PandaLM testset, or a JSON Lines file of GoldPair.

    Raises EvaluationError where the path is none of these, or two pairs have one id.
    """
    if source == OWN:
        packaged = resources.files("qlora_core.evaluation.judge") / "gold" / "pairs.jsonl"
        with resources.as_file(packaged) as path:
            return _distinct(read_rows(path, GoldPair), path)
    path = Path(source)
    path = path / "dataset.json" if path.is_dir() else path
    if path.suffix == ".jsonl":
        return _distinct(read_rows(path, GoldPair), path)
    rows = _read_list(path)
    if rows and {"output_1", "output_2", "label"} <= rows[0].keys():
        return [_llmbar(i, row) for i, row in enumerate(rows)]
    if rows and {"response1", "response2", "annotator1"} <= rows[0].keys():
        return [_pandalm(row) for row in rows]
    raise EvaluationError(
        f"{path} holds no gold pairs; give `own`, an LLMBar folder, PandaLM's testset, or a .jsonl file"
    )


def recorded_llmbar(result: Path) -> ReplayJudge:
    """The judge that an LLMBar result.json(.gz) records, both orders, for the pairs of `read_gold` on its set.

    `winner` is already turned back to the answers' own order there; null is unparsed.
    """
    record: dict[tuple[str, str], Judgement] = {}
    for i, row in enumerate(_read_list(result)):
        for order, swap in (("ab", "swap = False"), ("ba", "swap = True")):
            winner = row["results"][-1][swap]["winner"]
            first = {"ab": "1", "ba": "2"}[order]
            slot = None if winner is None else "first" if winner == first else "second"
            record[f"llmbar-{i}", order] = Judgement(slot, None if slot else "parse: recorded without a winner")
    return ReplayJudge(record, name=f"recorded:{'/'.join(result.parent.parts[-2:])}")


def recorded_pandalm(result: Path) -> ReplayJudge:
    """The judge that a PandaLM result file records, in its one order, for the pairs of `read_gold` on the testset."""
    rows = _read_list(result)
    field = next((name for name in rows[0] if name.endswith("_result")), "")
    slots: Mapping[str, Literal["first", "second", "tie"]] = {"1": "first", "2": "second", "0": "tie", "Tie": "tie"}
    record: dict[tuple[str, str], Judgement] = {}
    for row in rows:
        slot = slots.get(str(row.get(field)))
        record[f"pandalm-{row['idx']}", "ab"] = Judgement(slot, None if slot else f"parse: {row.get(field)!r:.40}")
    return ReplayJudge(record, name=f"recorded:{result.stem}")


def _llmbar(index: int, row: Mapping[str, Any]) -> GoldPair:
    return GoldPair(
        id=f"llmbar-{index}",
        prompt=row["input"],
        answer_a=row["output_1"],
        answer_b=row["output_2"],
        label="a" if row["label"] == 1 else "b",
    )


def _pandalm(row: Mapping[str, Any]) -> GoldPair:
    """The majority of three annotators; where all three differ nobody knows, which counts as a tie.

    Two answers stand in the file as JSON true and numbers; they are taken as text.
    """
    votes = Counter(row[f"annotator{i}"] for i in (1, 2, 3))
    most, count = votes.most_common(1)[0]
    labels: dict[int, Literal["a", "b", "tie"]] = {0: "tie", 1: "a", 2: "b"}
    return GoldPair(
        id=f"pandalm-{row['idx']}",
        prompt=f"{row['instruction']}\n\n{row['input']}".strip(),
        answer_a=str(row["response1"]),
        answer_b=str(row["response2"]),
        label=labels[most] if count > 1 else "tie",
    )


def _read_list(path: Path) -> list[dict[str, Any]]:
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        rows = json.loads(data)
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{path} cannot be read ({error}); name a JSON file of gold pairs or verdicts") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise EvaluationError(f"{path} is no list of objects; name a JSON file of gold pairs or verdicts")
    return rows


def _distinct(pairs: Sequence[GoldPair], path: Path) -> list[GoldPair]:
    repeated = [name for name, count in Counter(pair.id for pair in pairs).items() if count > 1]
    if repeated:
        raise EvaluationError(f"{path}: the id {repeated[0]!r} stands twice; give each pair its own")
    return list(pairs)
