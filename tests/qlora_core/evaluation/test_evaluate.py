import json
import re
import socket
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest
import torch
from peft import LoraConfig, get_peft_model

from qlora_core.adapters.adapter_folder import adapter_digest
from qlora_core.config.data import DataConfig
from qlora_core.config.evaluate import EvaluateConfig
from qlora_core.config.gate import GateConfig
from qlora_core.config.quantize import QuantizeConfig
from qlora_core.data.curate import curate
from qlora_core.data.dataset import read_split
from qlora_core.errors import EvaluationError, JudgeError, JudgeUnavailableError
from qlora_core.evaluation.answer_book import read_answer_book
from qlora_core.evaluation.evaluate import compare_adapters, evaluate_adapter, question_text, read_row_losses
from qlora_core.evaluation.judge.cache import VerdictCache
from qlora_core.evaluation.judge.prompt import is_verdict_like
from qlora_core.evaluation.verdict import read_verdicts
from qlora_core.evaluation.vote.ballots import BallotBox
from qlora_core.evaluation.vote.pairs import read_pairs
from qlora_core.model.base import load_quantized
from qlora_core.model.perplexity import score_text_file
from qlora_core.quantization.quantize import quantize_checkpoint
from qlora_core.registry.gate.decide import check

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


def test_item_table_gives_the_recorded_figures_again(inputs: Inputs, tmp_path: Path) -> None:
    result = _evaluate(inputs, _config(), tmp_path, environment={})
    rows, prompts = result["items"]["rows"], result["items"]["prompts"]
    assert rows["id"] == [row.id for row in read_row_losses(tmp_path, "base")]
    gain = (sum(rows["before"]) - sum(rows["after"])) / sum(rows["tokens"])
    assert gain == pytest.approx(result["metrics"]["heldout"]["gain"], abs=1e-12)
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert prompts["id"] == [row["prompt_id"] for row in answers]
    assert prompts["after"]["matches"] == [row["adapter_matches"] for row in answers]
    assert prompts["before"]["words"] == [len(row["base"].split()) for row in answers]
    assert prompts["before"]["verdict_like"] == [is_verdict_like(row["base"]) for row in answers]
    scores = [score for score in prompts["judge"] if score is not None]
    assert sum(scores) / len(scores) == pytest.approx(result["metrics"]["judge"]["win_rate"])
    assert set(prompts["human"]) == {None} and result["items"]["human_alpha"] is None
    assert {len(column) for column in (prompts["language"], prompts["category"])} == {6}
    assert result["adapter_bytes"] == (inputs.adapter / "adapter_model.safetensors").stat().st_size
    assert (result["parity"], result["behaviour"]) == (None, {"general": None, "latency": None})


def test_general_text_and_latency_are_measured_where_asked_for(inputs: Inputs, tmp_path: Path) -> None:
    text = tmp_path / "general.txt"
    text.write_text("A text of its own.<|endoftext|>And another one, of more words than the first.")
    config = _config(general_text=str(text), latency_prompts=2, judge={"kind": "none"})
    behaviour = _evaluate(inputs, config, tmp_path / "out", environment={})["behaviour"]
    base, adapted = score_text_file(inputs.quantized, text), score_text_file(inputs.quantized, text, inputs.adapter)
    assert behaviour["general"]["before_loss"] == pytest.approx(base.loss, abs=1e-5)
    assert behaviour["general"]["after_loss"] == pytest.approx(adapted.loss, abs=1e-5)
    assert behaviour["general"]["tokens"] == base.tokens and base.loss != adapted.loss
    assert behaviour["latency"]["prompts"] == 2
    assert behaviour["latency"]["before_s"] > 0 and behaviour["latency"]["after_s"] > 0
    compared = compare_adapters(
        config,
        inputs.quantized,
        reference_folder=inputs.other_adapter,
        evaluation_folder=tmp_path / "out",
        curated_folder=inputs.curated,
        adapter_folder=inputs.adapter,
    )
    other = score_text_file(inputs.quantized, text, inputs.other_adapter)
    assert compared["behaviour"]["general"]["before_loss"] == pytest.approx(other.loss, abs=1e-5)
    assert compared["behaviour"]["general"]["after_loss"] == pytest.approx(adapted.loss, abs=1e-5)


