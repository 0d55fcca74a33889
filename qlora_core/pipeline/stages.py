"""The stages that end in the artifact store: for each, what its key is made of and which function builds it.

A key holds the stage's name and code version, the settings that can change its result, and the digests of its inputs:
nothing of paths, times, workers or logs. Raise a stage's `version` whenever its code would give another result.
Heavy imports stand inside the builders, so that keys can be computed without torch.
"""

import json
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_core.config.evaluate import EvaluateConfig
from qlora_core.config.sweep import WITHOUT_EFFECT
from qlora_core.digest import digest_file, digest_files, digest_json
from qlora_core.errors import ConfigError, TrainingError
from qlora_core.evaluation.judge.client import custom_url, resolve_kind, without_secrets
from qlora_core.pipeline.base_source import BaseModelFiles, is_demo
from qlora_core.pipeline.job import Job
from qlora_core.quantization.checkpoint import tokenizer_files
from qlora_core.store.artifact import Artifact, StageKey
from qlora_core.store.layout import VERDICTS
from qlora_core.store.manifest import Manifest
from qlora_core.store.shelf import Shelf

if TYPE_CHECKING:
    from qlora_core.evaluation.judge.cache import VerdictCache

EVALUATE_FILES = {
    "general_text": "give a text file",
    "parity_certificate": "write it with `qlora merge`",
    "votes": "name the votes.sqlite that `qlora vote serve` wrote",
}
"""The settings of `evaluate` that name a file whose contents are measured or recorded, and how each is come by."""

Inputs = Mapping[str, Artifact]
Manifests = Mapping[str, Manifest]


@dataclass(frozen=True)
class Stage:
    """One stage: `key` from its inputs' manifests, `build` from its inputs' files into an empty folder.

    `clean_up` removes what builds have left outside that folder, once the artifact of the key is stored; where nothing
    is left it costs nothing.
    """

    name: str
    upstream: Callable[[Job], tuple[str, ...]]
    key: Callable[[Job, Manifests], StageKey]
    build: Callable[[Job, Inputs, Path], None]
    clean_up: Callable[[Job, StageKey], None] | None = None


def _base_key(job: Job, inputs: Manifests) -> StageKey:
    return StageKey("base", "1", {"seed": 0}, {})


def _build_base(job: Job, inputs: Inputs, out: Path) -> None:
    from qlora_core.demo.base import build_demo_base

    build_demo_base(out)


def _upstream_of_base_users(job: Job) -> tuple[str, ...]:
    return ("base",) if is_demo(job.config) else ()


def base_files(job: Job, inputs: Inputs) -> BaseModelFiles:
    """The base checkpoint: the configured one, or the demo model made by the stage before."""
    return job.external_base or BaseModelFiles(inputs["base"].path)


def _curate_key(job: Job, inputs: Manifests) -> StageKey:
    base = job.external_base
    if base is None:
        files = {name: entry.sha256 for name, entry in inputs["base"].files.items() if "safetensors" not in name}
        tokenizer = digest_json({name: sha256 for name, sha256 in files.items() if name != "generation_config.json"})
    else:
        tokenizer = digest_files({**tokenizer_files(base.folder), "config.json": base.folder / "config.json"})
    settings = job.section("data", without=frozenset({"sources", "chat_template"}))
    # A path is no content; what lies there is an input.
    del settings["split"]["earlier"]
    # The order of sources decides which of two like rows stays.
    settings["source_order"] = list(job.source_digests)
    settings["prompt_set_order"] = list(job.prompt_set_digests)
    # File by file, so that `qlora store explain` can name the one that changed.
    sources = {f"sources/{name}": digest for name, digest in job.source_digests.items()}
    prompt_sets = {f"prompt_sets/{name}": digest for name, digest in job.prompt_set_digests.items()}
    digests = {**sources, **prompt_sets, "tokenizer": tokenizer, "chat_template": job.chat_template_digest}
    if job.config.data.tags.plugins:
        from qlora_core.data.tags.plugins import PluginTagger

        digests |= {f"plugin/{spec}": PluginTagger(spec).fingerprint for spec in job.config.data.tags.plugins}
    if job.earlier_split is not None:
        digests["earlier_split"] = job.earlier_split_digest
    if job.config.data.tags.model_scores:
        digests["base"] = inputs["base"].digest if base is None else base.digest
    return StageKey("curate", "3", settings, digests)


def _build_curate(job: Job, inputs: Inputs, out: Path) -> None:
    from qlora_core.data.curate import curate
    from qlora_core.data.tags.cache import TagCache
    from qlora_core.store.tag_shelf import StoreTagShelf

    base = base_files(job, inputs)
    curate(
        job.config.data,
        job.source_paths,
        base.folder,
        base.max_positions,
        out,
        job.chat_template,
        prompt_sets=job.prompt_set_paths,
        earlier=job.earlier_split,
        tag_cache=TagCache(StoreTagShelf(job.store.backend)),
    )


