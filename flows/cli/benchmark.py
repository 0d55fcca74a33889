"""The benchmark command: tasks of lm-evaluation-harness on a base and its adapters."""

import os
from pathlib import Path
from typing import Annotated

import typer

from flows.cli.reporting import JsonOption, reporting

OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
NAMED = "NAME=PATH"


def benchmark(
    base: Annotated[Path, typer.Argument(help="A checkpoint folder, 4-bit or not.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="Where results.json and each item's values go.", show_default=False)],
    adapter: Annotated[
        list[str] | None, typer.Option("--adapter", metavar=NAMED, help="A PEFT folder and its name; may be repeated.")
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option("--task", help="A task of the harness or of --include-path; may be repeated.")
    ] = None,
    questions: Annotated[
        list[str] | None,
        typer.Option("--questions", metavar=NAMED, help="Lettered questions (MMLU's form) as a task of that name."),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="A folder of your own task files.", show_default=False)
    ] = None,
    examples: Annotated[int | None, typer.Option(help="Worked examples before each item.", show_default=False)] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first items of each task.", show_default=False)] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask through the tokenizer's chat template.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Requests scored at once.")] = 8,
    json: JsonOption = False,
) -> None:
    """Score a base and its adapters on tasks of lm-evaluation-harness, and compare each adapter with the base in pairs.

    The base is loaded once. Needs the extra qlora-fleet[benchmarks]. No hub is asked unless HF_HUB_OFFLINE=0 and
    HF_DATASETS_OFFLINE=0 are set: name local files, or fetch a task's data beforehand.

    Examples:

      qlora benchmark models/base-nf4 out/mmlu --questions mmlu=mmlu_val.json --adapter tuned=out/adapter

      qlora benchmark models/base-nf4 out/own --task my_task --include-path tasks --limit 200
    """
    with reporting(json) as report:
        for name in OFFLINE:  # read by the libraries when they are first imported
            os.environ.setdefault(name, "1")
        from qlora_core.evaluation.harness.run import Settings, run_benchmarks

        settings = Settings(
            tasks=task or [],
            choice_files=_paths(questions, "--questions"),
            include=include_path,
            examples=examples,
            limit=limit,
            chat=chat,
            batch_size=batch_size,
        )
        found = run_benchmarks(base, _paths(adapter, "--adapter"), settings, out)
        report.data = {**found, "out": str(out)}
        for system, tasks in found["results"].items():
            for name, metrics in tasks.items():
                told = "  ".join(f"{metric} {value:.4f}" for metric, value in metrics.items())
                report.say(f"{system:<16} {name:<24} {told}")
        for name, compared in found["comparisons"].items():
            for system, difference in compared.items():
                report.say(
                    f"{system} minus base on {name}: {difference['difference']:+.4f} "
                    f"({difference['low']:+.4f} to {difference['high']:+.4f}, {difference['prompts']} items)"
                )
        report.say(f"every item's values: {out}")


def _paths(given: list[str] | None, option: str) -> dict[str, Path]:
    from qlora_core.errors import ConfigError

    paths: dict[str, Path] = {}
    for text in given or []:
        name, found, path = text.partition("=")
        if not (name and found and path):
            raise ConfigError(f"{option} {text!r} is not {NAMED}")
        if name in paths:
            raise ConfigError(f"{option} names {name!r} twice; every name stands for one path")
        paths[name] = Path(path)
    return paths
