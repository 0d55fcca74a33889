"""Commands that run the pipeline or a part of it: run, curate, sweep, evaluate."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.cli.reporting import JsonOption, Report, SetOption, reporting
from qlora_core.errors import ConfigError

if TYPE_CHECKING:
    from qlora_core.pipeline.pipeline import Pipeline

ConfigArgument = Annotated[Path, typer.Argument(help="The pipeline config, a YAML file.", show_default=False)]


def open_pipeline(config: Path, overrides: list[str] | None) -> "Pipeline":
    """The pipeline of a config file, what it reads from outside checked, so that a run does not find out at its end."""
    pipeline = load_pipeline(config, overrides)
    pipeline.job.check_inputs()
    return pipeline


def load_pipeline(config: Path, overrides: list[str] | None) -> "Pipeline":
    """The pipeline of a config file; nothing but the file is looked at."""
    from qlora_core.config.load import load_config
    from qlora_core.pipeline.pipeline import Pipeline

    return Pipeline(load_config(config, overrides or ()))


def run(
    config: ConfigArgument,
    overrides: SetOption = None,
    if_changed: Annotated[
        bool, typer.Option("--if-changed", help="Do nothing if data, base and settings are those of the last decision.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """The whole job: curate, quantize, sweep, evaluate, gate, register.

    Finished stages are taken from the store. Given again, the same command goes on where it was interrupted.

    Examples:

      qlora run pipeline.yaml

      qlora run pipeline.yaml --set train.learning_rate=1e-4 --json

      qlora run pipeline.yaml --if-changed
    """
    with reporting(json) as report:
        pipeline = load_pipeline(config, overrides)
        if if_changed and _say_unchanged(report, pipeline):
            return
        from qlora_core.pipeline.run_record import finished_before

        # Prefect's in-process API takes seconds to start, so it is left alone where nothing has to run.
        summary = finished_before(pipeline.job.config)
        if summary is None:
            pipeline.job.check_inputs()
            # Its own 20 s are too few for a first start, which migrates its database, on a small machine.
            os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "180")
            from flows.cli.temporary_server import start_temporary_server
            from flows.retrain import retrain

            start_temporary_server()
            summary = retrain(config=str(config.resolve()), overrides=overrides or [])
            assert isinstance(summary, dict)
        report.data = summary
        _say_summary(report, summary)


def _say_unchanged(report: Report, pipeline: "Pipeline") -> bool:
    """Report the last decision if there is nothing new since; else say what is new."""
    from qlora_core.pipeline.decided import check_inputs

    check = check_inputs(pipeline.job.config)
    if not check.unchanged:
        for change in check.changes:
            report.say(change)
        return False
    report.data = check.to_json()
    report.say("nothing new since the last decision: nothing to do")
    report.say(f"last decision: {report.data['verdict']} in run {report.data['run_id']}, {report.data['decided_at']}")
    return True


def _say_summary(report: Report, summary: dict[str, Any]) -> None:
    for stage in summary["stages"]:
        report.say(f"{stage['name']:<10} " + ("cached" if stage["cached"] else f"{stage['seconds']:.1f} s"))
    report.say("")
    for trial in summary["trials"]:
        report.say(_trial_line(trial, summary["best"], summary["varied"]))
    report.say("")
    for line in summary["headline"]:
        report.say(line)
    report.say(f"verdict: {summary['verdict']}")
    for reason in summary["reasons"]:
        report.say(f"  {reason}")
    report.say(f"model version: {summary['model_version']}")
    report.say(f"base: {summary['base']}")
    report.say(f"adapter: {summary['adapter']}")
    report.say(f"report: {summary['report']}")


def _trial_line(trial: dict[str, Any], best: str, varied: list[str]) -> str:
    params = " ".join(f"{name}={trial['params'][name]}" for name in varied)
    loss = "no loss" if trial["loss"] is None else f"loss {trial['loss']:.4f}"
    mark = "  <- best" if trial["id"] == best else ""
    error = f"  {trial['error']}" if trial["error"] else ""
    return f"{trial['id']} {trial['state']:<9} {loss} at step {trial['steps']}  {params}{mark}{error}"


def curate(
    config: Annotated[Path | None, typer.Argument(help="The pipeline config, a YAML file.", show_default=False)] = None,
    overrides: SetOption = None,
    diff: Annotated[
        tuple[Path, Path] | None,
        typer.Option("--diff", metavar="A B", help="Say what changed from curated folder A to B; takes no config."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Read, tag, de-duplicate, decontaminate, split and tokenize the data; nothing is trained.

    Examples:

      qlora curate pipeline.yaml --json

      qlora curate pipeline.yaml --set data.policy.licence=commercial

      qlora curate --diff OLD_PATH NEW_PATH
    """
    with reporting(json) as report:
        if (config is None) == (diff is None):
            raise ConfigError("qlora curate takes a config, or --diff with two curated folders, and not both")
        if diff is not None:
            from qlora_core.data.diff import diff_curated

            changes = diff_curated(*diff)
            report.data = changes.to_json()
            report.say(changes.text())
            return
        assert config is not None
        pipeline = open_pipeline(config, overrides)
        result = pipeline.run("curate")
        curation = pipeline.document("curate", "curation.json")
        report.data = {
            "rows": curation["rows"],
            "splits": curation["splits"],
            "digest": curation["digest"],
            "path": str(result.artifact.path),
        }
        _say_funnel(report, curation)
        report.say(f"path: {result.artifact.path}")