def _quantize_key(job: Job, inputs: Manifests) -> StageKey:
    base = job.external_base
    digest = inputs["base"].digest if base is None else base.digest
    digests = {"base": digest}
    if job.quality_text is not None:
        digests["quality_text"] = digest_file(job.quality_text)
    # A path is no content; what lies there is an input.
    return StageKey("quantize", "2", job.section("quantize", without=frozenset({"quality_text"})), digests)


def _build_quantize(job: Job, inputs: Inputs, out: Path) -> None:
    from qlora_core.quantization.quantize import quantize_checkpoint

    key = _quantize_key(job, {name: artifact.manifest for name, artifact in inputs.items()})
    base = base_files(job, inputs).folder
    if job.quality_text is None:
        quantize_checkpoint(base, out, job.config.quantize, work=_quantize_folder(job, key))
        return
    from qlora_core.quantization.quality import write_quality
    from qlora_core.quantization.quality_inputs import check_memory, read_inputs

    read = read_inputs(base, job.quality_text)
    check_memory(base)
    quantize_checkpoint(base, out, job.config.quantize, work=_quantize_folder(job, key))
    write_quality(read, base, out, job.config.quantize)


def _clean_up_quantize(job: Job, key: StageKey) -> None:
    from qlora_core.quantization.resume import discard_work

    discard_work(_quantize_folder(job, key))


def _quantize_folder(job: Job, key: StageKey) -> Path:
    # Outside the store's staging, which goes with its process: finished shards are found again by the same job.
    return job.config.work_dir / "quantize" / key.key[:16]


def _sweep_key(job: Job, inputs: Manifests) -> StageKey:
    settings = {
        # What it begins from is an input, whatever it is called.
        "train": job.section("train", without=frozenset({"checkpoint_every_steps", "start_from", "start_as"})),
        "sweep": job.section("sweep", without=WITHOUT_EFFECT),
    }
    digests = {name: inputs[name].digest for name in ("curate", "quantize")}
    if job.start_adapter is not None:
        digests["parent" if _has_parent(job) else "start"] = job.start_adapter.adapter_sha256
    return StageKey("sweep", "2", settings, digests)


def _build_sweep(job: Job, inputs: Inputs, out: Path) -> None:
    from qlora_core.registry.live_metrics import LiveMetrics, LiveSweep
    from qlora_core.sweep.run import SweepWork, run_sweep

    key = _sweep_key(job, {name: artifact.manifest for name, artifact in inputs.items()})
    work = SweepWork(
        quantized_folder=inputs["quantize"].path,
        curated_folder=inputs["curate"].path,
        work_dir=sweep_folder(job, key),
        lineage=lineage(job, inputs),
        store=job.store_settings,
        lease=f"stage/{key.stage}/{key.key}",
        inputs=key.inputs,
        # Never asked for where it would have to be made or fetched: the demo's base is no input of this stage
        original_folder=None if job.external_base is None else job.external_base.folder,
        start_folder=None if _has_parent(job) else _start_folder(job, inputs),
        parent_folder=_start_folder(job, inputs) if _has_parent(job) else None,
    )
    live = LiveSweep(
        tracking_uri=job.config.tracking_uri,
        experiment=job.config.registry.experiment,
        work_dir=job.config.work_dir,
        trials_dir=work.trials_dir,
        sweep_key=key.key,
        name=f"{job.config.registry.model_name} sweep {key.key[:8]}",
        tags={**work.lineage, "base_model": job.config.base.model},
        data_digest=work.lineage["data_digest"],
    )
    with LiveMetrics(live) as metrics:
        run_sweep(job.config.sweep, job.config.train, job.config.compute, work, out, on_trial=metrics.take)


def _has_parent(job: Job) -> bool:
    return job.config.train.start_as == "parent"


def _start_folder(job: Job, inputs: Inputs) -> Path | None:
    start = job.start_adapter
    if start is None:
        return None
    if start.quantized_base_digest not in (None, inputs["quantize"].digest):
        raise TrainingError(
            f"train.start_from {job.config.train.start_from}: that adapter was trained over another quantized base "
            f"({(start.quantized_base_digest or '')[:12]}) than this one ({inputs['quantize'].digest[:12]}); "
            "train from scratch"
        )
    return start.folder


def _clean_up_sweep(job: Job, key: StageKey) -> None:
    from qlora_core.sweep.keeper import discard_work

    discard_work(sweep_folder(job, key), job.store.backend)


def sweep_folder(job: Job, key: StageKey) -> Path:
    """Where an unfinished sweep keeps its study and checkpoints."""
    # Named by the key: an interrupted sweep is found again by the same job and by no other.
    return job.config.work_dir / "sweeps" / key.key[:16]


def judge_kind(job: Job) -> str:
    """Which judge `auto` means here: the endpoint when its key is in the environment, else the offline one."""
    return resolve_kind(job.config.evaluate.judge, os.environ)


