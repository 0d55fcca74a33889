"""Writes the report of a run: verdict first, then what it rests on, in one HTML file that needs nothing else.

Knows the shape of every stage's figures and how they are shown; decides and measures nothing.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from qlora_core.digest import digest_json
from qlora_core.report.answers import match_table, read_answers, sample_answers
from qlora_core.report.disagreements_page import disagreements_page
from qlora_core.report.figures import (
    counts_figure,
    curves_figure,
    funnel_figure,
    lengths_figure,
    lineage_figure,
    matches_figure,
    quantization_figure,
    sweep_figure,
)
from qlora_core.report.heat_map import heat_map
from qlora_core.report.page import embedded, template
from qlora_core.report.run_judging import read_judging

DISAGREEMENTS_PAGE = "disagreements.html"
SHOWN_DISAGREEMENTS = 3
SHOWN_ANSWERS = 12
SHOWN_QUARANTINED = 10
SHOWN_HITS = 20
OPEN_SAMPLES = 5
# Of a cluster's opening prompt, where curation recorded it.
SHOWN_CHARACTERS = 300

LEADS = {
    "PROMOTE": "The new adapter is better beyond chance. The gate lets it become champion; `qlora history` says "
    "whether and when it did.",
    "HOLD": "The evidence does not settle it; nothing is promoted until a person decides.",
    "REJECT": "The new adapter is worse, or breaks a guard; it is not promoted.",
    "INVALID": "The evidence cannot be used; no decision can rest on it.",
}


def write_report(
    out: Path,
    *,
    config: Mapping[str, Any],
    curation: Mapping[str, Any],
    quantization: Mapping[str, Any],
    quality: Mapping[str, Any] | None = None,
    sweep: Mapping[str, Any],
    evaluation: Mapping[str, Any],
    decision: Mapping[str, Any],
    lineage: Mapping[str, Any],
    curated_folder: Path,
    evaluation_folder: Path,
    findings: tuple[Sequence[str], Sequence[str]] | None = None,
    diagnosis: Mapping[str, Any] | None = None,
    comparison_folder: Path | None = None,
) -> None:
    """Write the HTML file `out` from the stages' JSON, their `lineage` graph and the tables in the two folders.

    Beside it goes `disagreements.html`, the page of the most telling ones; `out` shows the first few itself, so that it
    can be taken away alone. `comparison_folder` is where `compare_adapters` left the champion's answers.

    Equal inputs give equal bytes. Text from data is escaped everywhere. A judge or an exact match that is null is said
    to be missing, and why. `findings` are sentences on the data's drift and on weak slices, `diagnosis` the latter with
    examples; None leaves them out. `quality` is what `write_quality` measured, None where the job names no text for it.
    Raises EvaluationError where `answers.jsonl` cannot be read.
    """
    answers = read_answers(evaluation_folder)
    matches = match_table(answers, evaluation["metrics"]["heldout"]["confidence"])
    varied = _varied(sweep)
    judging = read_judging(
        evaluation,
        decision,
        answers,
        evaluation_folder,
        comparison_folder=comparison_folder,
        slices=config.get("gate", {}).get("slices"),
    )
    candidates = _several(evaluation.get("candidates") or [])
    page = template("report.html.jinja").render(
        config=config,
        config_yaml=yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True),
        config_digest=digest_json(dict(config)),
        curation=curation,
        quantization=quantization,
        quality=quality,
        sweep=sweep,
        varied=varied,
        candidates={found["trial"]: found for found in candidates},
        candidate_slices=_candidate_slices(candidates),
        evaluation=evaluation,
        heldout=evaluation["metrics"]["heldout"],
        exact=evaluation["metrics"]["exact_match"],
        judge=evaluation["metrics"]["judge"],
        decision=decision,
        judging={**judging, "heat_maps": [heat_map(table) for table in judging["heat_maps"]]},
        shown_disagreements=SHOWN_DISAGREEMENTS,
        findings=findings,
        diagnosis=diagnosis,
        lead=LEADS[decision["verdict"]],
        matches=matches,
        samples=sample_answers(answers, SHOWN_ANSWERS),
        answer_count=len(answers),
        quarantined=_quarantined(curated_folder),
        near_duplicates=_switched_on(curation, "near_duplicates"),
        contamination=_switched_on(curation, "contamination"),
        shown_hits=SHOWN_HITS,
        open_samples=OPEN_SAMPLES,
        shown_characters=SHOWN_CHARACTERS,
        lineage=_lineage_rows(lineage),
        figures=_figures(curation, quantization, sweep, varied, matches)
        | {"lineage": embedded(lineage_figure(lineage))},
    )
    out.write_text(page, encoding="utf-8", newline="\n")
    telling = disagreements_page(config["registry"]["model_name"], judging["disagreements"])
    out.with_name(DISAGREEMENTS_PAGE).write_text(telling, encoding="utf-8", newline="\n")


def _figures(
    curation: Mapping[str, Any],
    quantization: Mapping[str, Any],
    sweep: Mapping[str, Any],
    varied: Sequence[str],
    matches: Sequence[Mapping[str, Any]],
) -> dict[str, str | None]:
    """Each figure as the address of an embedded image, None where there is nothing to draw."""
    drawn = {
        "funnel": funnel_figure(_funnel_stages(curation)),
        "languages": counts_figure(curation.get("languages") or {}),
        "lengths": lengths_figure((curation.get("lengths") or {}).get("histogram", []), curation["max_tokens"]),
        "matches": matches_figure(matches) if matches else None,
        "sweep": sweep_figure(sweep["trials"], varied, sweep.get("best")),
        "curves": curves_figure(sweep["trials"]),
        "quantization": quantization_figure(quantization["layers"]),
    }
    return {name: embedded(svg) if svg else None for name, svg in drawn.items()}


def _lineage_rows(lineage: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The artifacts of a lineage graph, each with what it was made from."""
    nodes = {node["id"]: node for node in lineage["nodes"]}
    return [
        {
            **node,
            "inputs": [
                {"name": edge["name"], "digest": nodes[edge["from"]]["digest"]}
                for edge in lineage["edges"]
                if edge["to"] == node["id"]
            ],
        }
        for node in lineage["nodes"]
        if node["kind"] == "artifact"
    ]


