"""Running a job's stages: each upstream first, each at most once, each from the store where it is there already.

Knows keys and order. It does not know what a stage computes, nor who drives it: the command line calls it directly, and
Prefect's tasks call it one stage at a time.
"""

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_core.config.pipeline import PipelineConfig
from qlora_core.errors import QloraError
from qlora_core.pipeline.job import Job
from qlora_core.pipeline.stages import STAGES, Stage
from qlora_core.store.artifact import Artifact, StageKey
from qlora_core.store.manifest import Manifest

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StageResult:
    """What became of one stage. `seconds` is wall time, near zero for a hit."""

    name: str
    key: str
    cached: bool
    seconds: float
    artifact: Artifact

    def row(self) -> dict[str, Any]:
        """The stage as the command line and Prefect report it: a reference into the store, by key and by content."""
        reference = {"name": self.name, "key": self.key, "digest": self.artifact.digest}
        return {**reference, "cached": self.cached, "seconds": round(self.seconds, 3)}


@dataclass(frozen=True)
class PlannedStage:
    """One stage before the run. `key` is None where an input has yet to be built, so that no key can be known."""

    name: str
    key: StageKey | None
    cached: bool

    def row(self) -> dict[str, Any]:
        """The stage as the command line reports it."""
        return {"name": self.name, "key": self.key.key if self.key else None, "cached": self.cached}


class Pipeline:
    """The stages of one config over its store. One instance serves one run; results are remembered in it."""

    def __init__(self, config: PipelineConfig) -> None:
        self.job = Job(config)
        self._stages = {stage.name: stage for stage in STAGES}
        self._results: dict[str, StageResult] = {}

    @property
    def stage_names(self) -> tuple[str, ...]:
        """The stages this job has, in order. The base stage exists only where the base is made on the spot."""
        return tuple(name for name in self._stages if name != "base" or self.job.external_base is None)

    def plan(self) -> list[PlannedStage]:
        """What is stored already and what would run. Costs one manifest read a stage and builds nothing."""
        manifests: dict[str, Manifest] = {}
        planned: list[PlannedStage] = []
        for name in self.stage_names:
            key = self._key(self._stages[name], manifests)
            manifest = self.job.store.find(key) if key else None
            if manifest is not None:
                manifests[name] = manifest
            planned.append(PlannedStage(name, key, cached=manifest is not None))
        return planned

    def _key(self, stage: Stage, manifests: Mapping[str, Manifest]) -> StageKey | None:
        """The stage's key; None while an input is missing."""
        upstream = stage.upstream(self.job)
        if any(needed not in manifests for needed in upstream):
            return None
        return stage.key(self.job, {needed: manifests[needed] for needed in upstream})

    def run(self, name: str) -> StageResult:
        """The stage's verified artifact, built now if it is not stored; its inputs are seen to first."""
        if name not in self._results:
            stage = self._stages[name]
            inputs = {needed: self.run(needed).artifact for needed in stage.upstream(self.job)}
            key = stage.key(self.job, {needed: artifact.manifest for needed, artifact in inputs.items()})
            self.get_or_build(name, key, lambda out: stage.build(self.job, inputs, out))
            self._clean_up(stage, key)
        return self._results[name]

    def _clean_up(self, stage: Stage, key: StageKey) -> None:
        """Remove what building a stored artifact has left behind, also where an earlier run died before it could."""
        if stage.clean_up is None:
            return
        try:
            stage.clean_up(self.job, key)
        except (QloraError, OSError) as error:
            logger.warning("%s: done, but what it worked with could not be removed: %s", stage.name, error)

    def get_or_build(self, name: str, key: StageKey, build: Callable[[Path], None]) -> StageResult:
        """The artifact of `key`, timed, logged and remembered under `name`."""
        started = time.monotonic()

        def announced(out: Path) -> None:
            logger.info("%s: started", name)
            build(out)

        artifact, cached = self.job.store.get_or_build(key, announced)
        seconds = time.monotonic() - started
        # Every task looks at the stages before its own: a hit is news only once, in the run's summary.
        level = logging.DEBUG if cached else logging.INFO
        logger.log(level, "%s: %s in %.1f s (%s)", name, "cached" if cached else "done", seconds, key.key[:12])
        self._results[name] = StageResult(name, key.key, cached, seconds, artifact)
        return self._results[name]

    def results(self) -> list[StageResult]:
        """The stages run so far, in the order they ended."""
        return list(self._results.values())

    def document(self, stage: str, file: str) -> dict[str, Any]:
        """A JSON document of a stage that has run, such as `document("sweep", "sweep.json")`."""
        return json.loads((self.run(stage).artifact.path / file).read_text(encoding="utf-8"))
