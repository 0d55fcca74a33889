"""Commands of the blind side-by-side page for human raters: serve, export, import."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from flows.cli.reporting import JsonOption, Report, reporting

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Let people compare answers blind, and take their votes away.\n\n"
    "Examples:\n\n  qlora vote serve pairs.jsonl --rater ann --rater ben\n\n  qlora vote export votes",
)

StudyOption = Annotated[Path, typer.Option(help="The study's file: pairs and votes, SQLite.")]
DEFAULT_STUDY = Path("votes.sqlite")


@app.command("serve")
def serve(
    pairs: Annotated[
        Path | None,
        typer.Argument(
            help="Pairs, one JSON object a line, or an evaluation's folder; not needed to go on with a study.",
            show_default=False,
        ),
    ] = None,
    study: StudyOption = DEFAULT_STUDY,
    rater: Annotated[list[str] | None, typer.Option(help="A rater to make a link for; repeat for more.")] = None,
    raters_per_item: Annotated[int | None, typer.Option(min=1, help="Raters per pair (3).", show_default=False)] = None,
    repeat_share: Annotated[
        float | None, typer.Option(min=0, max=0.5, help="Share of hidden repeats (0.1).", show_default=False)
    ] = None,
    self_share: Annotated[
        float | None, typer.Option(min=0, max=0.5, help="Share of self-pairs (0.05).", show_default=False)
    ] = None,
    judge: Annotated[
        Path | None, typer.Option(help="A judge's verdict rows, to set beside the votes.", show_default=False)
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; beyond loopback needs QLORA_VOTE_SECRET.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8799,
    public_url: Annotated[
        str | None, typer.Option(help="Where raters reach the page, behind a proxy.", show_default=False)
    ] = None,
    link_days: Annotated[float, typer.Option(min=0.001, help="Days until the links expire.")] = 14.0,
    json: JsonOption = False,
) -> None:
    """Serve the page until interrupted. Votes are kept at once; the same command goes on with the study.

    Example:

      qlora vote serve pairs.jsonl --rater ann --rater ben
    """
    with reporting(json) as report:
        from qlora_core.evaluation.verdict import read_verdicts
        from qlora_core.evaluation.vote.server import open_server, open_study

        settings = {"raters_per_item": raters_per_item, "repeat_share": repeat_share, "self_share": self_share}
        box = open_study(study, pairs, settings)
        server = open_server(
            box,
            raters=rater or [],
            host=host,
            port=port,
            link_days=link_days,
            environment=os.environ,
            public_url=public_url,
            judge=read_verdicts(judge) if judge is not None else [],
        )
        _describe(report, study, box, server)
    try:
        server.run()
    except KeyboardInterrupt:
        typer.echo(f"stopped; every vote is in {study}, and the same command goes on", err=True)


@app.command("export")
def export(
    out: Annotated[Path, typer.Argument(help="Folder for the files.", show_default=False)],
    study: StudyOption = DEFAULT_STUDY,
    json: JsonOption = False,
) -> None:
    """Write the votes as verdict rows, label rows, JSON Lines, CSV and Label Studio's JSON; while serving, too.

    Example:

      qlora vote export votes && qlora tournament votes/verdicts.jsonl && qlora agreement votes/labels.jsonl
    """
    with reporting(json) as report:
        from qlora_core.evaluation.vote.ballots import BallotBox
        from qlora_core.evaluation.vote.export import write_export
        from qlora_core.evaluation.vote.quality import rater_quality
        from qlora_core.evaluation.vote.records import counted, vote_records

        box = BallotBox(study)
        with box.state() as state:
            records = vote_records(state, box.pairs)
        files = write_export(out, records, box.pairs)
        votes = len(counted(records))
        sideless = sum(record.first is None for record in counted(records))
        report.data = {
            "votes": votes,
            "decisions": len(records),
            "without_side": sideless,
            "raters": rater_quality(records),
            "files": [str(path) for path in files],
        }
        report.say(f"{votes} votes by {len(report.data['raters'])} rater(s) in {', '.join(map(str, files))}")
        if sideless:
            report.say(f"{sideless} imported votes do not say which answer was first and are not in verdicts.jsonl")


@app.command("import")
def import_votes(
    votes: Annotated[
        Path, typer.Argument(help="JSON Lines, CSV or Label Studio's JSON export of votes.", show_default=False)
    ],
    study: StudyOption = DEFAULT_STUDY,
    json: JsonOption = False,
) -> None:
    """Add votes cast elsewhere to a study, by its pairs. Importing a file twice changes nothing.

    Example:

      qlora vote import project-3.json --study votes.sqlite
    """
    with reporting(json) as report:
        from qlora_core.evaluation.vote.ballots import BallotBox
        from qlora_core.evaluation.vote.imports import read_votes

        box = BallotBox(study)
        plan = read_votes(votes, box.pairs)
        added = box.take_import(plan.votes)
        report.data = {"votes": added, "known": len(plan.votes) - added, "skipped": plan.skipped}
        report.say(f"{added} votes added, {len(plan.votes) - added} known before, {plan.skipped} rows without a vote")


def _describe(report: Report, study: Path, box: Any, server: Any) -> None:
    from qlora_core.evaluation.vote.pairs import named_answers

    telling = named_answers(list(box.pairs.values()))
    report.data = {
        "url": next(iter(server.links.values())),
        "links": dict(server.links),
        "results": server.results,
        "study": str(study),
        "items": len(box.pairs),
        "texts_naming_a_model": telling,
    }
    for name, link in server.links.items():
        report.say(f"{name}: {link}")
    report.say(f"results, for you alone: {server.results}")
    report.say(f"{len(box.pairs)} pairs in {study}; stop with Ctrl-C")
    if telling:
        typer.echo(
            f"warning: {telling} pair(s) hold a compared model's name in the prompt or an answer; raters will read it",
            err=True,
        )
