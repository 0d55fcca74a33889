"""Running one stage of a job inside a Prefect task. Knows Prefect's logging and retries, not what the stages do."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from prefect import Task
from prefect.client.schemas.objects import State, TaskRun
from prefect.logging import get_run_logger

from qlora_core.errors import QloraError
from qlora_core.pipeline.pipeline import Pipeline
from qlora_core.pipeline.run_record import RunRecord

Spec = dict[str, Any]

# The stage cache is the store, by content. Prefect keeps no results of its own, and if told to, keeps JSON.
TASK_OPTIONS: dict[str, Any] = {
    "retries": 2,
    "retry_delay_seconds": [5, 30],
    "persist_result": False,
    "result_serializer": "json",
}


async def worth_retrying(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """Whether a failed task run is tried again: outages pass, a wrong config, bad data or a NaN stays what it is."""
    outcome = await state.aresult(raise_on_failure=False)
    if isinstance(outcome, QloraError):
        return outcome.passing
    return isinstance(outcome, ConnectionError | TimeoutError)


def pipeline_of(spec: Mapping[str, Any]) -> Pipeline:
    """The pipeline of the run that `spec` describes."""
    return Pipeline(RunRecord.from_spec(spec).config)


@contextmanager
def library_logs() -> Iterator[None]:
    """Send the library's log lines to the task run, so that they are seen in Prefect's UI."""
    handler = _Forward(get_run_logger())
    library = logging.getLogger("qlora_core")
    level = library.level
    if level == logging.NOTSET:  # in a Prefect worker nobody has said what to log
        library.setLevel(logging.INFO)
    library.addHandler(handler)
    propagate, library.propagate = library.propagate, False
    try:
        yield
    finally:
        library.propagate = propagate
        library.removeHandler(handler)
        library.setLevel(level)


class _Forward(logging.Handler):
    """Hands each record's message to another logger, marked as the library's own (`record.library`)."""

    def __init__(self, target: "logging.Logger | logging.LoggerAdapter[Any]") -> None:
        super().__init__()
        self._target = target

    def emit(self, record: logging.LogRecord) -> None:
        self._target.log(record.levelno, record.getMessage(), extra={"library": True})


def run_stage(spec: Mapping[str, Any], name: str) -> tuple[Pipeline, dict[str, Any]]:
    """Run a stage with its log lines in Prefect; returns the pipeline, for reading results, and the stage's row."""
    pipeline = pipeline_of(spec)
    with library_logs():
        result = pipeline.run(name)
    return pipeline, result.row()
