"""Commands on registered adapters: promote, rollback."""

from typing import Annotated

import typer

from flows.cli.reporting import JsonOption, SetOption, reporting
from flows.cli.stages import ConfigArgument

NOT_PROMOTED = 3


def promote(
    config: ConfigArgument,
    version: Annotated[str | None, typer.Option(help="Registered version; default: the challenger.")] = None,
    overrides: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Decide again from the recorded evidence and, on PROMOTE, make the version champion. Exit code 3: not promoted.

    Examples:

      qlora promote pipeline.yaml

      qlora promote pipeline.yaml --version 3 --set gate.min_loss_gain=0.05
    """
    with reporting(json) as report:
        from qlora_core.config.load import load_config
        from qlora_core.registry.promotion import promote as promote_version

        loaded = load_config(config, overrides or ())
        outcome = promote_version(loaded.tracking_uri, loaded.registry.model_name, version=version, policy=loaded.gate)
        report.data = outcome
        report.say(f"verdict: {outcome['verdict']}; champion: {outcome['champion'] or 'none'}")
        for reason in outcome["reasons"]:
            report.say(f"  {reason}")
        report.exit_code = 0 if outcome["verdict"] == "PROMOTE" else NOT_PROMOTED


def rollback(
    config: ConfigArgument,
    to: Annotated[str | None, typer.Option("--to", help="An earlier champion; default: the one before.")] = None,
    reason: Annotated[str, typer.Option(help="Why; kept in the history.")] = "rolled back by hand",
    overrides: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Give the champion alias back to an earlier champion.

    Example:

      qlora rollback pipeline.yaml --reason "answers got longer"
    """
    with reporting(json) as report:
        from qlora_core.config.load import load_config
        from qlora_core.registry.promotion import rollback as roll_back

        loaded = load_config(config, overrides or ())
        outcome = roll_back(loaded.tracking_uri, loaded.registry.model_name, to=to, reason=reason)
        report.data = outcome
        report.say(f"champion: {outcome['champion']} (was {outcome['previous']})")
