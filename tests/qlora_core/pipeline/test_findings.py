"""Drift is told against the very data that the champion's registration keeps, or said to be unknown."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qlora_core.data.shards import shard_name
from qlora_core.data.split import SIDES
from qlora_core.pipeline.findings import drift_since, finding_lines
from qlora_core.registry.champion import Champion
from qlora_core.store.artifact import Artifact, StageKey
from qlora_core.store.refs import add_ref
from qlora_core.store.store import Store, open_store

SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "source": pa.string(),
        "line": pa.int64(),
        "category": pa.string(),
        "messages": pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])),
        "input_ids": pa.list_(pa.int32()),
        "tokens": pa.int32(),
    }
)
NO_SLICES: dict[str, Any] = {"slices": [], "requests": []}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(f"file://{tmp_path / 'store'}", tmp_path / "cache")


def curated(store: Store, name: str, category: str, tokenizer: str = "t") -> Artifact:
    def build(out: Path) -> None:
        turns = [{"role": "user", "content": name}, {"role": "assistant", "content": "x"}]
        row = {"source": "a", "line": 1, "category": category, "messages": turns, "input_ids": [1, 2], "tokens": 2}
        rows = [{"id": f"{name}-{number}", **row} for number in range(50)]
        for side in SIDES:
            part = pa.Table.from_pylist(rows if side == "train" else [], SCHEMA)
            pq.write_table(part, out / shard_name(side, 0, 1))
        pq.write_table(
            pa.table({"id": pa.array([], pa.string()), "rule": pa.array([], pa.string())}), out / "dropped.parquet"
        )
        (out / "curation.json").write_text(json.dumps({"digest": name, "reasons": {}}))

    artifact, _ = store.get_or_build(StageKey("curate", "3", {"name": name}, {"tokenizer": tokenizer}), build)
    return artifact


def champion(data: str = "d" * 64) -> Champion:
    return Champion("4", Path("/nowhere"), "a" * 64, "b" * 64, data, "run-4")


def test_data_of_the_champions_registration_are_what_is_compared_with(store: Store) -> None:
    before, now = curated(store, "before", "math"), curated(store, "now", "prose")
    add_ref(store.backend, "model", "assistant/run-4", [before.manifest.address])
    add_ref(store.backend, "model", "assistant/run-5", [now.manifest.address])
    found = drift_since(store, "assistant", champion(), now)
    assert found is not None
    assert (found["champion"], found["level"], found["categories"]["level"]) == ("4", "drifted", "drifted")
    assert found["vocabulary"]["new_share"] == 0.0
    moved, weak = finding_lines(found, NO_SLICES)
    assert moved[0].startswith("data drifted") and weak == []


def test_other_tokenizer_leaves_the_vocabulary_out(store: Store) -> None:
    before = curated(store, "before", "math", tokenizer="another")
    add_ref(store.backend, "model", "assistant/run-4", [before.manifest.address])
    found = drift_since(store, "assistant", champion(), curated(store, "now", "math"))
    assert found is not None and found["vocabulary"] is None and found["level"] == "stable"


def test_lost_data_are_said_to_be_lost_and_no_champion_has_none(store: Store) -> None:
    now = curated(store, "now", "math")
    found = drift_since(store, "assistant", champion(), now)
    assert found is not None and "not in" in found["unavailable"]
    assert finding_lines(found, NO_SLICES)[0] == [found["unavailable"]]
    assert drift_since(store, "assistant", None, now) is None
    assert "no champion yet" in finding_lines(None, NO_SLICES)[0][0]
