"""The candidates of a sweep side by side: each against the base on the same test rows and prompts, whole and by slice.

Knows losses and answers, not models. Chooses nothing: the candidate that looks best on the test rows is not the best by
as much as it looks, since the highest of several noisy figures is too high on average.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from qlora_core.config.evaluate import EvaluateConfig
from qlora_core.data.dataset import PromptRow, RowLabels
from qlora_core.evaluation.exact_match import compare_matches, matches
from qlora_core.evaluation.heldout import RowLoss, compare_losses

LEAST_ROWS = 2
"""Of a slice; an interval needs two."""


class Scored(NamedTuple):
    """What one system made of the test split: a loss for each row, an answer to each prompt."""

    losses: Sequence[RowLoss]
    answers: Sequence[str]


class Candidate(NamedTuple):
    """One trial's adapter, by the digest of its files, and its scores."""

    trial: str
    adapter_digest: str
    scored: Scored


def record_candidates(
    out: Path,
    config: EvaluateConfig,
    labels: Mapping[str, RowLabels],
    prompts: Sequence[PromptRow],
    scored: Sequence[Scored],
    trials: Sequence[tuple[str, str]],
) -> list[dict[str, Any]]:
    """What `compare_candidates` gives; where there are several, `write_candidates` into `out` too.

    `scored` is of the base and then of each of `trials`, which are ids with the adapters' digests. Without trials: [].
    """
    if not trials:
        return []
    base, *others = scored
    found = [Candidate(trial, digest, own) for (trial, digest), own in zip(trials, others, strict=True)]
    if len(found) > 1:
        write_candidates(out, config, prompts, found)
    return compare_candidates(config, labels, prompts, base, found)


def compare_candidates(
    config: EvaluateConfig,
    labels: Mapping[str, RowLabels],
    prompts: Sequence[PromptRow],
    base: Scored,
    candidates: Sequence[Candidate],
) -> list[dict[str, Any]]:
    """One entry for each candidate, in the given order; empty for none.

    Keys: trial, adapter_digest, `heldout` (see `compare_losses`), `exact_match` (see `compare_matches`) and `slices`:
    {"category": {label: {"rows", "heldout", "exact_match"}}, "language": the same}. A slice has the rows and prompts
    with that label; `heldout` is None under two rows or without a trained token, `exact_match` where no prompt has a
    comparable reference. Each interval stands for itself: none is widened for the number of candidates or slices.
    Raises EvaluationError where a loss is not finite.
    """
    places = _slices(labels, base.losses, prompts)
    return [
        {
            "trial": candidate.trial,
            "adapter_digest": candidate.adapter_digest,
            **_compare(config, prompts, base, candidate.scored),
            "slices": {
                kind: {label: _slice(config, prompts, base, candidate.scored, *found) for label, found in part.items()}
                for kind, part in places.items()
            },
        }
        for candidate in candidates
    ]


def write_candidates(
    out: Path, config: EvaluateConfig, prompts: Sequence[PromptRow], candidates: Sequence[Candidate]
) -> None:
    """Fill `candidate_rows.parquet` (trial, id, tokens, nats) and `candidate_answers.jsonl` (prompt_id, trial, answer,
    matches), a line for each candidate and row or prompt."""
    rows = [(candidate.trial, row) for candidate in candidates for row in candidate.scored.losses]
    columns = {
        "trial": [trial for trial, _ in rows],
        "id": [row.id for _, row in rows],
        "tokens": [row.tokens for _, row in rows],
        "nats": [row.nats for _, row in rows],
    }
    pq.write_table(pa.table(columns), out / "candidate_rows.parquet")
    with (out / "candidate_answers.jsonl").open("w", encoding="utf-8", newline="\n") as stream:
        for candidate in candidates:
            for row, answer in zip(prompts, candidate.scored.answers, strict=True):
                hit = matches(answer, row.reference, config.exact_match_max_words)
                record = {"prompt_id": row.id, "trial": candidate.trial, "answer": answer, "matches": hit}
                stream.write(json.dumps(record, ensure_ascii=False) + "\n")


def _slices(
    labels: Mapping[str, RowLabels], rows: Sequence[RowLoss], prompts: Sequence[PromptRow]
) -> dict[str, dict[str, tuple[list[int], list[int]]]]:
    """By kind and label the places of its rows and of its prompts; rows without a label are in no slice."""
    found: dict[str, dict[str, tuple[list[int], list[int]]]] = {}
    for kind in RowLabels._fields:
        part: dict[str, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
        for which, ids in enumerate(([row.id for row in rows], [row.id for row in prompts])):
            for place, one in enumerate(ids):
                label = getattr(labels[one], kind) if one in labels else None
                if label is not None:
                    part[label][which].append(place)
        found[kind] = dict(sorted(part.items()))
    return found


def _slice(
    config: EvaluateConfig,
    prompts: Sequence[PromptRow],
    base: Scored,
    candidate: Scored,
    rows: Sequence[int],
    asked: Sequence[int],
) -> dict[str, Any]:
    within = [
        Scored([scored.losses[place] for place in rows], [scored.answers[place] for place in asked])
        for scored in (base, candidate)
    ]
    return {"rows": len(rows), **_compare(config, [prompts[place] for place in asked], *within)}


def _compare(config: EvaluateConfig, prompts: Sequence[PromptRow], base: Scored, candidate: Scored) -> dict[str, Any]:
    sampling: dict[str, Any] = {
        "confidence": config.confidence,
        "resamples": config.resamples,
        "seed": config.seed,
    }
    can_compare = len(base.losses) >= LEAST_ROWS and any(row.tokens for row in base.losses)
    return {
        "heldout": compare_losses(base.losses, candidate.losses, **sampling) if can_compare else None,
        "exact_match": compare_matches(
            _hits(config, prompts, base.answers), _hits(config, prompts, candidate.answers), **sampling
        ),
    }


def _hits(config: EvaluateConfig, prompts: Sequence[PromptRow], answers: Sequence[str]) -> list[bool | None]:
    return [
        matches(answer, row.reference, config.exact_match_max_words)
        for answer, row in zip(answers, prompts, strict=True)
    ]
