"""The whole job on a real pretrained model and real instruction data; skips where they are not beside the checkout."""

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]
CONFIG = """\
data:
  sources: [{chat}, {sums}]
  split: {{validation: 0.02, test: 0.03}}
  tags: {{languages: [en, de, fr, es, nl]}}  # among all 75, telling one takes six times as long
base: {{model: {base}}}
train: {{lora_rank: 8, max_steps: 40, micro_batch_size: 4, gradient_accumulation_steps: 1, learning_rate: 3e-3}}
sweep: {{space: {{learning_rate: [1e-3, 5e-3]}}, candidates: 2, pruning: {{enabled: false}}}}
evaluate: {{max_rows: 60, max_prompts: 4, max_new_tokens: 16}}
compute: {{workers: 1}}
"""
Qlora = Callable[..., "subprocess.CompletedProcess[str]"]


def test_run_lowers_heldout_loss_and_registers(
    shared_data: Path, qlora: Qlora, prefect_server: dict[str, str], tmp_path: Path
) -> None:
    # Two sets of unlike form and length in one run: instructions, and sums with worked answers.
    rows = {"chat": shared_data / "sft" / "dolly_3k.json", "sums": shared_data / "sft" / "gsm8k_train.jsonl"}
    config = tmp_path / "pipeline.yaml"
    config.write_text(CONFIG.format(**rows, base=shared_data / "models" / "stories260K-hf"))
    done = qlora("run", config, "--json", env=prefect_server)
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(f"read {file.name} as " in done.stderr for file in rows.values())
    summary = json.loads(done.stdout)
    heldout = summary["metrics"]["heldout"]
    assert heldout["adapter_loss"] < heldout["base_loss"] - 0.1
    assert heldout["gain_low"] > 0
    assert (summary["verdict"], summary["model_version"]) == ("PROMOTE", "1")
    report = Path(summary["report"]).read_text()
    assert "<html" in report
    best, other = json.loads(qlora("evaluate", config, "--json").stdout)["candidates"]
    assert {best["trial"], other["trial"]} == {trial["id"] for trial in summary["trials"]}
    assert best["heldout"] == heldout
    assert other["heldout"]["gain_low"] > 0 and other["heldout"]["rows"] == heldout["rows"]
    assert other["heldout"]["adapter_loss"] != heldout["adapter_loss"]
    assert all(f"<td>{one['trial']}</td>" in report for one in (best, other))
    assert re.findall(r'(?:src|href)="https?:', report) == []


def test_quantize_then_perplexity_meets_the_reference_losses(shared_data: Path, qlora: Qlora, tmp_path: Path) -> None:
    # 1.2664 and 1.3791: data/README.md, each story alone from its BOS, 1,804 predicted tokens.
    base, text = shared_data / "models" / "stories260K-hf", shared_data / "text" / "tinystories_sample.txt"
    before = json.loads(qlora("perplexity", base, "--text", text, "--json").stdout)
    made = json.loads(qlora("quantize", base, tmp_path / "nf4", "--json").stdout)
    after = json.loads(qlora("perplexity", tmp_path / "nf4", "--text", text, "--json").stdout)
    assert (before["tokens"], after["tokens"]) == (1804, 1804)
    assert before["loss"] == pytest.approx(1.2664, abs=5e-4)
    assert after["loss"] == pytest.approx(1.3791, abs=5e-4)
    assert made["bits_per_parameter"] == pytest.approx(4.127, abs=0.01)
