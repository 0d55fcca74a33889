"""The `qlora` program: its commands and where they are defined. Each command imports what it needs when it runs."""

import json
import sys
from importlib.metadata import version
from typing import Annotated

import typer
from typer.exceptions import TyperException

from flows.cli import (
    adapter_folders,
    adapters,
    benchmark,
    champions,
    checks,
    gate,
    judge,
    models,
    ratings,
    serve,
    stages,
    store,
    vote,
)

app = typer.Typer(
    name="qlora",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Retrain a language model with QLoRA and ship the adapter only when it is provably better.\n\n"
    "Start with: qlora init demo && qlora run demo/pipeline.yaml",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"qlora-fleet {version('qlora-fleet')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


app.command()(checks.init)
app.command()(checks.doctor)
app.command()(checks.plan)
app.command()(stages.run)
app.command()(stages.curate)
app.command()(stages.sweep)
app.command()(stages.evaluate)
app.command()(models.quantize)
app.command()(models.perplexity)
app.command()(benchmark.benchmark)
app.command()(ratings.tournament)
app.command()(ratings.agreement)
app.command()(gate.gate)
app.command()(champions.promote)
app.command()(champions.rollback)
app.command()(gate.history)
app.command()(adapters.compose)
app.command()(adapters.merge)
app.command()(serve.serve)
app.command()(serve.chat)
app.add_typer(adapter_folders.app, name="adapter")
app.add_typer(store.app, name="store")
app.add_typer(judge.app, name="judge")
app.add_typer(vote.app, name="vote")


def main() -> None:
    """Entry point of the `qlora` script. A wrong call, too, leaves one object on standard output with `--json`."""
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except TyperException as error:
        show = getattr(error, "show", None)  # a usage error knows how to show the command it is about
        typer.echo(f"error: {error}", err=True) if show is None else show()
        if "--json" in sys.argv:
            typer.echo(json.dumps({"error": {"type": "UsageError", "message": str(error)}}))
        sys.exit(2)
