import json
import socket
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest
import torch
from peft import LoraConfig, get_peft_model

from qlora_core.config.data import DataConfig
from qlora_core.config.evaluate import EvaluateConfig
from qlora_core.config.quantize import QuantizeConfig
from qlora_core.data.curate import curate
from qlora_core.data.dataset import read_split
from qlora_core.errors import EvaluationError, JudgeError, JudgeUnavailableError
from qlora_core.evaluation.evaluate import compare_adapters, evaluate_adapter, question_text, read_row_losses
from qlora_core.evaluation.judge_cache import VerdictCache
from qlora_core.evaluation.verdict import read_verdicts
from qlora_core.model.base import load_quantized
from qlora_core.quantization.quantize import quantize_checkpoint

if TYPE_CHECKING:
    from conftest import JudgeServer

FILES = {"rows.parquet", "answers.jsonl", "verdicts.jsonl", "ratings.json", "evaluation.json"}


class Inputs(NamedTuple):
    """The folders an evaluation reads."""

    quantized: Path
    adapter: Path
    other_adapter: Path
    curated: Path


def _write_adapter(quantized: Path, out: Path, scale: float) -> None:
    torch.manual_seed(0)
    model = get_peft_model(
        load_quantized(quantized), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=scale)
    model.save_pretrained(str(out))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Inputs:
    folder = tmp_path_factory.mktemp("evaluate")
    rows = [{"instruction": f"Add {a} and {b}.", "output": str(a + b)} for a in range(8) for b in range(8)]
    source = folder / "rows.json"
    source.write_text(json.dumps(rows))
    config = DataConfig.model_validate({"sources": [str(source)], "split": {"validation": 0.1, "test": 0.4}})
    (folder / "curated").mkdir()
    curate(config, [source], tiny_base, 128, folder / "curated", None)
    quantize_checkpoint(tiny_base, folder / "quantized", QuantizeConfig())
    for name, scale in (("adapter", 0.05), ("other", 0.2)):
        _write_adapter(folder / "quantized", folder / name, scale)
    return Inputs(folder / "quantized", folder / "adapter", folder / "other", folder / "curated")


def _config(**settings: object) -> EvaluateConfig:
    defaults: dict[str, object] = {
        "max_prompts": 6,
        "max_new_tokens": 8,
        "resamples": 200,
        "judge": {"kind": "offline"},
    }
    return EvaluateConfig.model_validate({**defaults, **settings})


def _evaluate(inputs: Inputs, config: EvaluateConfig, out: Path, **settings: object) -> dict:
    return evaluate_adapter(config, inputs.quantized, inputs.adapter, inputs.curated, out, **settings)  # pyright: ignore[reportArgumentType]