def test_compare_adapters_judged_gives_verdicts_against_the_reference(inputs: Inputs, tmp_path: Path) -> None:
    _evaluate(inputs, _config(), tmp_path, environment={})

    def compare(reference: Path, *, judged: bool) -> dict:
        return compare_adapters(
            _config(),
            inputs.quantized,
            reference_folder=reference,
            evaluation_folder=tmp_path,
            curated_folder=inputs.curated,
            judged=judged,
            environment={},
            out=out,
        )

    out: Path | None = None
    itself = compare(inputs.adapter, judged=True)
    assert not list(tmp_path.glob("reference_*"))
    assert (itself["judge"]["win_rate"], itself["judge"]["certified"]) == (0.5, False)  # equal answers are ties
    assert itself["items"]["prompts"]["judge"] == [0.5] * 6
    assert itself["items"]["rows"]["before"] == pytest.approx(itself["items"]["rows"]["after"], abs=1e-9)
    unasked = compare(inputs.other_adapter, judged=False)
    assert unasked["judge"] is None and unasked["behaviour"] is None
    out = tmp_path / "compared"
    out.mkdir()
    compare(inputs.other_adapter, judged=True)
    book = read_answer_book([str(tmp_path), f"champion={out / 'reference_answers.jsonl'}"])
    assert sorted(book.answers) == ["adapter", "base", "champion"]
    assert len(book.common) == 6
    verdicts = read_verdicts(out / "reference_verdicts.jsonl")
    assert {(row.model_a, row.model_b) for row in verdicts} == {("adapter", "reference")}


def test_checks_of_the_config_judge_and_the_gate_holds_what_is_not_certified(inputs: Inputs, tmp_path: Path) -> None:
    _evaluate(inputs, _config(judge={"kind": "none"}), tmp_path / "plain", environment={})
    answers = [json.loads(line) for line in (tmp_path / "plain" / "answers.jsonl").read_text().splitlines()]
    one, other = [row for row in answers if row["base"].strip() != row["adapter"].strip()][:2]
    rows = [
        {
            "prompt_id": row["prompt_id"],
            "check": {"kind": "regex", "pattern": re.escape(row["adapter"].strip()), "full": True},
        }
        for row in (one, other)
    ]
    checks = tmp_path / "checks.jsonl"
    checks.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = _config(judge={"kind": "checks", "checks": str(checks)})
    result = _evaluate(inputs, config, tmp_path / "checked", environment={})
    judge = result["metrics"]["judge"]
    assert (judge["kind"], judge["model"], judge["certified"]) == ("checks", "offline:checks", False)
    assert len(judge["fingerprint"]) == 64
    said = {row.prompt_id: row.verdict for row in read_verdicts(tmp_path / "checked" / "verdicts.jsonl")}
    assert said[one["prompt_id"]] == "a"
    unchecked = [row for row in read_verdicts(tmp_path / "checked" / "verdicts.jsonl") if not row.scored]
    assert {(row.reason or "").split(":")[0] for row in unchecked} <= {"no_check"}
    policy = GateConfig.model_validate({"min_rows": 2, "judge": "require", "max_unscored_share": 1.0})
    (held,) = [found for found in check(result, None, policy) if found.check == "judge"]
    assert held.verdict == "HOLD" and "not certified" in held.sentence
    checks.write_text(json.dumps({"prompt_id": "nowhere", "check": {"kind": "regex", "pattern": "x"}}) + "\n")
    with pytest.raises(EvaluationError, match="a check for none of the 6 prompts"):
        _evaluate(inputs, config, tmp_path / "none", environment={})


def test_reference_mode_shows_each_prompts_reference_to_the_endpoint(
    inputs: Inputs, tmp_path: Path, judge_server: "JudgeServer"
) -> None:
    judge = {"kind": "openai", "mode": "reference", "base_url": judge_server.url, "model": "judge-1",
             "input_usd_per_million": 2, "output_usd_per_million": 8}  # fmt: skip
    result = _evaluate(inputs, _config(judge=judge), tmp_path, environment={})
    assert result["metrics"]["judge"]["unscored"] == 0
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    asked = [request["messages"][-1]["content"] for request in judge_server.requests]
    assert asked
    assert all("<<<REFERENCE" in text for text in asked)
    assert any(f">>>\n{answers[0]['reference']}\n<<<END REFERENCE" in text for text in asked)


