"""Commands before a run: init writes a config, doctor checks the machine, plan says what would happen."""

from pathlib import Path
from typing import Annotated

import typer

from flows.cli.reporting import JsonOption, SetOption, reporting
from flows.cli.stages import ConfigArgument, open_pipeline


def init(
    folder: Annotated[Path, typer.Argument(help="Folder to write to; made if missing.")] = Path(),
    if_missing: Annotated[bool, typer.Option("--if-missing", help="Do nothing where a pipeline.yaml is.")] = False,
    json: JsonOption = False,
) -> None:
    """Write a commented pipeline.yaml that runs as is, with generated example data beside it.

    Example:

      qlora init demo && qlora run demo/pipeline.yaml
    """
    with reporting(json) as report:
        from qlora_core.demo.starter import write_starter

        config, written = write_starter(folder, keep_existing=if_missing)
        report.data = {"config": str(config)}
        report.say(f"{'wrote' if written else 'kept'} {config}")
        report.say(f"next: qlora run {config}")


def doctor(
    config: Annotated[Path | None, typer.Argument(help="Check what this config needs; default: the defaults.")] = None,
    json: JsonOption = False,
) -> None:
    """Check device, precision, bitsandbytes, Ray, store, MLflow, Prefect and judge, and say how to mend what is wrong.

    Example:

      qlora doctor pipeline.yaml
    """
    with reporting(json) as report:
        from flows.cli.doctor import examine

        checks = examine(config)
        report.data = {"ok": all(check.ok for check in checks), "checks": [check.row() for check in checks]}
        for check in checks:
            report.say(f"{'ok  ' if check.ok else 'FAIL'} {check.name:<14} {check.found}")
            if not check.ok:
                report.say(f"     mend: {check.mend}")
        report.exit_code = 0 if report.data["ok"] else 1


def plan(config: ConfigArgument, overrides: SetOption = None, json: JsonOption = False) -> None:
    """What would run and what is cached, the sweep's trials, time and price, the memory it needs, what the judge costs.

    Example:

      qlora plan pipeline.yaml
    """
    with reporting(json) as report:
        from flows.cli.memory_table import memory_lines
        from qlora_core.pipeline.estimate import estimate_judge, estimate_memory, planned_trials
        from qlora_core.pipeline.sweep_estimate import estimate_sweep, sweep_lines

        pipeline = open_pipeline(config, overrides)
        stages = [stage.row() for stage in pipeline.plan()]
        memory = estimate_memory(pipeline)
        trials = planned_trials(pipeline.job.config)
        evaluated = any(stage["name"] == "evaluate" and stage["cached"] for stage in stages)
        evaluated &= pipeline.job.config.gate.primary.metric != "judge"  # else the gate may ask it about the champion
        judge = estimate_judge(pipeline.job.config, evaluated=evaluated)
        sweep = estimate_sweep(pipeline)
        report.data = {"stages": stages, "memory": memory, "trials": trials, "sweep": sweep, "judge": judge}
        for stage in stages:
            report.say(f"{stage['name']:<10} {'cached' if stage['cached'] else 'would run'}")
        report.say("gate and register come last: they depend on the champion at that time")
        report.say(f"trials: {len(trials)}" + "".join(f"\n  {trial}" for trial in trials))
        for line in [*sweep_lines(sweep), *memory_lines(memory)]:
            report.say(line)
        report.say(f"judge: {judge['kind']}, at most {judge['calls']} calls, about {judge['cost_usd']:.2f} USD")
