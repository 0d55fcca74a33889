"""Every real set is read in the format it is in; the counts are those that were taken by hand."""

from collections import Counter
from pathlib import Path
from typing import Literal

import pytest

from qlora_core.config.curation import ReadersConfig
from qlora_core.data.reading import SourceReading, read_source, read_sources
from qlora_core.data.source_files import SourceFile, list_source_files

pytestmark = pytest.mark.integration

SETS = [
    ("sft/dolly_3k.json", "alpaca", 2996),
    ("sft/dolly_hhrlhf_small.jsonl", "prompt/response", 1000),
    ("sft/gpteacher_toolformer_sim09.json", "alpaca", 5959),
    ("sft/gsm8k_train.jsonl", "prompt/response", 7473),
    ("sft/lf_v1_sft_demo.jsonl", "messages", 500),
    ("sft/self_instruct_seed_tasks.jsonl", "self-instruct", 175),
    ("sft/sharegpt_dummy_conversation.json", "sharegpt", 500),
    ("eval/TruthfulQA.csv", "prompt/response", 790),
    ("eval/mmlu_zero_shot_val.json", "prompt/response", 1531),
]


def read(path: Path, **settings: str) -> SourceReading:
    return read_source(SourceFile(path.name, path), ReadersConfig.model_validate(settings))


@pytest.mark.parametrize(("name", "form", "rows"), SETS)
def test_real_set_is_read_whole(shared_data: Path, name: str, form: str, rows: int) -> None:
    reading = read(shared_data / name)

    assert (reading.format, len(reading.rows), reading.quarantined) == (form, rows, [])


@pytest.mark.parametrize(
    ("rule", "counts", "trimmed"),
    [
        ("best_path", {"trees": 100, "paths": 100, "ending_on_user": 39, "after_trimming": 100}, 39),
        ("best_replies", {"trees": 100, "paths": 123, "ending_on_user": 57, "after_trimming": 108}, 42),
    ],
)
def test_tree_rules_have_their_known_counts(
    shared_data: Path, rule: Literal["best_path", "best_replies"], counts: dict[str, int], trimmed: int
) -> None:
    reading = read(shared_data / "sft/oasst_en_100_tree.jsonl", oasst=rule)

    assert reading.rule_counts == counts
    assert (len(reading.rows), reading.trimmed) == (counts["after_trimming"], trimmed)
    assert len({row.group_keys for row in reading.rows}) == 100


def test_preference_set_keeps_all_but_its_nine_odd_pairs(shared_data: Path) -> None:
    reading = read(shared_data / "pref/hh_harmless_base_test.jsonl.gz")

    kinds = Counter(entry.kind for entry in reading.quarantined)
    assert (reading.format, reading.rows_in, len(reading.rows)) == ("preference", 2312, 2303)
    assert kinds == {"diverging pair": 5, "empty answer": 4}
    assert all(row.rejected for row in reading.rows)


def test_folder_of_all_formats_is_accounted_for(shared_data: Path) -> None:
    readings = read_sources(list_source_files([shared_data / "sft"]), ReadersConfig())

    assert len(readings) == 8
    assert all(reading.rows_in == len(reading.rows) + len(reading.quarantined) for reading in readings)
