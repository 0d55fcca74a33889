"""Real training sets against real evaluation sets, with the counts that data/README.md gives; skips without them."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_core.config.curation import DecontaminateConfig
from qlora_core.data.decontamination.eval_sets import EvalSet, read_eval_sets
from qlora_core.data.decontamination.match import decontaminate
from qlora_core.data.decontamination.words import split_words
from qlora_core.data.row import Draft, Message, Row, make_row
from qlora_core.data.source_files import SourceFile

pytestmark = pytest.mark.integration


def sets(folder: Path, *names: str) -> list[EvalSet]:
    return read_eval_sets([SourceFile(name, folder / "eval" / name) for name in names])


def rows(path: Path, prompt: str, answer: str) -> list[Row]:
    """Records as they are: a wrapper stays on."""
    text = path.read_text(encoding="utf-8")
    records: list[dict[str, Any]] = json.loads(text) if text[0] == "[" else [json.loads(x) for x in text.splitlines()]
    drafts = [Draft([Message("user", x[prompt]), Message("assistant", x[answer], train=True)]) for x in records]
    return [make_row(draft, path.name, line) for line, draft in enumerate(drafts, start=1) if draft.messages[1].content]


@pytest.fixture(scope="module")
def gsm8k(shared_data: Path) -> tuple[list[Row], list[EvalSet]]:
    return rows(shared_data / "sft" / "gsm8k_train.jsonl", "question", "answer"), sets(shared_data, "gsm8k_test.jsonl")


def test_gsm8k_train_holds_four_rows_of_its_test_set(gsm8k: tuple[list[Row], list[EvalSet]]) -> None:
    train, test = gsm8k
    found = decontaminate(train, test, DecontaminateConfig())
    coverage = {drop.line: drop.score for drop in found.dropped}
    assert coverage == pytest.approx({21: 0.45, 407: 0.37, 1315: 0.76, 5163: 0.76}, abs=0.01)
    assert len(found.kept) == len(train) - 4
    assert {hit.coverage >= 0.3 and hit.kind == "ngram" for hit in found.hits} == {True}


def test_eight_grams_flag_97_rows_of_gsm8k_with_the_coverage_of_a_slow_reference(
    gsm8k: tuple[list[Row], list[EvalSet]], coverages: Callable[..., Any]
) -> None:
    train, test = gsm8k
    found = decontaminate(train, test, DecontaminateConfig(ngram_words=8, action="report"))
    lines = sorted({hit.line for hit in found.hits})
    assert len(lines) == 97
    items = _words([item.prompts[0] for item in test[0].items])
    sample = [*lines[::4], *range(50, 7000, 500)]
    prompts = _words([train[line - 1].opening for line in sample])
    wanted = coverages(prompts, items, 8, [set() for _ in items])
    got = {
        (sample.index(hit.line), int(hit.item_id.split("/")[1]) - 1): hit.coverage
        for hit in found.hits
        if hit.line in sample and hit.kind == "ngram"
    }
    assert got == pytest.approx(wanted)


def _words(texts: list[str]) -> list[list[str]]:
    words = split_words(texts)
    bounds = words.offsets.tolist()
    return [words.text(first, last).split() for first, last in itertools.pairwise(bounds)]


def test_an_arena_hard_prompt_that_quotes_the_alpaca_wrapper_matches_no_wrapped_row(
    shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = rows(shared_data / "sft" / "dolly_hhrlhf_small.jsonl", "prompt", "response")
    assert len(train) == 1000
    assert all(row.opening.startswith("Below is an instruction") for row in train)
    arena = sets(shared_data, "arena_hard_v01_question.jsonl")
    assert any("### Instruction:" in item.prompts[0] for item in arena[0].items)
    found = decontaminate(train, arena, DecontaminateConfig(ngram_words=8))
    assert [hit for hit in found.hits if hit.turn == 0] == []
    assert len(found.kept) == 1000
    for module in ("match", "ngrams"):  # the control: with wrappers left on, every row matches
        monkeypatch.setattr(f"qlora_core.data.decontamination.{module}.strip_wrappers", lambda text: text)
    control = decontaminate(train, arena, DecontaminateConfig(ngram_words=8))
    assert len({hit.line for hit in control.hits if hit.turn == 0}) == 1000


def test_who_are_you_is_reported_and_kept(shared_data: Path) -> None:
    talks = json.loads((shared_data / "sft" / "sharegpt_dummy_conversation.json").read_text())
    train = [
        make_row(
            Draft([Message("user", turns[0]["value"]), Message("assistant", turns[1]["value"], train=True)]), "talks", n
        )
        for n, turns in enumerate((talk["conversations"] for talk in talks), start=1)
    ]
    found = decontaminate(train, sets(shared_data, "TruthfulQA.csv"), DecontaminateConfig())
    assert {(hit.text, hit.kind, hit.dropped) for hit in found.hits} == {("who are you", "exact", False)}
    assert (len(found.kept), found.sets["TruthfulQA.csv"].items_hit) == (len(train), 1)


def test_the_header_of_mmlu_is_no_evidence_and_its_stems_are_found(shared_data: Path) -> None:
    (mmlu,) = sets(shared_data, "mmlu_zero_shot_val.json")
    assert len(mmlu.items) == 1531
    made_up = [
        f"{item.prompts[0].splitlines()[0]}\n\nIs a red {n} more than a blue one in the old mill?\nAnswer:"
        for n, item in enumerate(mmlu.items)
    ]
    leaked = next(item for item in mmlu.items if item.stem and len(item.stem.split()) > 60)
    bare = (leaked.stem or "").partition("\n\n")[2]
    train = [
        make_row(Draft([Message("user", text), Message("assistant", "A", train=True)]), "train", n)
        for n, text in enumerate([*made_up, bare], start=1)
    ]
    found = decontaminate(train, [mmlu], DecontaminateConfig())
    assert [(hit.line, hit.item_id, hit.dropped) for hit in found.hits] == [(1532, leaked.id, True)]
    assert found.hits[0].coverage > 0.9
    assert found.sets[mmlu.name].suppressed > 0
    assert all("following are multiple choice" in entry.text for entry in found.suppressed if entry.items > 100)