def test_votes_count_for_the_answers_they_were_cast_on(inputs: Inputs, tmp_path: Path) -> None:
    _evaluate(inputs, _config(judge={"kind": "none"}), tmp_path / "first", environment={})
    pairs = [pair for pair in read_pairs(tmp_path / "first") if pair.answer_a != pair.answer_b]
    assert pairs
    stale = pairs[0].model_copy(update={"item_id": "stale", "answer_a": "what an older adapter said"})
    box = BallotBox.create(tmp_path / "votes.sqlite", [*pairs[1:], stale], self_share=0, repeat_share=0)
    for number in range(len(pairs)):
        view = box.current("ann").task
        assert view is not None
        for_adapter = "left" if (view.left == "a") == (box.pairs[view.item].model_a == "adapter") else "right"
        box.vote("ann", str(number), view.task, for_adapter)
    config = _config(judge={"kind": "none"}, votes=str(tmp_path / "votes.sqlite"))
    prompts = _evaluate(inputs, config, tmp_path / "second", environment={})["items"]["prompts"]
    voted = dict(zip(prompts["id"], prompts["human"], strict=True))
    assert [voted[pair.prompt_id] for pair in pairs[1:]] == [1.0] * (len(pairs) - 1)
    assert voted[pairs[0].prompt_id] is None
    votes = read_verdicts(tmp_path / "second" / "votes.jsonl")
    assert {row.prompt_id for row in votes} == {pair.prompt_id for pair in pairs[1:]}
    assert {(row.model_a, row.model_b, row.verdict, row.judge) for row in votes} == {
        ("adapter", "base", "a", "human:ann")
    }
    with pytest.raises(EvaluationError, match=r"votes\.sqlite"):
        _evaluate(inputs, _config(votes=str(tmp_path / "none")), tmp_path / "third", environment={})


def test_parity_certificate_is_recorded_with_the_adapter_it_is_of(inputs: Inputs, tmp_path: Path) -> None:
    certificate = tmp_path / "certificate.json"
    said = {"adapter_digest": adapter_digest(inputs.adapter), "target": "nf4", "verdict": "pass", "chosen": "plain"}
    certificate.write_text(json.dumps({**said, "more": 1}))
    settings = {"parity_certificate": str(certificate), "max_prompts": 0}
    result = _evaluate(inputs, _config(**settings), tmp_path / "out", environment={})
    assert said.items() <= result["parity"].items()
    assert result["parity"]["adapter_digest"] == result["adapter_weights_digest"]
    certificate.write_text("{}")
    with pytest.raises(EvaluationError, match="no certificate of a merge"):
        _evaluate(inputs, _config(**settings), tmp_path / "other", environment={})


def test_the_gate_reads_what_an_evaluation_records(inputs: Inputs, tmp_path: Path) -> None:
    text = tmp_path / "general.txt"
    text.write_text("A text of its own, of some words.")
    config = _config(general_text=str(text), latency_prompts=1)
    result = _evaluate(inputs, config, tmp_path / "out", lineage={"quantized_base_digest": "b" * 64}, environment={})
    compared = compare_adapters(
        config,
        inputs.quantized,
        reference_folder=inputs.other_adapter,
        evaluation_folder=tmp_path / "out",
        curated_folder=inputs.curated,
        adapter_folder=inputs.adapter,
        judged=True,
        environment={},
    )
    guards = {
        "max_perplexity_increase": 10.0,
        "length_ratio": [0.0, 100.0],
        "max_refusal_increase": 1.0,
        "max_degenerate_share": 1.0,
        "max_latency_ratio": 1000.0,
        "max_adapter_bytes": 10**9,
        "base_digest": "b" * 64,
    }
    for metric in ("loss", "exact_match", "judge"):
        for champion in (None, {"version": "3", **compared}):
            policy = GateConfig.model_validate(
                {"min_rows": 2, "primary": {"metric": metric}, "slices": {"by": "language"}, "guards": guards}
            )
            findings = check(result, champion, policy)
            assert {"primary", "slices", "guards"} <= {found.check for found in findings}, findings
            assert [found.verdict for found in findings if found.check == "guards"] == ["PROMOTE"] * len(guards)
            assert ("judge" in {found.check for found in findings}) == (metric == "judge")
    unformed = GateConfig.model_validate({"guards": {"max_format_loss": 0.1}})  # these references have no form
    assert [found.verdict for found in check(result, None, unformed)] == ["INVALID"]


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
