"""Commands that move the champion: promote, with or without a person's decision, and rollback."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.cli.reporting import JsonOption, Report, SetOption, reporting
from flows.cli.stages import ConfigArgument
from qlora_core.errors import ConfigError

if TYPE_CHECKING:
    from qlora_core.config.pipeline import PipelineConfig

NOT_PROMOTED = 3


def promote(
    config: ConfigArgument,
    version: Annotated[
        str | None, typer.Option(help="Registered version; default: the challenger, or the candidate that waits.")
    ] = None,
    approve: Annotated[bool, typer.Option("--approve", help="Say yes to a version that waits for a person.")] = False,
    decline: Annotated[bool, typer.Option("--decline", help="Say no to it.")] = False,
    by: Annotated[str | None, typer.Option("--by", help="Who decides; kept in the history.")] = None,
    reason: Annotated[str | None, typer.Option("--reason", help="Why; kept in the history.")] = None,
    overrides: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Decide again from the recorded evidence and, on PROMOTE, make the version champion. Exit code 3: not promoted.

    Under gate.approve: manual a person decides with --approve or --decline; a run that waits for it goes on.

    Examples:

      qlora promote pipeline.yaml

      qlora promote pipeline.yaml --version 3 --set gate.min_loss_gain=0.05

      qlora promote pipeline.yaml --approve --by ada --reason "read 40 answers"
    """
    with reporting(json) as report:
        from qlora_core.config.load import load_config

        _check_options(approve, decline, by, reason)
        loaded = load_config(config, overrides or ())
        if approve or decline:
            outcome = _answer(report, loaded, version, "approve" if approve else "decline", by or "", reason or "")
        else:
            outcome = _decide_again(loaded, version)
        report.data = outcome
        report.say(f"verdict: {outcome['verdict']}; champion: {outcome['champion'] or 'none'}")
        for line in outcome["reasons"]:
            report.say(f"  {line}")
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
        from qlora_core.pipeline.champion_lease import champion_lease
        from qlora_core.registry.promotion import rollback as roll_back

        loaded = load_config(config, overrides or ())
        with champion_lease(loaded):
            outcome = roll_back(loaded.tracking_uri, loaded.registry.model_name, to=to, reason=reason)
        report.data = outcome
        report.say(f"champion: {outcome['champion']} (was {outcome['previous']})")


def _check_options(approve: bool, decline: bool, by: str | None, reason: str | None) -> None:
    if approve and decline:
        raise ConfigError("--approve and --decline are opposites; give one of them")
    if (approve or decline) and not (by and reason):
        raise ConfigError("--approve and --decline need --by WHO and --reason WHY, for the record")
    if not (approve or decline) and (by or reason):
        raise ConfigError("--by and --reason belong to --approve or --decline; give one of them, or leave these out")


def _decide_again(config: "PipelineConfig", version: str | None) -> dict[str, Any]:
    from qlora_core.pipeline.champion_lease import champion_lease
    from qlora_core.registry.promotion import promote as promote_version

    with champion_lease(config):
        return promote_version(config.tracking_uri, config.registry.model_name, version=version, policy=config.gate)


def _answer(
    report: Report, config: "PipelineConfig", version: str | None, choice: Any, by: str, reason: str
) -> dict[str, Any]:
    from qlora_core.pipeline.champion_lease import champion_lease
    from qlora_core.registry.approval import answer, approval_of

    where = (config.tracking_uri, config.registry.model_name)
    with champion_lease(config):
        number, approval = approval_of(*where, version)
        outcome = answer(*where, choice, by=by, why=reason, version=number, policy=config.gate)
    if approval.flow_run is not None and outcome["approval"] != "waiting":
        _wake(report, approval.flow_run, {"decision": choice, "by": by, "why": reason})
    return outcome


def _wake(report: Report, flow_run: str, decision: Mapping[str, str]) -> None:
    """Let the flow run that waits for this decision go on. The decision stands whether it can be reached or not."""
    if not os.environ.get("PREFECT_API_URL"):
        report.say(f"flow run {flow_run} still waits; with PREFECT_API_URL set, this command wakes it")
        return
    from tasks.ask_approval import wake

    problem = wake(flow_run, decision)
    report.say(f"flow run {flow_run} goes on" if problem is None else f"flow run {flow_run} was not woken: {problem}")
