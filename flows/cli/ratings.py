"""Commands over judgement files of any origin: tournament, agreement."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.cli.reporting import JsonOption, Report, SetOption, reporting

if TYPE_CHECKING:
    from qlora_core.evaluation.verdict import Verdict


class RatingMethod(StrEnum):
    """How verdicts become ratings."""

    ELO = "elo"
    BRADLEY_TERRY = "bradley-terry"


def tournament(
    verdicts: Annotated[
        Path,
        typer.Argument(help="Verdict rows, one JSON object a line; with --judge, where they go.", show_default=False),
    ],
    method: Annotated[RatingMethod, typer.Option(help="Rating model.")] = RatingMethod.BRADLEY_TERRY,
    seed: Annotated[int, typer.Option(help="Seed of match orders and resamples, and of the prompts' order.")] = 0,
    judge: Annotated[
        Path | None,
        typer.Option(help="Play first: the pipeline config whose evaluate.judge decides.", show_default=False),
    ] = None,
    answers: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]PATH",
            help="Answers: a file, pairs, or an evaluation's folder; repeat. To play without: the config's own.",
            show_default=False,
        ),
    ] = None,
    round_robin: Annotated[
        bool, typer.Option("--round-robin", help="Play all pairs in turn, not the leader and its nearest rival.")
    ] = False,
    page: Annotated[
        Path | None, typer.Option("--report", help="Write the HTML page of the tournament here.", show_default=False)
    ] = None,
    certificate: Annotated[
        Path | None, typer.Option(help="The judge's certificate, for the page.", show_default=False)
    ] = None,
    overrides: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Ratings with intervals from pairwise verdicts; unscored rows are counted and never guessed.

    With --judge the matches are played first: pairs are chosen so that the leader is known with fewest calls, each is
    judged in both orders, and an interrupted tournament goes on without paying twice.

    A row: {"prompt_id": "7", "model_a": "old", "model_b": "new", "verdict": "b", "first": "a", "judge": "me"}

    Example:

      qlora tournament verdicts.jsonl --method elo

      qlora tournament verdicts.jsonl --judge pipeline.yaml --answers old=old.jsonl --answers new=new.jsonl
    """
    with reporting(json) as report:
        from qlora_core.evaluation.tournament import rate
        from qlora_core.evaluation.verdict import read_verdicts

        played = None
        if judge is not None:
            played = _play(judge, overrides, answers, verdicts, seed=seed, adaptive=not round_robin)
        rows = read_verdicts(verdicts)
        rated = rate(rows, method.value, seed=seed)
        report.data = rated if played is None else {**rated, "played": played}
        if page is not None:
            report.data = {**report.data, "report": str(page)}
            _write_page(page, rated, rows, judge, overrides, answers, certificate)
        _say(report, rated, played, page)


def _play(
    config: Path, overrides: list[str] | None, answers: list[str] | None, out: Path, *, seed: int, adaptive: bool
) -> dict[str, Any]:
    from flows.cli.stages import load_pipeline, open_pipeline
    from qlora_core.pipeline.tournament import play_from_config

    pipeline = load_pipeline(config, overrides) if answers else open_pipeline(config, overrides)
    played, book, facts = play_from_config(pipeline, answers or [], out, seed=seed, adaptive=adaptive)
    now = played.standing
    return {
        "models": sorted(book.answers),
        "prompts": len(book.common),
        "verdicts": played.calls,
        "ended": played.ended,
        "leader": None if now is None else now.leader,
        "settled": now is not None and now.settled,
        "judge": facts,
    }


def _write_page(
    page: Path,
    rated: dict[str, Any],
    rows: "list[Verdict]",
    config: Path | None,
    overrides: list[str] | None,
    answers: list[str] | None,
    certificate: Path | None,
) -> None:
    from qlora_core.evaluation.answer_book import read_answer_book
    from qlora_core.evaluation.judge.certificate import read_certificate
    from qlora_core.evaluation.tournament_summary import summarise_tournament
    from qlora_core.report.tournament_page import tournament_page

    if answers or config is None:
        book = read_answer_book(answers or [])
    else:
        from flows.cli.stages import load_pipeline
        from qlora_core.pipeline.tournament import answers_of

        book = answers_of(load_pipeline(config, overrides))
    given = None if certificate is None else read_certificate(certificate)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(tournament_page(summarise_tournament(rated, rows, book, given)), encoding="utf-8", newline="\n")


def _say(report: Report, rated: dict[str, Any], played: dict[str, Any] | None, page: Path | None) -> None:
    for name, rating in sorted(rated["ratings"].items(), key=lambda item: -item[1]):
        low, high = rated["intervals"][name]
        report.say(f"{name:<32} {rating:8.1f}  [{low:.1f}, {high:.1f}]")
    effect = rated["order_effect"]
    shown = "not estimated" if effect is None else f"{effect:+.3f}"
    report.say(f"matches {rated['matches']}, unscored {rated['unscored']}, order effect {shown}")
    if played is not None:
        leads = "no leader is settled" if not played["settled"] else f"{played['leader']} leads"
        cost = f"{played['judge']['cost_usd']:.4f} USD"
        certified = "" if played["judge"]["certified"] else ", uncertified judge"
        report.say(f"played {played['verdicts']} verdicts for {cost}{certified}; ended: {played['ended']}; {leads}")
    if page is not None:
        report.say(f"report: {page}")
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
        from qlora_core.evaluation.statistics.agreement import agreement as measure
        from qlora_core.evaluation.statistics.agreement import read_labels

        measured = measure(read_labels(labels))
        report.data = measured
        for name in ("raw", "cohen_kappa", "fleiss_kappa", "krippendorff_alpha"):
            value, reason = measured[name], measured.get("reasons", {}).get(name, "not defined here")
            report.say(f"{name:<20} {reason if value is None else f'{value:.4f}'}")
