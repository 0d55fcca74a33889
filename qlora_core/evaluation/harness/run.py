"""Run tasks of lm-evaluation-harness on a base and its adapters, offline, and compare the adapters with the base.

Knows systems, tasks and paired statistics; how requests are scored is `language_model`'s. The harness is an optional
extra and is imported only here and there. Each task's per-item values are compared in pairs: an aggregate difference
without pairing hides most of what a few hundred items can show.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from qlora_core.errors import EvaluationError
from qlora_core.evaluation.harness.tasks import CATEGORY, write_choice_task
from qlora_core.evaluation.statistics.paired import paired_difference

BASE = "base"


class Settings(NamedTuple):
    """What is run. `tasks`: the harness's, or of `include`; `choice_files`: task name to its file of questions."""

    tasks: Sequence[str] = ()
    choice_files: Mapping[str, Path] = {}
    include: Path | None = None
    examples: int | None = None
    limit: int | None = None
    chat: bool = False
    batch_size: int = 8
    seed: int = 0
    confidence: float = 0.95
    resamples: int = 2000


def run_benchmarks(base: Path, adapters: Mapping[str, Path], settings: Settings, out: Path) -> dict[str, Any]:
    """Run every task under the base and each adapter, from one loaded base; write and give the figures.

    Keys: results (system to task to metric to value), comparisons (task to adapter to the paired difference of its
    first metric over items, adapter minus base, with interval), categories (task to category to system to mean, for
    tasks whose items name a subject), items (task to count). `out` gets results.json and TASK.jsonl: each item's
    value under each system.

    Raises EvaluationError where the harness is not installed, a task is unknown or an adapter is named "base".
    """
    if BASE in adapters:
        raise EvaluationError("an adapter is named 'base', which is the base model's own name here; rename it")
    if not settings.tasks and not settings.choice_files:
        raise EvaluationError("no task is named; give --task NAME, or --questions NAME=FILE for lettered questions")
    out.mkdir(parents=True, exist_ok=True)
    local = [write_choice_task(name, file, out / "tasks") for name, file in settings.choice_files.items()]
    tasks = _tasks([*settings.tasks, *local], [settings.include, out / "tasks" if local else None])
    found = dict(_run_systems(base, adapters, tasks, settings))
    values = {system: _values(result) for system, result in found.items()}
    report = {
        "results": {system: _metrics(result) for system, result in found.items()},
        "comparisons": _compare(values, settings),
        "categories": _categories(values),
        "items": {task: len(items) for task, items in values[BASE].items()},
    }
    _write(out, report, values)
    return report


def _tasks(names: Sequence[str], include: Sequence[Path | None]) -> dict[str, Any]:
    """The harness's task objects by name."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise EvaluationError(
            "lm-evaluation-harness is not installed; install it with: pip install 'qlora-fleet[benchmarks]'"
        ) from error
    manager = TaskManager(include_path=[str(path) for path in include if path is not None] or None)
    unknown = sorted(name for name in names if name not in manager.all_tasks)
    if unknown:
        raise EvaluationError(
            f"the harness knows no task {unknown[0]!r}; `lm_eval ls tasks` lists its own, "
            "--include-path FOLDER adds yours"
        )
    return {"names": list(names), "manager": manager}


def _run_systems(
    base: Path, adapters: Mapping[str, Path], tasks: Mapping[str, Any], settings: Settings
) -> Iterator[tuple[str, dict[str, Any]]]:
    import lm_eval
    from transformers import AutoTokenizer

    from qlora_core.evaluation.harness.language_model import SystemLM
    from qlora_core.model.adapter_set import NamedAdapter, attached_adapters
    from qlora_core.model.base import load_any

    evaluate: Any = lm_eval.simple_evaluate  # a decorator hides its parameters
    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    model = load_any(base)
    named = [NamedAdapter(name, folder) for name, folder in adapters.items()]
    with attached_adapters(model, named) if named else nullcontext(model) as attached:
        for system in (None, *adapters):
            lm = SystemLM(attached, tokenizer, system=system, batch_size=settings.batch_size)
            result = evaluate(
                lm,
                tasks=tasks["names"],
                task_manager=tasks["manager"],
                num_fewshot=settings.examples,
                limit=settings.limit,
                apply_chat_template=settings.chat,
                bootstrap_iters=0,  # intervals here are of paired differences
                log_samples=True,
                random_seed=settings.seed,
                numpy_random_seed=settings.seed,
                torch_random_seed=settings.seed,
                fewshot_random_seed=settings.seed,
            )
            if result is None:
                raise EvaluationError("the harness gave no result: it runs on the first process of a group alone")
            yield system or BASE, dict(result)


def _metrics(result: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Task to metric to value; standard errors and what is no number are left to the harness's own report."""
    return {
        task: {
            name.removesuffix(",none"): float(value)
            for name, value in values.items()
            if isinstance(value, int | float) and "stderr" not in name and name != "sample_len"
        }
        for task, values in result["results"].items()
    }


def _values(result: Mapping[str, Any]) -> dict[str, dict[str, tuple[float, str]]]:
    """Task to item to (value of its first metric, category). An item is known by the digest the harness gives it."""
    found: dict[str, dict[str, tuple[float, str]]] = {}
    for task, samples in result["samples"].items():
        items: dict[str, tuple[float, str]] = {}
        for sample in samples:
            value = next(
                (sample[name] for name in sample["metrics"] if isinstance(sample.get(name), int | float)), None
            )
            if value is not None:
                items[f"{sample['doc_id']}-{sample['doc_hash'][:16]}"] = (
                    float(value),
                    str(sample["doc"].get(CATEGORY) or "all"),
                )
        if items:
            found[task] = items
    return found


def _compare(
    values: Mapping[str, Mapping[str, Mapping[str, tuple[float, str]]]], settings: Settings
) -> dict[str, dict[str, Any]]:
    compared: dict[str, dict[str, Any]] = defaultdict(dict)
    for system, tasks in values.items():
        if system == BASE:
            continue
        for task, items in tasks.items():
            base = values[BASE][task]
            if list(base) != list(items):
                raise EvaluationError(f"{task} gave {system} other items than the base; run it again with one seed")
            if len(items) < 2:
                continue
            differences = [items[item][0] - base[item][0] for item in items]
            compared[task][system] = paired_difference(
                differences,
                list(items),
                confidence=settings.confidence,
                resamples=settings.resamples,
                seed=settings.seed,
            )
    return dict(compared)


def _categories(
    values: Mapping[str, Mapping[str, Mapping[str, tuple[float, str]]]],
) -> dict[str, dict[str, dict[str, float]]]:
    means: dict[str, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for system, tasks in values.items():
        for task, items in tasks.items():
            grouped: dict[str, list[float]] = defaultdict(list)
            for value, category in items.values():
                grouped[category].append(value)
            if set(grouped) != {"all"}:
                for category, numbers in sorted(grouped.items()):
                    means[task][category][system] = sum(numbers) / len(numbers)
    return {task: dict(categories) for task, categories in means.items()}


def _write(
    out: Path, report: Mapping[str, Any], values: Mapping[str, Mapping[str, Mapping[str, tuple[float, str]]]]
) -> None:
    for task, items in values[BASE].items():
        lines = [
            {"item": item, "category": category, **{system: tasks[task][item][0] for system, tasks in values.items()}}
            for item, (_, category) in items.items()
        ]
        text = "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
        (out / f"{task}.jsonl").write_text(text, encoding="utf-8")
    (out / "results.json").write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
