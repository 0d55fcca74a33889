"""The `qlora` program: its commands and where they are defined. Each command imports what it needs when it runs."""

import typer

from flows.cli import adapters, checks, models, ratings, stages

app = typer.Typer(
    name="qlora",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Retrain a language model with QLoRA and ship the adapter only when it is provably better.\n\n"
    "Start with: qlora init demo && qlora run demo/pipeline.yaml",
)

app.command()(checks.init)
app.command()(checks.doctor)
app.command()(checks.plan)
app.command()(stages.run)
app.command()(stages.curate)
app.command()(stages.sweep)
app.command()(stages.evaluate)
app.command()(models.quantize)
app.command()(models.perplexity)
app.command()(ratings.tournament)
app.command()(ratings.agreement)
app.command()(adapters.promote)
app.command()(adapters.rollback)


def main() -> None:
    """Entry point of the `qlora` script."""
    app()
