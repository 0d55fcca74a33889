"""Commands over judgement files of any origin: tournament, agreement."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from flows.cli.reporting import JsonOption, reporting


class RatingMethod(StrEnum):
    """How verdicts become ratings."""

    ELO = "elo"
    BRADLEY_TERRY = "bradley-terry"


def tournament(
    verdicts: Annotated[Path, typer.Argument(help="Verdict rows, one JSON object a line.", show_default=False)],
    method: Annotated[RatingMethod, typer.Option(help="Rating model.")] = RatingMethod.BRADLEY_TERRY,
    seed: Annotated[int, typer.Option(help="Seed of match orders and resamples.")] = 0,
    json: JsonOption = False,
) -> None:
    """Ratings with intervals from pairwise verdicts; unscored rows are counted and never guessed.

    Example:

      qlora tournament verdicts.jsonl --method elo
    """
    with reporting(json) as report:
        from qlora_core.evaluation.tournament import rate
        from qlora_core.evaluation.verdict import read_verdicts

        rated = rate(read_verdicts(verdicts), method.value, seed=seed)
        report.data = rated
        for name, rating in sorted(rated["ratings"].items(), key=lambda item: -item[1]):
            low, high = rated["intervals"][name]
            report.say(f"{name:<32} {rating:8.1f}  [{low:.1f}, {high:.1f}]")
        effect = rated["order_effect"]
        shown = "not estimated" if effect is None else f"{effect:+.3f}"
        report.say(f"matches {rated['matches']}, unscored {rated['unscored']}, order effect {shown}")
        for warning in rated.get("warnings", []):
            report.say(f"warning: {warning}")


def agreement(
    labels: Annotated[Path, typer.Argument(help="Label rows, one JSON object a line.", show_default=False)],
    json: JsonOption = False,
) -> None:
    """Agreement between raters: raw, Cohen's and Fleiss' kappa, Krippendorff's alpha.

    Example:

      qlora agreement labels.jsonl --json
    """
    with reporting(json) as report:
        from qlora_core.evaluation.agreement import agreement as measure
        from qlora_core.evaluation.agreement import read_labels

        measured = measure(read_labels(labels))
        report.data = measured
        for name in ("raw", "cohen_kappa", "fleiss_kappa", "krippendorff_alpha"):
            value, reason = measured[name], measured.get("reasons", {}).get(name, "not defined here")
            report.say(f"{name:<20} {reason if value is None else f'{value:.4f}'}")
