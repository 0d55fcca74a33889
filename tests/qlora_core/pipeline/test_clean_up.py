"""What a sweep worked with goes once its artifact is stored, and not before."""

import json
import logging
from pathlib import Path

import pytest

from qlora_core.config.load import load_config
from qlora_core.errors import QloraError
from qlora_core.pipeline.pipeline import Pipeline
from qlora_core.store.artifact import StageKey
from qlora_core.store.work import WorkArea
from qlora_core.sweep.lock import DRIVER_LOCK, exclusive_lock


@pytest.fixture
def pipeline(tiny_project: Path) -> Pipeline:
    return Pipeline(load_config(tiny_project))


def store_stand_ins(pipeline: Pipeline, *names: str) -> None:
    """Put a stand-in artifact under the keys of stages."""

    def write(out: Path) -> None:
        (out / "stage.json").write_text(json.dumps("stand-in"))

    for name in names:
        pipeline.job.store.get_or_build(key_of(pipeline, name), write)


def key_of(pipeline: Pipeline, stage: str) -> StageKey:
    (key,) = [planned.key for planned in pipeline.plan() if planned.name == stage]
    assert key is not None
    return key


def leave_work(pipeline: Pipeline, name: str) -> Path:
    """What an interrupted sweep leaves: a folder here, and checkpoints in the store."""
    folder = pipeline.job.config.work_dir / "sweeps" / name
    checkpoint = folder / "trials" / "t000" / "step-00000002"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text("{}")
    WorkArea(pipeline.job.store.backend, f"sweep/{name}/t000").save(checkpoint, checkpoint.name)
    return folder


def work_in_store(pipeline: Pipeline) -> list[str]:
    return [listed.name for listed in pipeline.job.store.backend.list("v1/work/")]


def test_work_of_a_stored_sweep_is_removed_and_that_of_others_stays(pipeline: Pipeline) -> None:
    store_stand_ins(pipeline, "curate", "quantize")
    key = key_of(pipeline, "sweep").key
    folder, other = leave_work(pipeline, key[:16]), leave_work(pipeline, "f" * 16)
    store_stand_ins(pipeline, "sweep")
    for _ in range(2):
        assert Pipeline(pipeline.job.config).run("sweep").key == key
        assert not folder.exists()
        assert other.is_dir()
        names = work_in_store(pipeline)
        assert len(names) == 2 and all(f"/{'f' * 16}/" in name for name in names)


def test_work_of_a_sweep_that_could_not_be_built_stays(pipeline: Pipeline) -> None:
    store_stand_ins(pipeline, "curate", "quantize")
    folder = leave_work(pipeline, key_of(pipeline, "sweep").key[:16])
    names = work_in_store(pipeline)
    # A stand-in is no curated set.
    with pytest.raises((QloraError, OSError)):
        pipeline.run("sweep")
    assert (folder / "trials" / "t000" / "step-00000002").is_dir()
    assert work_in_store(pipeline) == names


def test_work_that_cannot_be_removed_is_told_and_fails_nothing(
    pipeline: Pipeline, caplog: pytest.LogCaptureFixture
) -> None:
    store_stand_ins(pipeline, "curate", "quantize")
    folder = leave_work(pipeline, key_of(pipeline, "sweep").key[:16])
    store_stand_ins(pipeline, "sweep")
    with (
        exclusive_lock(folder / DRIVER_LOCK, purpose="driving", wait_s=0),
        caplog.at_level(logging.WARNING, logger="qlora_core.pipeline"),
    ):
        assert pipeline.run("sweep").cached
    assert "sweep: done, but what it worked with could not be removed: this sweep still runs" in caplog.text
    assert folder.is_dir() and work_in_store(pipeline)


def test_stages_without_work_of_their_own_have_nothing_to_remove(pipeline: Pipeline) -> None:
    store_stand_ins(pipeline, "curate")
    folder = leave_work(pipeline, key_of(pipeline, "curate").key[:16])
    pipeline.run("curate")
    assert folder.is_dir()
