"""Tasks of lm-evaluation-harness under a base and an adapter: the harness's own Hugging Face model is the reference."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_core.config.quantize import QuantizeConfig
from qlora_core.errors import DataError, EvaluationError
from qlora_core.evaluation.harness.run import Settings, run_benchmarks
from qlora_core.evaluation.harness.tasks import write_choice_task
from qlora_core.model.adapter_set import NamedAdapter, attached_adapters
from qlora_core.model.base import load_any
from qlora_core.quantization.publish import quantize_folder

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is an optional extra")
WORDS = ("red", "green", "blue", "seven", "nine", "tree", "cat", "sun")


def _question(index: int) -> dict[str, str]:
    options = [WORDS[(index + place) % len(WORDS)] for place in range(3 + index % 2)]
    listed = "\n".join(f"{letter}. {option}" for letter, option in zip("ABCD", options, strict=False))
    return {
        "subject": ("colours", "things")[index % 2],
        "input": f"Which word comes {index}th?\n{listed}\nAnswer:",
        "output": "ABCD"[index % len(options)],
    }


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("questions") / "questions.json"
    file.write_text("".join(json.dumps(_question(index)) + "\n" for index in range(24)))
    return file


@pytest.fixture(scope="module")
def nf4(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nf4") / "base"
    quantize_folder(str(tiny_base), folder, QuantizeConfig())
    return folder


@pytest.fixture(scope="module")
def adapter(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(3)
    model: Any = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_base),
        LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


def _requests(kind: Any, arguments: list[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, each, index) for index, each in enumerate(arguments)]


def test_scores_and_answers_are_those_of_the_harness_own_model(tiny_base: Path, nf4: Path, adapter: Path) -> None:
    from lm_eval.models import huggingface

    from qlora_core.evaluation.harness.language_model import SystemLM

    HFLM: Any = huggingface.HFLM  # a decorator hides its parameters
    tokenizer = AutoTokenizer.from_pretrained(nf4)
    pairs = [(_question(index)["input"], f" {letter}") for index in range(6) for letter in "ABC"]
    pairs += [("", "a text without context"), ("trailing space ", "moves on"), ("one two three " * 80, "and four")]
    texts = [("a short text",), ("a text longer than the model has positions for " * 12,)]
    asked = [(text, {"until": ["\n"], "max_gen_toks": 6, "do_sample": False}) for text, _ in pairs[:3]]
    reference: dict[str | None, Any] = {
        None: HFLM(pretrained=str(nf4), batch_size=4, device="cpu", dtype="float32"),
        "tuned": HFLM(pretrained=str(nf4), peft=str(adapter), batch_size=4, device="cpu", dtype="float32"),
    }
    with attached_adapters(load_any(nf4), [NamedAdapter("tuned", adapter)]) as attached:
        found = {}
        for system, theirs in reference.items():
            ours = SystemLM(attached, tokenizer, system=system, batch_size=5)
            found[system] = ours.loglikelihood(_requests("loglikelihood", pairs))
            expected = theirs.loglikelihood(_requests("loglikelihood", pairs), disable_tqdm=True)
            for (nats, greedy), (expected_nats, expected_greedy) in zip(found[system], expected, strict=True):
                assert nats == pytest.approx(expected_nats, abs=2e-3)
                assert greedy == expected_greedy
            rolled = ours.loglikelihood_rolling(_requests("loglikelihood_rolling", texts))
            assert rolled == pytest.approx(
                theirs.loglikelihood_rolling(_requests("loglikelihood_rolling", texts), disable_tqdm=True), abs=1e-2
            )
            answers = ours.generate_until(_requests("generate_until", asked))
            assert answers == theirs.generate_until(_requests("generate_until", asked), disable_tqdm=True)
    # The control: the adapter is on, so its scores are others than the base's.
    assert abs(found[None][0][0] - found["tuned"][0][0]) > 0.05


def test_benchmark_compares_adapters_with_the_base_item_by_item(
    nf4: Path, adapter: Path, questions: Path, tmp_path: Path
) -> None:
    settings = Settings(choice_files={"words": questions}, batch_size=8)
    found = run_benchmarks(nf4, {"tuned": adapter}, settings, tmp_path)
    assert found["items"] == {"words": 24}
    items = [json.loads(line) for line in (tmp_path / "words.jsonl").read_text().split("\n") if line]
    for system in ("base", "tuned"):
        assert found["results"][system]["words"]["acc"] == pytest.approx(sum(item[system] for item in items) / 24)
    compared = found["comparisons"]["words"]["tuned"]
    assert compared["difference"] == pytest.approx(sum(item["tuned"] - item["base"] for item in items) / 24)
    assert compared["low"] <= compared["difference"] <= compared["high"]
    assert set(found["categories"]["words"]) == {"colours", "things"}
    assert json.loads((tmp_path / "results.json").read_text()) == found


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"input": "Which?\nA. one\nB. two\nAnswer:", "output": "C"}, "line 2: the answer 'C' is none of the options"),
        ({"input": "Which?"}, "line 2: not an object with input and output"),
        (["no", "object"], "line 2: not an object"),
    ],
)
def test_questions_that_do_not_fit_are_refused_with_their_line(row: Any, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "q.json"
    file.write_text(json.dumps(_question(0)) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(DataError, match=reason):
        write_choice_task("words", file, tmp_path / "tasks")


@pytest.mark.parametrize(
    ("text", "choices"),
    [
        ("I. It is.\nII. It is not.\nA. I alone\nB. II alone", ["A", "B"]),
        ("A. one\nB. two\nI. a note below\nC. three", ["A", "B", "C"]),
        ("A. quoted\nNow choose.\nA. one\nB. two", ["A", "B"]),
    ],
)
def test_options_are_the_letters_that_follow_each_other(text: str, choices: list[str], tmp_path: Path) -> None:
    (tmp_path / "q.json").write_text(json.dumps({"input": f"{text}\nAnswer:", "output": "B"}))
    write_choice_task("words", tmp_path / "q.json", tmp_path)
    assert json.loads((tmp_path / "words.jsonl").read_text())["choices"] == choices


def test_unknown_task_sampling_and_a_missing_harness_are_refused(
    nf4: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora_core.evaluation.harness.language_model import SystemLM

    with pytest.raises(EvaluationError, match="knows no task 'no_such_task'"):
        run_benchmarks(nf4, {}, Settings(tasks=["no_such_task"]), tmp_path)
    with pytest.raises(EvaluationError, match="no task is named"):
        run_benchmarks(nf4, {}, Settings(), tmp_path)
    lm = SystemLM(load_any(nf4), AutoTokenizer.from_pretrained(nf4), system=None, batch_size=1)
    with pytest.raises(EvaluationError, match="answers here are greedy"):
        lm.generate_until(_requests("generate_until", [("a", {"until": [], "do_sample": True, "temperature": 1.0})]))
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(EvaluationError, match=r"qlora-fleet\[benchmarks\]"):
        run_benchmarks(nf4, {}, Settings(choice_files={"words": questions}), tmp_path)


def test_mmlu_in_its_published_form_becomes_a_task(shared_data: Path, tmp_path: Path) -> None:
    name = write_choice_task("mmlu_local", shared_data / "eval" / "mmlu_zero_shot_val.json", tmp_path)
    rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().split("\n") if line]
    # 1,531 items of 57 subjects: data/README.md and Hendrycks et al. 2021. Some questions number statements I., II.
    assert len(rows) == 1531
    assert len({row["subject"] for row in rows}) == 57
    assert {tuple(row["choices"]) for row in rows} == {("A", "B", "C", "D")}
