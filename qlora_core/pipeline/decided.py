"""The last decided run, on record in the store: which inputs it had, and what was decided.

Kept as an artifact that a reference holds, so that any machine with the same store finds it. Runs nothing and compares
nothing with a registry.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qlora_core.config.pipeline import PipelineConfig
from qlora_core.digest import digest_json
from qlora_core.pipeline.inputs import Inputs, read_inputs, what_changed
from qlora_core.pipeline.job import Job
from qlora_core.store.artifact import StageKey
from qlora_core.store.refs import read_ref, set_ref
from qlora_core.store.store import Store

NO_NEW_DATA = "no new data, no GPU"
_KIND = "decided"
_FILE = "decided.json"
_SUMMARY = ("run_id", "verdict", "reasons", "best", "model_version", "report")


@dataclass(frozen=True)
class InputCheck:
    """What there is to do: `changes` since the run in `last` (None: none was decided yet). `inputs` are today's."""

    inputs: dict[str, Any]
    last: dict[str, Any] | None
    changes: list[str]

    @property
    def unchanged(self) -> bool:
        """Whether a run would only repeat the last decided one."""
        return self.last is not None and not self.changes

    def to_json(self) -> dict[str, Any]:
        """The answer of a run that had nothing to do: the last decision, and no stages or trials of its own."""
        last = self.last or {}
        summary = {name: last.get("summary", {}).get(name) for name in _SUMMARY}
        said = {"skipped": NO_NEW_DATA, "decided_at": last.get("at")}
        return {**summary, "stages": [], "trials": [], "metrics": {}, "headline": [], "varied": [], **said}


def check_inputs(config: PipelineConfig) -> InputCheck:
    """Compare today's inputs with those of the last decided run of the same registered model in the same store."""
    inputs = read_inputs(config)
    last = last_decided(Job(config).store, config.registry.model_name)
    return InputCheck(
        inputs, last, ["no run was decided yet"] if last is None else what_changed(last["inputs"], inputs)
    )


def last_decided(store: Store, model_name: str) -> dict[str, Any] | None:
    """What `record_decided` wrote last: {"at", "inputs", "summary"}; None where it never did, or it was lost."""
    ref = read_ref(store.backend, _KIND, model_name)
    for address in ref.addresses if ref is not None else ():
        artifact = store.get_at(address) if address.split("/")[2] == _KIND else None
        if artifact is not None:
            return json.loads((artifact.path / _FILE).read_text(encoding="utf-8"))
    return None


def record_decided(store: Store, model_name: str, inputs: Inputs, summary: dict[str, Any]) -> None:
    """Put a decided run on record, in the place of the one before. `inputs` as they were before the run read them.

    A run that found every stage finished decided nothing new: the record stays, and the store is only read.
    """
    said = {name: summary.get(name) for name in _SUMMARY}
    last = last_decided(store, model_name)
    if last is not None and last["inputs"] == dict(inputs) and _decision(last["summary"]) == _decision(said):
        return
    document = {"at": datetime.now(UTC).isoformat(timespec="seconds"), "inputs": dict(inputs), "summary": said}

    def build(out: Path) -> None:
        (out / _FILE).write_text(json.dumps(document, indent=1, allow_nan=False), encoding="utf-8")

    artifact, _ = store.get_or_build(StageKey(_KIND, "1", {}, {"document": digest_json(document)}), build)
    note = f"run {summary['run_id']}: {summary['verdict']}"
    set_ref(store.backend, _KIND, model_name, [artifact.manifest.address], note)


def _decision(summary: Mapping[str, Any]) -> dict[str, Any]:
    """A summary without what is another in each run that comes to the same decision."""
    return {name: value for name, value in summary.items() if name not in ("run_id", "report")}