def _evaluate_key(job: Job, inputs: Manifests) -> StageKey:
    settings = job.section("evaluate", without=frozenset({"batch_size", "judge", "prompt_sets", *EVALUATE_FILES}))
    settings |= {name: digest_file(path) for name, path in _evaluate_files(job).items() if name != "votes"}
    if job.config.evaluate.votes is not None:
        from qlora_core.evaluation.human_votes import votes_digest

        settings["votes"] = votes_digest(_evaluate_files(job)["votes"])
    judge = job.config.evaluate.judge
    settings["judge"] = {"kind": judge_kind(job)}
    if judge_kind(job) == "openai":
        verdicts = {"model", "mode", "rubric", "structured_output", "temperature", "max_answer_tokens", "budget_usd"}
        chosen = judge.model_dump(mode="json", include=verdicts)
        url = custom_url(judge, os.environ)
        settings["judge"] |= {**chosen, "endpoint": None if url is None else without_secrets(url)}
    settings["judge"] |= {name: digest_file(path) for name, path in _judge_files(job).items()}
    digests = {name: inputs[name].digest for name in ("curate", "quantize", "sweep")}
    return StageKey("evaluate", "3", settings, digests)


def _evaluate_files(job: Job) -> dict[str, Path]:
    """The files, beside the data, whose contents are part of an evaluation: those of EVALUATE_FILES that are named."""
    named = {name: getattr(job.config.evaluate, name) for name in EVALUATE_FILES}
    files = {name: job.config.path(value) for name, value in named.items() if value is not None}
    for name, path in files.items():
        if not path.is_file():
            raise ConfigError(
                f"evaluate.{name}: {str(path)!r} is no file; {EVALUATE_FILES[name]}, or leave the key out"
            )
    return files


def _judge_files(job: Job) -> dict[str, Path]:
    """The judge's files that are named, whose contents are part of what an evaluation is made of."""
    advice = {"certificate": "write it with `qlora judge certify`", "checks": "give one check a line"}
    named = {name: getattr(job.config.evaluate.judge, name) for name in advice}
    files = {name: job.config.path(value) for name, value in named.items() if value is not None}
    for name, path in files.items():
        if not path.is_file():
            raise ConfigError(f"evaluate.judge.{name}: {path} is no file; {advice[name]}")
    return files


def _build_evaluate(job: Job, inputs: Inputs, out: Path) -> None:
    from qlora_core.evaluation.evaluate import evaluate_adapter
    from qlora_core.model.adapter_set import NamedAdapter

    candidates = [NamedAdapter(trial, folder) for trial, folder in exported_candidates(inputs["sweep"].path)]
    with paid_verdicts(job) as verdicts:
        evaluate_adapter(
            evaluate_settings(job),
            inputs["quantize"].path,
            inputs["sweep"].path / "adapter",
            inputs["curate"].path,
            out,
            precision=job.config.train.precision,
            residency=job.config.compute.residency_settings,
            verdict_cache=verdicts,
            lineage=lineage(job, inputs),
            candidates=candidates,
        )


def exported_candidates(sweep_folder: Path) -> list[tuple[str, Path]]:
    """A sweep's exported trials with their adapters, best first: `adapter`, then the others in `adapters`."""
    best, *others = json.loads((sweep_folder / "sweep.json").read_text())["candidates"]
    return [(best, sweep_folder / "adapter"), *((trial, sweep_folder / "adapters" / trial) for trial in others)]


def evaluate_settings(job: Job) -> EvaluateConfig:
    """The `evaluate` section with every file at its place and the judge that `auto` means here."""
    judge_files = {name: str(path) for name, path in _judge_files(job).items()}
    judge = job.config.evaluate.judge.model_copy(update={"kind": judge_kind(job), **judge_files})
    files = {name: str(path) for name, path in _evaluate_files(job).items()}
    return job.config.evaluate.model_copy(update={"judge": judge, **files})


def paid_verdicts(job: Job) -> "AbstractContextManager[VerdictCache | None]":
    """What a judge that costs money has said before, here or on other machines; None for a judge that costs none."""
    from qlora_core.evaluation.judge.cache import VerdictCache

    if judge_kind(job) != "openai":
        return nullcontext()
    return VerdictCache(job.config.work_dir / "verdicts.db", Shelf(job.store.backend, VERDICTS))


def lineage(job: Job, inputs: Inputs) -> dict[str, str]:
    """The digests an adapter is bound to: what it was made from, by content."""
    curation = json.loads((inputs["curate"].path / "curation.json").read_text())
    return {
        "base_revision": job.config.base.revision or "none",
        "quantized_base_digest": inputs["quantize"].digest,
        "data_digest": curation["digest"],
        "chat_template_origin": curation["chat_template"]["origin"],
    }


STAGES = (
    Stage("base", lambda job: (), _base_key, _build_base),
    Stage("curate", _upstream_of_base_users, _curate_key, _build_curate),
    Stage("quantize", _upstream_of_base_users, _quantize_key, _build_quantize, _clean_up_quantize),
    Stage("sweep", lambda job: ("curate", "quantize"), _sweep_key, _build_sweep, _clean_up_sweep),
    Stage("evaluate", lambda job: ("curate", "quantize", "sweep"), _evaluate_key, _build_evaluate),
)