def test_evaluate_offline_writes_every_file_and_the_documented_keys(inputs: Inputs, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = _evaluate(inputs, _config(), out, lineage={"data_digest": "d1"}, environment={})
    assert {path.name for path in out.iterdir()} == FILES
    assert json.loads((out / "evaluation.json").read_text()) == result
    assert (result["data_digest"], result["quantized_base_digest"]) == ("d1", None)
    assert len(result["adapter_digest"]) == 64
    heldout, exact, judge = (result["metrics"][name] for name in ("heldout", "exact_match", "judge"))
    assert heldout["rows"] == len(read_split(inputs.curated, "test"))
    assert heldout["gain"] == pytest.approx(heldout["base_loss"] - heldout["adapter_loss"], abs=1e-9)
    assert heldout["gain_low"] <= heldout["gain"] <= heldout["gain_high"]
    assert heldout["gain"] != 0  # the adapter does something, and the base is the model without it
    assert exact["prompts"] == 6
    assert (judge["kind"], judge["certified"], judge["cost_usd"]) == ("offline", False, 0.0)
    assert judge["scored"] + judge["unscored"] == 12


def test_evaluate_verdicts_are_in_both_orders_and_agree_with_the_answers(inputs: Inputs, tmp_path: Path) -> None:
    _evaluate(inputs, _config(), tmp_path, environment={})
    verdicts = read_verdicts(tmp_path / "verdicts.jsonl")
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [(v.prompt_id, v.first) for v in verdicts] == [(row["prompt_id"], f) for row in answers for f in ("a", "b")]
    assert {(v.model_a, v.model_b) for v in verdicts} == {("adapter", "base")}
    assert answers[0]["question"].startswith("Add ")


def test_evaluate_twice_gives_the_same_figures(inputs: Inputs, tmp_path: Path) -> None:
    first = _evaluate(inputs, _config(), tmp_path / "one", environment={})
    assert _evaluate(inputs, _config(batch_size=3), tmp_path / "two", environment={})["metrics"]["heldout"] == (
        pytest.approx(first["metrics"]["heldout"], abs=1e-5)
    )


def test_evaluate_without_prompts_measures_loss_alone(inputs: Inputs, tmp_path: Path) -> None:
    result = _evaluate(inputs, _config(max_prompts=0, max_rows=5), tmp_path, environment={})
    assert (result["metrics"]["exact_match"], result["metrics"]["judge"], result["ratings"]) == (None, None, {})
    assert result["metrics"]["heldout"]["rows"] == 5
    assert (tmp_path / "verdicts.jsonl").read_text() == ""


def test_evaluate_with_an_endpoint_counts_its_cost(inputs: Inputs, tmp_path: Path, judge_server: "JudgeServer") -> None:
    judge = {
        "base_url": judge_server.url,
        "model": "judge-1",
        "input_usd_per_million": 2,
        "output_usd_per_million": 8,
    }
    environment = {"OPENAI_API_KEY": "sk-canary-77"}
    result = _evaluate(
        inputs,
        _config(judge=judge, max_prompts=4),
        tmp_path / "out",
        environment=environment,
        verdict_cache=VerdictCache(tmp_path / "v.db"),
    )["metrics"]["judge"]
    assert (result["kind"], result["model"], result["unscored"]) == ("openai", "judge-1", 0)
    assert result["cost_usd"] == pytest.approx(judge_server.billed_usd, abs=1e-12)
    assert b"sk-canary-77" not in b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


@pytest.mark.parametrize("fault", ["429", "500"])
def test_evaluate_with_an_overloaded_endpoint_is_no_result_and_goes_on_later(
    inputs: Inputs, tmp_path: Path, judge_server: "JudgeServer", fault: str
) -> None:
    judge = {
        "kind": "openai",
        "base_url": judge_server.url,
        "input_usd_per_million": 0,
        "output_usd_per_million": 0,
        "max_retries": 0,
    }

    def evaluate(out: Path) -> dict:
        config = _config(judge=judge, max_prompts=4)
        return _evaluate(inputs, config, out, environment={}, verdict_cache=VerdictCache(tmp_path / "v.db"))

    judge_server.fault = lambda prompt, attempt: fault
    with pytest.raises(JudgeUnavailableError, match="run the command again"):
        evaluate(tmp_path / "first")
    assert not (tmp_path / "first" / "evaluation.json").exists()
    judge_server.fault = lambda prompt, attempt: None
    metrics = evaluate(tmp_path / "second")["metrics"]["judge"]
    assert (metrics["scored"], metrics["unscored"]) == (8, 0)


def test_evaluate_endpoint_down_fails_before_anything_is_written(inputs: Inputs, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    judge = {"kind": "openai", "base_url": url, "input_usd_per_million": 0, "output_usd_per_million": 0}
    with pytest.raises(JudgeError, match=url):
        _evaluate(inputs, _config(judge=judge), tmp_path / "out", environment={})
    assert list((tmp_path / "out").iterdir()) == []


def test_compare_adapters_reference_stands_in_for_the_base(inputs: Inputs, tmp_path: Path) -> None:
    evaluated = _evaluate(inputs, _config(), tmp_path, environment={})["metrics"]["heldout"]

    def compare(reference: Path) -> dict:
        return compare_adapters(
            _config(),
            inputs.quantized,
            reference_folder=reference,
            evaluation_folder=tmp_path,
            curated_folder=inputs.curated,
        )

    itself = compare(inputs.adapter)
    assert itself["heldout"]["gain"] == pytest.approx(0, abs=1e-9)
    assert itself["exact_match"]["difference"] == 0
    other = compare(inputs.other_adapter)["heldout"]
    assert other["adapter_loss"] == pytest.approx(evaluated["adapter_loss"], abs=1e-12)
    assert other["gain"] == pytest.approx(other["base_loss"] - evaluated["adapter_loss"], abs=1e-9)
    alone = evaluate_adapter(
        _config(max_prompts=0),
        inputs.quantized,
        inputs.other_adapter,
        inputs.curated,
        tmp_path / "other",
        environment={},
    )["metrics"]["heldout"]
    assert other["base_loss"] == pytest.approx(alone["adapter_loss"], abs=1e-6)


def test_compare_adapters_other_rows_are_refused(inputs: Inputs, tmp_path: Path) -> None:
    _evaluate(inputs, _config(max_rows=5), tmp_path, environment={})
    with pytest.raises(EvaluationError, match="evaluate again"):
        compare_adapters(
            _config(max_rows=6),
            inputs.quantized,
            reference_folder=inputs.adapter,
            evaluation_folder=tmp_path,
            curated_folder=inputs.curated,
        )


def test_read_row_losses_missing_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="evaluate again"):
        read_row_losses(tmp_path, "base")


@pytest.mark.parametrize(
    ("roles", "expected"),
    [
        (["user", "assistant"], "t0"),
        (["system", "user", "assistant"], "System: t0\n\nUser: t1"),
        (["user"], "t0"),
    ],
)
def test_question_text_leaves_out_the_reference(roles: list[str], expected: str) -> None:
    messages = [{"role": role, "content": f"t{i}"} for i, role in enumerate(roles)]
    assert question_text(messages) == expected
