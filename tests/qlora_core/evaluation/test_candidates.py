"""Candidates evaluated together over one base: each as it is alone, and every slice as computed by hand."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import pytest
import torch
from peft import LoraConfig, get_peft_model

from qlora_core.config.data import DataConfig
from qlora_core.config.evaluate import EvaluateConfig
from qlora_core.config.quantize import QuantizeConfig
from qlora_core.data.curate import curate
from qlora_core.data.dataset import PromptRow, RowLabels, read_labels
from qlora_core.errors import EvaluationError, ModelError
from qlora_core.evaluation.candidates import Candidate, Scored, compare_candidates
from qlora_core.evaluation.evaluate import evaluate_adapter
from qlora_core.evaluation.heldout import RowLoss
from qlora_core.model.adapter_set import NamedAdapter
from qlora_core.model.base import load_quantized
from qlora_core.quantization.quantize import quantize_checkpoint

TRIALS = {"t002": (4, 0.05, {}), "t000": (2, 0.2, {"use_rslora": True}), "t001": (8, 0.1, {"use_dora": True})}
CONFIG = EvaluateConfig.model_validate(
    {"max_prompts": 6, "max_new_tokens": 8, "resamples": 200, "judge": {"kind": "none"}}
)


class Inputs(NamedTuple):
    """The folders an evaluation reads; `adapters` by trial."""

    quantized: Path
    curated: Path
    adapters: dict[str, Path]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Inputs:
    folder = tmp_path_factory.mktemp("candidates")
    rows = [
        {"instruction": f"Add {a} and {b}.", "output": str(a + b), "category": ("even", "odd")[b % 2]}
        for a in range(8)
        for b in range(8)
    ]
    source = folder / "rows.json"
    source.write_text(json.dumps(rows))
    config = DataConfig.model_validate({"sources": [str(source)], "split": {"validation": 0.1, "test": 0.4}})
    (folder / "curated").mkdir()
    curate(config, [source], tiny_base, 128, folder / "curated", None)
    quantize_checkpoint(tiny_base, folder / "quantized", QuantizeConfig())
    for seed, (trial, (rank, scale, kind)) in enumerate(TRIALS.items()):
        torch.manual_seed(seed)
        settings: dict[str, Any] = {"r": rank, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **kind}
        model = get_peft_model(load_quantized(folder / "quantized"), LoraConfig(**settings))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=scale)
        model.save_pretrained(str(folder / trial))
    return Inputs(folder / "quantized", folder / "curated", {trial: folder / trial for trial in TRIALS})


def evaluate(inputs: Inputs, out: Path, *trials: str, **settings: Any) -> dict[str, Any]:
    named = [NamedAdapter(trial, inputs.adapters[trial]) for trial in trials]
    settings = {"candidates": named, "environment": {}, **settings}
    return evaluate_adapter(CONFIG, inputs.quantized, named[0].folder, inputs.curated, out, **settings)


def answers_of(out: Path, trial: str) -> list[str]:
    rows = [json.loads(line) for line in (out / "candidate_answers.jsonl").read_text().split("\n") if line]
    return [row["answer"] for row in rows if row["trial"] == trial]


def test_each_candidate_scores_and_answers_as_it_does_alone(inputs: Inputs, tmp_path: Path) -> None:
    together = evaluate(inputs, tmp_path / "all", *TRIALS)
    assert [entry["trial"] for entry in together["candidates"]] == list(TRIALS)
    for entry in together["candidates"]:
        trial = entry["trial"]
        alone = evaluate(inputs, tmp_path / trial, trial)
        assert entry["heldout"] == pytest.approx(alone["metrics"]["heldout"], abs=1e-5)
        assert entry["exact_match"] == alone["metrics"]["exact_match"]
        assert entry["adapter_digest"] == alone["adapter_digest"]
        written = [json.loads(line) for line in (tmp_path / trial / "answers.jsonl").read_text().split("\n") if line]
        assert answers_of(tmp_path / "all", trial) == [row["adapter"] for row in written]
        rows = pq.read_table(tmp_path / trial / "rows.parquet")
        kept = pq.read_table(tmp_path / "all" / "candidate_rows.parquet", filters=[("trial", "=", trial)])
        assert kept["id"].to_pylist() == rows["id"].to_pylist()
        assert kept["nats"].to_pylist() == pytest.approx(rows["adapter_nats"].to_pylist(), abs=1e-4)
    # They are not the same adapter three times
    losses = [entry["heldout"]["adapter_loss"] for entry in together["candidates"]]
    assert min(abs(a - b) for a, b in zip(losses, [*losses[1:], losses[0]], strict=True)) > 1e-3


def test_the_adapters_own_figures_do_not_depend_on_the_other_candidates(inputs: Inputs, tmp_path: Path) -> None:
    together = evaluate(inputs, tmp_path / "all", *TRIALS)
    alone = evaluate(inputs, tmp_path / "one", "t002")
    assert together["metrics"]["heldout"] == pytest.approx(alone["metrics"]["heldout"], abs=1e-5)
    assert together["metrics"]["heldout"] == together["candidates"][0]["heldout"]
    assert (tmp_path / "all" / "answers.jsonl").read_bytes() == (tmp_path / "one" / "answers.jsonl").read_bytes()
    assert len(alone["candidates"]) == 1
    assert not list((tmp_path / "one").glob("candidate_*"))


def test_slices_hold_every_labelled_row_once(inputs: Inputs, tmp_path: Path) -> None:
    (first, *_) = evaluate(inputs, tmp_path, *TRIALS)["candidates"]
    labels = read_labels(inputs.curated, "test")
    found = first["slices"]["category"]
    assert set(found) == {label.category for label in labels.values()} == {"even", "odd"}
    assert sum(part["rows"] for part in found.values()) == first["heldout"]["rows"] == len(labels)
    assert sum(part["exact_match"]["prompts"] for part in found.values()) == first["exact_match"]["prompts"]


def test_a_trial_named_twice_is_refused(inputs: Inputs, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="'t000' is given twice"):
        evaluate(inputs, tmp_path, "t002", "t000", "t000")


def scored(nats: list[float], answers: list[str]) -> Scored:
    return Scored([RowLoss(f"r{place}", value, 2) for place, value in enumerate(nats)], answers)


PROMPTS = [PromptRow(f"r{place}", None, "?", str(place), []) for place in range(4)]
LABELS = {
    "r0": RowLabels("a", "en"),
    "r1": RowLabels("a", "en"),
    "r2": RowLabels("b", "en"),
    "r3": RowLabels(None, None),
}


def test_figures_of_slices_by_hand() -> None:
    base = scored([4.0, 6.0, 8.0, 2.0], ["0", "x", "x", "x"])
    candidate = Candidate("t000", "d" * 64, scored([2.0, 2.0, 9.0, 2.0], ["0", "1", "x", "3"]))
    (entry,) = compare_candidates(CONFIG, LABELS, PROMPTS, base, [candidate])
    assert (entry["heldout"]["base_loss"], entry["heldout"]["adapter_loss"]) == (2.5, 1.875)
    assert entry["heldout"]["gain"] == 0.625  # (2 + 4 - 1 + 0) / 8
    a, b = entry["slices"]["category"]["a"], entry["slices"]["category"]["b"]
    assert (a["rows"], a["heldout"]["gain"]) == (2, 1.5)
    assert a["heldout"]["gain_low"] == 1.0 and a["heldout"]["gain_high"] == 2.0
    assert (a["exact_match"]["base"], a["exact_match"]["adapter"]) == (0.5, 1.0)
    assert (b["rows"], b["heldout"]) == (1, None)  # one row has no interval
    assert b["exact_match"]["prompts"] == 1
    assert set(entry["slices"]["language"]) == {"en"}
    assert compare_candidates(CONFIG, LABELS, PROMPTS, base, []) == []


def test_a_loss_that_is_not_finite_stops() -> None:
    base = scored([4.0, 6.0], ["0", "1"])
    broken = Candidate("t000", "d" * 64, scored([2.0, float("nan")], ["0", "1"]))
    with pytest.raises(EvaluationError, match="'r1' is not finite"):
        compare_candidates(CONFIG, LABELS, PROMPTS[:2], base, [broken])