def _funnel_stages(curation: Mapping[str, Any]) -> list[tuple[str, int]]:
    left = curation["rows"]["in"]
    stages = [("read", left)]
    steps = [("readable", curation["rows"]["quarantined"])]
    steps += [(f"without {rule.replace('_', '-')} rows", count) for rule, count in curation["reasons"].items()]
    for label, gone in steps:
        left -= gone
        stages.append((label, left))
    return [*stages, ("kept", curation["rows"]["kept"])]


def _switched_on(curation: Mapping[str, Any], part: str) -> Mapping[str, Any] | None:
    """What curation recorded of one of its optional parts; None where that was off."""
    found = curation.get(part)
    return None if not found or found.get("action") == "none" else found


def _varied(sweep: Mapping[str, Any]) -> list[str]:
    """The settings the sweep searched over; where it does not say, those that differ between its trials."""
    if sweep.get("varied"):
        return list(sweep["varied"])
    trials = [trial["params"] for trial in sweep["trials"]]
    names = dict.fromkeys(name for params in trials for name in params)
    return [name for name in names if len({repr(params.get(name)) for params in trials}) > 1]


def _several(candidates: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """The candidates where there are several; one alone is the adapter that the whole page is about."""
    return candidates if len(candidates) > 1 else []


def _candidate_slices(candidates: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each slice and candidate, those of one slice together in the candidates' order."""
    rows = [
        {"kind": kind, "label": label, "trial": found["trial"], **figures}
        for found in candidates
        for kind, part in found["slices"].items()
        for label, figures in part.items()
    ]
    return sorted(rows, key=lambda row: (row["kind"], row["label"]))


def _quarantined(curated_folder: Path) -> list[dict[str, Any]]:
    """The first quarantined rows, with file, line and reason; empty where there is none or no such table."""
    import pyarrow.parquet as pq

    path = curated_folder / "quarantine.parquet"
    return pq.read_table(path).slice(0, SHOWN_QUARANTINED).to_pylist() if path.is_file() else []
