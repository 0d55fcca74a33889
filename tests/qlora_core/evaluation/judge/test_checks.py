import time
from pathlib import Path

import pytest

from qlora_core.errors import EvaluationError
from qlora_core.evaluation.heldout import RowLoss
from qlora_core.evaluation.judge.checks import CheckJudge, LongestWins, read_check
from qlora_core.evaluation.judge.replay import replay_of
from qlora_core.evaluation.pairwise import AnswerPair, judge_pairs
from qlora_core.evaluation.reference_likelihood import reference_verdicts
from qlora_core.evaluation.sandbox import run_tests
from qlora_core.evaluation.verdict import Verdict


def _ignore(amount: float) -> None:
    return


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        ({"kind": "exact_match", "reference": "1,000"}, "1000.0", "100"),
        ({"kind": "exact_match", "reference": "so 3. #### 12"}, "I think 4, no, 12", "12, no, 4"),
        ({"kind": "regex", "pattern": r"\d{3}"}, "room 101", "room 11"),
        ({"kind": "regex", "pattern": r"\d{3}", "full": True}, " 101 ", "room 101"),
        ({"kind": "json_schema", "schema": {"required": ["a"]}}, '```json\n{"a": 1}\n```', '{"b": 1}'),
        ({"kind": "json_schema", "schema": {"type": "integer"}}, "3", "Here: 3"),
        ({"kind": "constraint", "min_words": 3, "max_words": 4}, "one two three", "one two"),
        ({"kind": "constraint", "sentences": 2}, "Rain falls. It is wet!", "Rain falls."),
        ({"kind": "constraint", "paragraphs": 2}, "one\n\ntwo", "one\ntwo"),
        ({"kind": "constraint", "bullets": 2}, "- a\n* b", "- a\nb"),
        ({"kind": "constraint", "keywords": ["sun"], "forbidden": ["rain"]}, "The Sun shines.", "Sunny, no rain."),
        ({"kind": "constraint", "lower_case": True, "no_commas": True}, "all low", "All, low"),
        ({"kind": "constraint", "upper_case": True, "ends_with": "!"}, "LOUD!", "LOUD"),
        ({"kind": "constraint", "starts_with": "Dear"}, "Dear Ann", "Hi Ann"),
        ({"kind": "unit_tests", "tests": "assert add(2, 3) == 5"}, "```python\ndef add(a, b):\n    return a + b\n```",
         "def add(a, b): return a - b"),
    ],
)  # fmt: skip
def test_check_passes_the_good_answer_only(check: dict, good: str, bad: str) -> None:
    judge = CheckJudge({"p": read_check(check)})
    verdicts = judge_pairs(judge, [AnswerPair("p", "q", good, bad)], model_a="x", model_b="y", advance=_ignore)
    assert [row.verdict for row in verdicts] == ["a", "a"]
    assert judge.certified is False


def test_check_judge_equal_results_tie_and_a_prompt_without_check_is_unscored() -> None:
    judge = CheckJudge({"p": read_check({"kind": "regex", "pattern": "x"})})
    pairs = [AnswerPair("p", "q", "x one", "x two"), AnswerPair("other", "q", "x", "y")]
    verdicts = judge_pairs(judge, pairs, model_a="x", model_b="y", advance=_ignore)
    assert [row.verdict for row in verdicts] == ["tie", "tie", None, None]
    assert (verdicts[2].reason or "").startswith("no_check")


@pytest.mark.parametrize(
    ("check", "message"),
    [
        ({"kind": "taste"}, "'taste' is unknown; choose one of exact_match"),
        ({"kind": "regex"}, "pattern: Field required"),
        ({"kind": "constraint", "words": 3}, "words: Extra inputs"),
    ],
)
def test_read_check_says_what_is_wrong(check: dict, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        read_check(check)
    with pytest.raises(EvaluationError, match="no regular expression"):
        read_check({"kind": "regex", "pattern": "("}).passes("x")
    with pytest.raises(EvaluationError, match="no JSON schema"):
        read_check({"kind": "json_schema", "schema": {"type": "nonsense"}}).passes("1")


@pytest.mark.parametrize(
    "answer",
    [
        "raise SystemExit(0)",
        "import os\nos._exit(0)",
        "print('ok')\nraise ValueError",
        "def add(a, b:",
        "import socket\nsocket.create_connection(('127.0.0.1', 1))",
        "x = bytearray(4 << 30)",
        "open('big', 'wb').write(b'x' * (4 << 20))",
        "import os\nassert os.environ.get('PATH')",
    ],
)
def test_run_tests_early_exit_and_excess_are_failures(answer: str) -> None:
    assert run_tests(answer, "pass", timeout_s=10) is False
    assert run_tests("y = 1", "assert y == 1", timeout_s=10) is True  # negative control: the runner itself works


def test_run_tests_endless_code_is_killed_with_its_children(tmp_path: Path) -> None:
    mark = tmp_path / "alive"
    answer = (
        "import os, time\n"
        "if os.fork() == 0:\n"
        f"    time.sleep(3); open({str(mark)!r}, 'w').write('x'); os._exit(0)\n"
        "while True: pass\n"
    )
    started_s = time.monotonic()
    assert run_tests(answer, "pass", timeout_s=1) is False
    assert time.monotonic() - started_s < 3
    time.sleep(3)
    assert not mark.exists()


def test_longest_wins_is_a_baseline_only() -> None:
    verdicts = judge_pairs(
        LongestWins(), [AnswerPair("p", "q", "long", "s")], model_a="x", model_b="y", advance=_ignore
    )
    assert [row.verdict for row in verdicts] == ["a", "a"]
    assert LongestWins.certified is False


def test_replay_gives_the_record_back_and_nothing_else() -> None:
    judged = judge_pairs(
        LongestWins(), [AnswerPair("p", "q", "long", "s"), AnswerPair("r", "q", "aa", "bb")],
        model_a="x", model_b="y", advance=_ignore,
    )  # fmt: skip
    pairs = [AnswerPair(name, "q", "other", "texts") for name in ("p", "r", "s")]
    replay = replay_of(judged, model_a="x", model_b="y")
    again = judge_pairs(replay, pairs, model_a="x", model_b="y", advance=_ignore)
    assert [row.verdict for row in again] == ["a", "a", "tie", "tie", None, None]
    # The same record asked with the models' places exchanged
    turned = judge_pairs(replay_of(judged, model_a="y", model_b="x"), pairs, model_a="y", model_b="x", advance=_ignore)
    assert [row.verdict for row in turned] == ["b", "b", "tie", "tie", None, None]
    with pytest.raises(EvaluationError, match="two verdicts"):
        replay_of([*judged, judged[0]], model_a="x", model_b="y")


def test_reference_verdicts_prefer_the_lower_loss_per_token() -> None:
    a = [RowLoss("1", 10.0, 10), RowLoss("2", 10.0, 10), RowLoss("3", 10.0, 10), RowLoss("4", 0.0, 0)]
    b = [RowLoss("1", 12.0, 10), RowLoss("2", 9.0, 10), RowLoss("3", 10.001, 10), RowLoss("4", 0.0, 0)]
    verdicts: list[Verdict] = reference_verdicts(a, b, model_a="x", model_b="y")
    assert [row.verdict for row in verdicts] == ["a", "b", "tie", None]
    with pytest.raises(EvaluationError, match="same rows"):
        reference_verdicts(a, b[:2], model_a="x", model_b="y")
