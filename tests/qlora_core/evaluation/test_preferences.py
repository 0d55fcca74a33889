"""Pairs from verdicts: only what both orders decide, only training prompts, and readable as a data source."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from qlora_core.config.data import ReadersConfig
from qlora_core.config.evaluate import EvaluateConfig, JudgeConfig
from qlora_core.data.dataset import PromptRow
from qlora_core.data.reading import read_source
from qlora_core.data.source_files import SourceFile
from qlora_core.errors import EvaluationError
from qlora_core.evaluation.pairwise import AnswerPair
from qlora_core.evaluation.preferences import PreferenceSet, choose_pairs, collect_preferences, write_preferences
from qlora_core.evaluation.verdict import Verdict


def asked(*names: str) -> list[PromptRow]:
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "This."}]
    return [PromptRow(name, "math", "", "This.", turns) for name in names]


def verdict(name: str, said: Any, first: Any) -> Verdict:
    return Verdict(
        prompt_id=name, model_a="adapter", model_b="other", verdict=said, first=first, judge="j", reason="because"
    )


def both(name: str, one: Any, two: Any) -> Sequence[Verdict]:
    return verdict(name, one, "a"), verdict(name, two, "b")


def test_only_prompts_that_both_orders_decide_alike_become_pairs() -> None:
    names = ("mine", "theirs", "split", "tied", "lost", "empty", "unasked")
    pairs = [AnswerPair(name, "What?", f"a {name}", f"b {name}") for name in names[:5]]
    pairs += [AnswerPair("empty", "What?", "", "b"), AnswerPair("unasked", "What?", "a", "b")]
    verdicts = [
        *both("mine", "a", "a"),
        *both("theirs", "b", "b"),
        *both("split", "a", "b"),
        *both("tied", "a", "tie"),
        *both("lost", "a", None),
        *both("empty", "a", "a"),
    ]
    found = choose_pairs(asked(*names), pairs, verdicts)
    said = [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in found.rows]
    assert said == [("a mine", "b mine"), ("b theirs", "a theirs")]
    assert found.rows[0]["prompt"] == [{"role": "user", "content": "What?"}]
    assert found.left_out == {"orders disagree": 1, "tie": 1, "unscored": 2, "degenerate": 1}


def test_written_pairs_are_a_data_source(tmp_path: Path) -> None:
    pairs = [AnswerPair("mine", "What?", "better", "worse")]
    found = choose_pairs(asked("mine"), pairs, both("mine", "a", "a"))
    write_preferences(tmp_path / "pairs.jsonl", found)
    reading = read_source(SourceFile("pairs.jsonl", tmp_path / "pairs.jsonl"), ReadersConfig())
    assert reading.format == "preference"
    (row,) = reading.rows
    assert ([message.content for message in row.messages], row.rejected) == (["What?", "better"], "worse")


def test_nothing_decided_is_said_and_not_written(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"no pair was decided .*3 tie"):
        write_preferences(tmp_path / "pairs.jsonl", PreferenceSet([], {"tie": 3}))
    assert not (tmp_path / "pairs.jsonl").exists()


@pytest.mark.parametrize(("kind", "said"), [("none", "kind is none"), ("offline", "not certified")])
def test_judge_that_cannot_be_trusted_is_refused_before_a_model_is_loaded(
    tmp_path: Path, kind: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlora_core.evaluation.preferences.read_prompts", lambda *_: asked("one"))
    config = EvaluateConfig(judge=JudgeConfig(kind=kind))
    with pytest.raises(EvaluationError, match=said):
        collect_preferences(config, tmp_path, tmp_path, tmp_path, prompts=1)