def _say_funnel(report: Report, curation: dict[str, Any]) -> None:
    report.say(f"{'source':<40} {'in':>8} {'kept':>8} {'dropped':>8} {'quarantined':>11}")
    for source, counts in [*curation["by_source"].items(), ("all", curation["rows"])]:
        cells = (counts[name] for name in ("in", "kept", "dropped", "quarantined"))
        report.say(f"{source:<40} " + " ".join(f"{cell:>8}" for cell in cells))
        if counts.get("rule"):
            found = ", ".join(f"{name} {count}" for name, count in counts["rule_counts"].items())
            report.say(f"  {counts['rule']}: {found}")
    for name in ("reasons", "quarantine_reasons"):
        what = "dropped" if name == "reasons" else "quarantined"
        for rule, count in sorted(curation[name].items()):
            report.say(f"  {what}, {rule}: {count}")
    report.say("splits: " + ", ".join(f"{name} {count}" for name, count in curation["splits"].items()))


def sweep(
    config: ConfigArgument,
    overrides: SetOption = None,
    status: Annotated[bool, typer.Option("--status", help="Say where the sweep stands; nothing is run.")] = False,
    json: JsonOption = False,
) -> None:
    """Train the trials of the sweep, after whatever they need, and keep the best adapter.

    Examples:

      qlora sweep pipeline.yaml

      qlora sweep pipeline.yaml --set sweep.method=random --set sweep.trials=16

      qlora sweep pipeline.yaml --status --json
    """
    with reporting(json) as report:
        from qlora_core.pipeline.run_record import trial_rows

        if status:
            _say_status(report, load_pipeline(config, overrides))
            return
        pipeline = open_pipeline(config, overrides)
        result = pipeline.run("sweep")
        swept = pipeline.document("sweep", "sweep.json")
        rows = trial_rows(swept)
        report.data = {"trials": rows, "best": swept["best"], "adapter": str(result.artifact.path / "adapter")}
        for row in rows:
            report.say(_trial_line(row, swept["best"], swept["varied"]))
        if swept.get("cost"):
            from qlora_core.sweep.cost import cost_line

            report.data["cost"] = swept["cost"]
            report.say(cost_line(swept["cost"]["predicted"], swept["cost"]["actual"]))
        report.say(f"adapter: {result.artifact.path / 'adapter'}")


def _say_status(report: Report, pipeline: "Pipeline") -> None:
    from qlora_core.pipeline.sweep_status import status_of

    report.data = status_of(pipeline)
    counts = ", ".join(f"{count} {state}" for state, count in report.data["counts"].items())
    report.say(f"sweep: {report.data['state']}" + (f"; {counts}" if counts else ""))
    varied = sorted(pipeline.job.config.sweep.space)
    for trial in report.data["trials"]:
        where = f"  on {trial['worker']}" if trial.get("worker") and trial["state"] == "waiting" else ""
        report.say(_trial_line(trial, report.data["best"] or "", [n for n in varied if n in trial["params"]]) + where)


def evaluate(config: ConfigArgument, overrides: SetOption = None, json: JsonOption = False) -> None:
    """Measure the best adapter against the base on held-out rows, and say what the gate would decide.

    Example:

      qlora evaluate pipeline.yaml --set evaluate.judge.kind=none
    """
    with reporting(json) as report:
        from qlora_core.pipeline.promotion import Promotion
        from qlora_core.pipeline.run_record import headline

        pipeline = open_pipeline(config, overrides)
        pipeline.run("evaluate")
        evaluation = pipeline.document("evaluate", "evaluation.json")
        gate = Promotion(pipeline).gate()
        report.data = {
            "metrics": evaluation["metrics"],
            "ratings": evaluation["ratings"],
            "candidates": evaluation["candidates"],
            "verdict": gate.decision["verdict"],
            "report": str(gate.report),
        }
        for line in [*headline(evaluation), f"verdict: {gate.decision['verdict']}", *gate.decision["reasons"]]:
            report.say(line)
        report.say(f"report: {gate.report}")
