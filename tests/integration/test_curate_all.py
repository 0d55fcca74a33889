"""All the instruction data beside the checkout in one folder, curated against GSM8K's test set; skips without it."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]
Qlora = Callable[..., "subprocess.CompletedProcess[str]"]
CONFIG = """\
data:
  sources: [{data}/sft]
  max_tokens: 4096
  over_long: cut
  tags: {{language: false}}  # it drops nothing here, and among 75 languages it takes longer than all the rest
base: {{model: {data}/models/stories260K-hf}}
evaluate: {{prompt_sets: [{data}/eval/gsm8k_test.jsonl]}}
"""
# Rows as counted in the files themselves.
ROWS = {
    "dolly_3k.json": 2996,
    "dolly_hhrlhf_small.jsonl": 1000,
    "gpteacher_toolformer_sim09.json": 5959,
    "gsm8k_train.jsonl": 7473,
    "lf_v1_sft_demo.jsonl": 500,
    "oasst_en_100_tree.jsonl": 100,
    "self_instruct_seed_tasks.jsonl": 175,
    "sharegpt_dummy_conversation.json": 500,
}


def test_every_row_of_every_set_is_accounted_for(shared_data: Path, qlora: Qlora, tmp_path: Path) -> None:
    config = tmp_path / "pipeline.yaml"
    config.write_text(CONFIG.format(data=shared_data))
    done = qlora("curate", config, "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    folder = Path(json.loads(done.stdout)["path"])
    curation = json.loads((folder / "curation.json").read_text())

    sources = {name.removeprefix("sft/"): counts for name, counts in curation["by_source"].items()}
    assert {name: counts["in"] for name, counts in sources.items()} == ROWS
    for name, counts in sources.items():
        assert counts["in"] == counts["kept"] + counts["dropped"] + counts["quarantined"], name
        assert counts["dropped"] == sum(counts["reasons"].values()), name
    assert curation["rows"]["in"] == sum(ROWS.values())
    assert curation["rows"]["kept"] == sum(curation["splits"].values())
    # 44 preambles cover the whole Toolformer set; what differs behind them is not the same.
    assert sources["gpteacher_toolformer_sim09.json"]["kept"] > 0.99 * 5959
    # The data's description names these lines; under one in a hundred rows.
    dropped = pq.read_table(folder / "dropped.parquet").to_pylist()
    assert [drop["line"] for drop in dropped if drop["rule"] == "contamination"] == [21, 407, 1315, 5163]
    assert sources["oasst_en_100_tree.jsonl"]["rule_counts"]["paths"] == 100
