"""The drift report: figures against a slow exact sum, calm under chance, loud under a real change."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_core.data.drift import drift_lines, drift_report, stability
from qlora_core.data.shards import shard_name
from qlora_core.data.split import SIDES

TURN = pa.struct([("role", pa.string()), ("content", pa.string())])
SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "source": pa.string(),
        "line": pa.int64(),
        "category": pa.string(),
        "language": pa.string(),
        "messages": pa.list_(TURN),
        "input_ids": pa.list_(pa.int32()),
        "tokens": pa.int32(),
    }
)
COUNTS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), min_size=1, max_size=8)


def rows(number: int, seed: int, categories: Sequence[str] = ("a", "b", "c"), longest: int = 30) -> list[Any]:
    random = np.random.default_rng(seed)
    made = []
    for index in range(number):
        length = int(random.integers(5, longest))
        made.append(
            {
                "id": f"{seed}-{index}",
                "source": "rows.json",
                "line": index,
                "category": categories[int(random.integers(len(categories)))],
                "language": "en",
                "messages": [{"role": "user", "content": f"{seed} {index}"}, {"role": "assistant", "content": "x"}],
                "input_ids": random.integers(0, 50, length).tolist(),
                "tokens": length,
            }
        )
    return made


def write(folder: Path, train: list[Any]) -> Path:
    folder.mkdir()
    for side in SIDES:
        table = pa.Table.from_pylist(train if side == "train" else [], SCHEMA)
        pq.write_table(table, folder / shard_name(side, 0, 1))
    pq.write_table(
        pa.table({"id": pa.array([], pa.string()), "rule": pa.array([], pa.string())}), folder / "dropped.parquet"
    )
    (folder / "curation.json").write_text(json.dumps({"digest": folder.name, "reasons": {}}))
    return folder


@given(COUNTS)
@settings(max_examples=200, deadline=None)
def test_index_is_the_sum_it_says(pairs: list[tuple[int, int]]) -> None:
    before, after = ([pair[side] for pair in pairs] for side in (0, 1))
    found = stability(before, after)
    kept = [pair for pair in pairs if sum(pair)]
    n, m = (sum(pair[side] for pair in kept) for side in (0, 1))
    if len(kept) < 2 or not n or not m:
        assert (found.psi, found.p_value, found.level) == (0.0, 1.0, "stable")
        return
    exact = math.fsum(
        ((b + 0.5) / (m + len(kept) / 2) - (a + 0.5) / (n + len(kept) / 2))
        * math.log(((b + 0.5) / (m + len(kept) / 2)) / ((a + 0.5) / (n + len(kept) / 2)))
        for a, b in kept
    )
    assert found.psi == pytest.approx(exact, abs=1e-12)
    assert found.expected == pytest.approx((1 / n + 1 / m) * (len(kept) - 1))
    assert stability(after, before).psi == pytest.approx(found.psi, abs=1e-12)


def test_equal_shares_have_no_index_and_a_known_case_has_its_value() -> None:
    assert stability([50, 50], [500, 500]).psi == pytest.approx(0.0, abs=1e-12)
    # (0.5 - 0.25) ln(0.5 / 0.25) twice over, (0.25 -> 0.5, 0.75 -> 0.5), by hand: 0.27465
    found = stability([250_000, 750_000], [500_000, 500_000])
    assert found.psi == pytest.approx(0.25 * math.log(2) + 0.25 * math.log(1.5), rel=1e-5)
    assert found.level == "drifted"


def test_chance_alone_is_called_drift_about_as_often_as_the_test_says() -> None:
    random = np.random.default_rng(0)
    shares = [0.4, 0.3, 0.2, 0.1]
    tries = 2000
    p_values = [
        stability(random.multinomial(80, shares).tolist(), random.multinomial(120, shares).tolist()).p_value
        for _ in range(tries)
    ]
    share = np.mean([p < 0.05 for p in p_values])
    assert 0.03 < share < 0.07
    # The thresholds alone would cry wolf: an index above 0.1 is common at this size.
    large = [
        stability(random.multinomial(40, shares).tolist(), random.multinomial(40, shares).tolist())
        for _ in range(tries)
    ]
    assert np.mean([one.psi > 0.1 for one in large]) > 0.2
    assert np.mean([one.level != "stable" for one in large]) < 0.02


def test_same_distribution_is_stable_and_another_is_named(tmp_path: Path) -> None:
    old = write(tmp_path / "old", rows(400, 1))
    calm = drift_report(old, write(tmp_path / "calm", rows(400, 2)), same_tokenizer=True)
    assert calm["level"] == "stable"
    assert calm["rows_changed"] == {"added": 400, "removed": 400, "changed_answers": 0}
    moved = rows(400, 3, categories=("a", "a", "a", "d"), longest=80)
    loud = drift_report(old, write(tmp_path / "loud", moved), same_tokenizer=True)
    assert loud["level"] == "drifted"
    assert {name for name in ("categories", "lengths") if loud[name]["level"] == "drifted"} == {"categories", "lengths"}
    assert loud["sources"]["level"] == loud["languages"]["level"] == "stable"
    assert {one["name"] for one in loud["categories"]["shares"]} == {"a", "b", "c", "d"}
    text = "\n".join(drift_lines(loud))
    assert "data drifted" in text and "categories drifted" in text and "sources stable" in text
    json.dumps(loud, allow_nan=False)


def test_vocabulary_counts_what_was_never_seen(tmp_path: Path) -> None:
    one = write(tmp_path / "one", [{**rows(1, 1)[0], "input_ids": [0, 1, 1, 2], "tokens": 4}])
    two = write(tmp_path / "two", [{**rows(1, 2)[0], "input_ids": [1, 1, 1, 9], "tokens": 4}])
    words = drift_report(one, two, same_tokenizer=True)["vocabulary"]
    assert words["new_share"] == 0.25
    p, q = {0: 0.25, 1: 0.5, 2: 0.25}, {1: 0.75, 9: 0.25}
    exact = sum(
        share / 2 * math.log2(share / ((p.get(word, 0) + q.get(word, 0)) / 2))
        for side in (p, q)
        for word, share in side.items()
    )
    assert words["divergence_bits"] == pytest.approx(exact, abs=1e-12)
    assert drift_report(one, two, same_tokenizer=False)["vocabulary"] is None
    assert drift_report(one, one, same_tokenizer=True)["vocabulary"] == {"divergence_bits": 0.0, "new_share": 0.0}


def test_empty_set_is_compared_without_a_fault(tmp_path: Path) -> None:
    report = drift_report(write(tmp_path / "old", []), write(tmp_path / "new", rows(10, 1)), same_tokenizer=True)
    assert report["level"] == "stable" and report["rows"] == {"before": 0, "after": 10}
    assert report["vocabulary"] is None
    assert drift_lines(report)
