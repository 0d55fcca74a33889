"""What a decision is shown with: how the data moved since the champion learned, and where the adapter is weak.

Decides nothing. Where the champion's data are gone the drift is said to be unknown, and why.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_core.config.pipeline import PipelineConfig
from qlora_core.registry.champion import Champion
from qlora_core.store.artifact import Artifact
from qlora_core.store.refs import read_ref
from qlora_core.store.store import Store

DRIFT_FILE = "drift.json"
SLICES_FILE = "worst_slices.json"


def drift_since(store: Store, model_name: str, champion: Champion | None, curated: Artifact) -> dict[str, Any] | None:
    """The drift from the champion's data to `curated`, as `drift_report` gives it, with `champion`: the version.

    None without a champion; {"champion", "unavailable": why} where its data are not in this store any more.
    """
    if champion is None:
        return None
    from qlora_core.data.drift import drift_report

    before = _data_of(store, model_name, champion)
    if before is None:
        why = (
            f"the data of champion version {champion.version} ({champion.data_digest[:12]}) are not in {store.location}"
        )
        return {"champion": champion.version, "unavailable": why}
    same = before.manifest.inputs.get("tokenizer") == curated.manifest.inputs.get("tokenizer")
    return {"champion": champion.version, **drift_report(before.path, curated.path, same_tokenizer=same)}


def weak_slices(
    config: PipelineConfig,
    evaluation: Mapping[str, Any],
    comparison: Mapping[str, Any] | None,
    inputs: Mapping[str, Artifact],
) -> dict[str, Any]:
    """The worst slices against the champion (without one that can be compared: the base), as `diagnose` gives them."""
    from qlora_core.evaluation.diagnosis import BY, diagnose

    items = (comparison or {}).get("items") or evaluation["items"]
    lines = (inputs["evaluate"].path / "answers.jsonl").read_text(encoding="utf-8").split("\n")
    settings = config.evaluate
    return diagnose(
        items,
        [json.loads(line) for line in lines if line],
        {by: _train_rows(inputs["curate"].path, by) for by in BY},
        effect=config.gate.slices.margin,
        confidence=settings.confidence,
        resamples=settings.resamples,
        seed=settings.seed,
    )


def finding_lines(drift: Mapping[str, Any] | None, diagnosis: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Both in sentences, for people."""
    from qlora_core.data.drift import drift_lines
    from qlora_core.evaluation.diagnosis import diagnosis_lines

    if drift is None:
        return ["no champion yet, so there are no earlier data to compare with"], diagnosis_lines(diagnosis)
    moved = [drift["unavailable"]] if "unavailable" in drift else drift_lines(drift)
    return moved, diagnosis_lines(diagnosis)


def _data_of(store: Store, model_name: str, champion: Champion) -> Artifact | None:
    """The curated data that the version's reference keeps."""
    ref = read_ref(store.backend, "model", f"{model_name}/{champion.run_key}")
    for address in ref.addresses if ref is not None else ():
        artifact = store.get_at(address) if address.split("/")[2] == "curate" else None
        if artifact is not None:
            return artifact
    return None


def _train_rows(folder: Path, by: str) -> dict[str, int]:
    from qlora_core.data.split_columns import read_columns, split_schema

    if by not in split_schema(folder, "train").names:
        return {}
    counts = read_columns(folder, "train", [by]).column(by).drop_null().value_counts()
    return {str(entry["values"]): int(entry["counts"]) for entry in counts.to_pylist()}
