"""Commands about judges: certify one on pairs whose better answer is known."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.cli.reporting import JsonOption, Report, SetOption, reporting

if TYPE_CHECKING:
    from qlora_core.evaluation.judge.certificate import Certificate
    from qlora_core.evaluation.judge.gold_pairs import GoldPair

app = typer.Typer(no_args_is_help=True, help="Measure judges before trusting them.")


@app.callback()
def _judge() -> None:
    """Measure judges before trusting them."""


@app.command()
def certify(
    config: Annotated[
        Path | None, typer.Argument(help="Pipeline config; its evaluate.judge is certified.", show_default=False)
    ] = None,
    gold: Annotated[
        str, typer.Option(help="`own` (shipped), an LLMBar folder, PandaLM's testset, or a .jsonl of pairs.")
    ] = "own",
    out: Annotated[Path | None, typer.Option(help="Where the certificate goes.", show_default=False)] = None,
    recorded: Annotated[
        Path | None, typer.Option(help="Replay this LLMBar result.json(.gz) instead of asking.", show_default=False)
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="A local model folder as log-probability judge.", show_default=False)
    ] = None,
    min_accuracy: Annotated[float, typer.Option(help="Least accuracy on the gold pairs.")] = 0.75,
    overrides: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Run a judge over pairs with a known better answer, in both orders and under injection; write its certificate.

    Exit code 1 where the judge does not pass. The certificate is bound to the judge's settings and model snapshot: name
    it in evaluate.judge.certificate.

    Example:

      qlora judge certify pipeline.yaml --out judge-certificate.json
    """
    with reporting(json) as report:
        from qlora_core.errors import ConfigError
        from qlora_core.evaluation.judge.gold_pairs import read_gold

        if sum(source is not None for source in (config, recorded, model)) != 1:
            raise ConfigError("name one judge: a pipeline config, --recorded FILE, or --model FOLDER")
        pairs = read_gold(gold)
        if config is not None:
            certificate = _certify_endpoint(config, overrides or [], pairs, min_accuracy)
        elif recorded is not None:
            certificate = _certify_recorded(recorded, pairs, min_accuracy)
        else:
            certificate = _certify_local(model or Path(), pairs, min_accuracy)
        _tell(report, certificate, out)


def _certify_endpoint(path: Path, overrides: list[str], pairs: list["GoldPair"], least: float) -> "Certificate":
    from qlora_core.config.load import load_config
    from qlora_core.errors import ConfigError
    from qlora_core.evaluation.judge.cache import VerdictCache
    from qlora_core.evaluation.judge.certificate import Limits
    from qlora_core.evaluation.judge.client import resolve_kind
    from qlora_core.evaluation.judge.endpoint import open_openai_judge
    from qlora_core.evaluation.judge.gym import certify as run
    from qlora_core.progress import progress_bar

    config = load_config(path, overrides)
    settings = config.evaluate.judge.model_copy(update={"certificate": None})
    if resolve_kind(settings, os.environ) != "openai":
        raise ConfigError(
            "evaluate.judge means no endpoint here; set evaluate.judge.kind: openai, or name a local model by --model"
        )
    with (
        VerdictCache(config.work_dir / "verdicts.db") as cache,
        open_openai_judge(settings, os.environ, cache) as judge,
        progress_bar("Judging", 4 * len(pairs)) as advance,
    ):
        return run(judge, pairs, limits=Limits(min_accuracy=least), advance=advance)


def _certify_recorded(path: Path, pairs: list["GoldPair"], least: float) -> "Certificate":
    from qlora_core.evaluation.judge.certificate import Limits
    from qlora_core.evaluation.judge.gold_pairs import recorded_llmbar
    from qlora_core.evaluation.judge.gym import certify as run

    limits = Limits(min_accuracy=least, min_injection_resistance=None)
    return run(recorded_llmbar(path), pairs, limits=limits, advance=lambda amount: None, injections=False)


def _certify_local(folder: Path, pairs: list["GoldPair"], least: float) -> "Certificate":
    from transformers import AutoTokenizer

    from qlora_core.digest import digest_files
    from qlora_core.evaluation.judge.certificate import Limits
    from qlora_core.evaluation.judge.gym import certify as run
    from qlora_core.evaluation.judge.offline import LogProbJudge
    from qlora_core.model.base import load_plain
    from qlora_core.progress import progress_bar

    identity = digest_files({path.name: path for path in folder.iterdir() if path.is_file()})
    judge = LogProbJudge(
        load_plain(folder, precision="auto"), AutoTokenizer.from_pretrained(folder), batch_size=8, identity=identity
    )
    with progress_bar("Judging", 4 * len(pairs)) as advance:
        return run(judge, pairs, limits=Limits(min_accuracy=least), advance=advance)


def _tell(report: Report, certificate: "Certificate", out: Path | None) -> None:
    from qlora_core.evaluation.judge.certificate import write_certificate

    if out is not None:
        write_certificate(out, certificate)
    figures: dict[str, Any] = certificate.figures.model_dump(mode="json")
    report.data = {**certificate.model_dump(mode="json"), "certificate": None if out is None else str(out)}
    for name, value in figures.items():
        report.say(f"{name:<24} {'unknown' if value is None else value}")
    report.say(f"{certificate.judge}: {'certified' if certificate.passed else 'not certified'}")
    for reason in certificate.reasons:
        report.say(f"  {reason}")
    report.exit_code = 0 if certificate.passed else 1


@app.command()
def preferences(
    config: Annotated[Path, typer.Argument(help="The pipeline config, a YAML file.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="Where the pairs go: a .jsonl for data.sources.", show_default=False)],
    prompts: Annotated[int, typer.Option(min=1, help="Training prompts that are answered twice.")] = 200,
    uncertified: Annotated[
        bool, typer.Option("--uncertified", help="Learn from a judge without a certificate.")
    ] = False,
    overrides: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Let the best adapter and its base answer training prompts, and keep what the judge decides as preference pairs.

    A round of DPO learns from them: name the file in data.sources and set train.objective=dpo. It is gated as any run.

    Example:

      qlora judge preferences pipeline.yaml pairs.jsonl --prompts 500
    """
    with reporting(json) as report:
        from flows.cli.stages import open_pipeline
        from qlora_core.evaluation.preferences import collect_preferences, write_preferences
        from qlora_core.pipeline.stages import evaluate_settings

        pipeline = open_pipeline(config, overrides)
        settings = pipeline.job.config
        made = {name: pipeline.run(name).artifact.path for name in ("quantize", "curate", "sweep")}
        found = collect_preferences(
            evaluate_settings(pipeline.job),
            made["quantize"],
            made["sweep"] / "adapter",
            made["curate"],
            prompts=prompts,
            allow_uncertified=uncertified,
            precision=settings.train.precision,
            residency=settings.compute.residency_settings,
        )
        write_preferences(out, found)
        report.data = {"pairs": len(found.rows), "left_out": found.left_out, "path": str(out)}
        report.say(f"{len(found.rows)} pairs in {out}")
        for reason, count in sorted(found.left_out.items()):
            report.say(f"  left out, {reason}: {count}")
