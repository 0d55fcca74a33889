"""T5 from one config: curated, quantized, swept and evaluated, and its adapter loaded by stock PEFT."""

import json
import random
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSeq2SeqLM, T5Config, T5ForConditionalGeneration

from qlora_core.config.load import load_config
from qlora_core.demo.text import pretraining_documents
from qlora_core.demo.tokenizer import PAD_TOKEN, STOP_TOKEN, train_tokenizer
from qlora_core.model.adapter import golden_logits, read_golden
from qlora_core.model.base import load_quantized
from qlora_core.pipeline.pipeline import Pipeline
from qlora_core.pipeline.promotion import Promotion
from qlora_core.registry.connection import connect

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    folder = tmp_path_factory.mktemp("t5")
    documents = [text for text in pretraining_documents(400, random.Random(0)) if isinstance(text, str)]
    tokenizer = train_tokenizer(documents, vocab_size=512, max_tokens=128)
    vocabulary = tokenizer.get_vocab()
    sizes: dict[str, Any] = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
    sizes |= {"vocab_size": len(tokenizer), "n_positions": 128, "feed_forward_proj": "gated-gelu"}
    special = {"pad_token_id": PAD_TOKEN, "eos_token_id": STOP_TOKEN, "decoder_start_token_id": PAD_TOKEN}
    sizes |= {"tie_word_embeddings": False, **{name: vocabulary[token] for name, token in special.items()}}
    config = T5Config(**sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        T5ForConditionalGeneration(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    words = sorted({word for text in documents for word in text.split() if word.isalpha()})[:90]
    rows = [
        {"instruction": f"Say {a} after {b}.", "output": f"{b} {a}"} for a, b in zip(words, words[7:], strict=False)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings: dict[str, Any] = {
        "data": {"sources": ["rows.jsonl"]},
        "base": {"model": "base"},
        "store": "store",
        "train": {"max_steps": 12, "lora_rank": 4, "learning_rate": 0.01, "micro_batch_size": 4},
        "sweep": {"space": {"learning_rate": [1e-6, 1e-2]}},
        "compute": {"workers": 1},
        "evaluate": {"judge": {"kind": "offline"}},
    }
    (folder / "pipeline.yaml").write_text(json.dumps(settings))
    return Pipeline(load_config(folder / "pipeline.yaml", []))


def test_a_sweep_over_t5_trains_and_its_adapter_loads_in_stock_peft(pipeline: Pipeline) -> None:
    swept = pipeline.document("sweep", "sweep.json")
    losses = {trial["params"]["learning_rate"]: trial["rungs"][-1]["loss"] for trial in swept["trials"]}
    assert losses[1e-2] < losses[1e-6] - 0.05
    quantized = pipeline.run("quantize").artifact.path
    folder = pipeline.run("sweep").artifact.path / "adapter"
    loaded: Any = load_quantized(quantized, precision="float32")
    golden = read_golden(folder)
    adapted = PeftModel.from_pretrained(loaded, str(folder)).eval()
    for found, stored in zip(golden_logits(adapted, golden.prompts), golden.logits, strict=True):
        torch.testing.assert_close(found, stored, atol=1e-4, rtol=1e-4)
    assert AutoModelForSeq2SeqLM.from_pretrained(quantized).config.quantization_config.load_in_4bit


def test_the_best_adapter_is_measured_on_held_out_rows(pipeline: Pipeline) -> None:
    metrics = pipeline.document("evaluate", "evaluation.json")["metrics"]
    assert metrics["heldout"]["adapter_loss"] < metrics["heldout"]["base_loss"]
    assert metrics["exact_match"]["prompts"] > 0


def test_every_step_of_every_trial_was_logged_while_the_sweep_trained(pipeline: Pipeline) -> None:
    swept = pipeline.document("sweep", "sweep.json")
    client = connect(pipeline.job.config.tracking_uri)
    experiment = client.get_experiment_by_name(pipeline.job.config.registry.experiment)
    assert experiment is not None
    runs = {str(run.info.run_name): run for run in client.search_runs([experiment.experiment_id])}
    assert len(runs) == 1 + len(swept["trials"])
    for trial in swept["trials"]:
        run = runs[trial["id"]]
        assert run.info.status == {"complete": "FINISHED", "pruned": "KILLED"}[trial["state"]]
        for name in ("loss", "learning_rate", "grad_norm", "tokens_per_s", "memory_bytes"):
            points = client.get_metric_history(run.info.run_id, f"train/{name}")
            assert sorted(point.step for point in points) == list(range(1, trial["steps"] + 1))


def test_it_is_registered_and_loads_in_a_clean_process(pipeline: Pipeline) -> None:
    promotion = Promotion(pipeline)
    registration, cached = promotion.register()
    assert (registration["version"], cached) == ("1", False)
    version = connect(pipeline.job.config.tracking_uri).get_model_version(pipeline.job.config.registry.model_name, "1")
    assert "candidate" in version.aliases or "champion" in version.aliases or "challenger" in version.aliases
