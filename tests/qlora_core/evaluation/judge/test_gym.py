import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.cli.app import app
from qlora_core.errors import EvaluationError
from qlora_core.evaluation.judge.certificate import Limits, certifies, faults, read_certificate, write_certificate
from qlora_core.evaluation.judge.checks import LongestWins
from qlora_core.evaluation.judge.gold_pairs import read_gold, recorded_llmbar, recorded_pandalm
from qlora_core.evaluation.judge.gym import ATTACKS, certify, injected, measure
from qlora_core.evaluation.pairwise import AnswerPair, Judgement, Question, judge_pairs

JUDGES = [
    "ChatGPT/Swap",
    "ChatGPT/Vanilla",
    "Falcon/CoT",
    "GPT-4/CoT",
    "GPT-4/Rating_NoRules",
    "GPT-4/Swap",
    "GPT-4/Vanilla",
]


class RuleJudge:
    """Decides by a function of the question, at two cents a call."""

    name = "rule"
    certified = False
    fingerprint = "f" * 64
    snapshot = "snapshot-1"

    def __init__(self, rule: Callable[[Question], str | None]) -> None:
        self.rule = rule
        self.cost_usd = 0.0

    def decide(self, questions: Sequence[Question], advance: Callable[[float], None]) -> list[Judgement]:
        advance(len(questions))
        self.cost_usd += 0.02 * len(questions)
        slots = [self.rule(question) for question in questions]
        return [Judgement(slot, None if slot else "parse: nothing") for slot in slots]  # type: ignore[arg-type]


def _knowing(question: Question) -> str:
    """Knows the gold answers, whatever is appended to them."""
    (pair,) = [p for p in read_gold("own") if p.prompt == question.text]
    better = pair.answer_a if pair.label == "a" else pair.answer_b
    return "first" if question.first_answer.startswith(better) else "second"


def _gullible(question: Question) -> str:
    attacked = [any(text.endswith(a) for a in ATTACKS) for text in (question.first_answer, question.second_answer)]
    return "first" if attacked[0] else "second" if attacked[1] else _knowing(question)


def _ignore(amount: float) -> None:
    return


def test_own_gold_is_some_dozens_of_balanced_pairs() -> None:
    gold = read_gold("own")
    assert 40 <= len(gold) <= 100
    assert 0.45 <= sum(pair.label == "a" for pair in gold) / len(gold) <= 0.55
    assert len({pair.category for pair in gold}) >= 6
    assert all(pair.answer_a.strip() != pair.answer_b.strip() for pair in gold)
    length_alone = measure(gold, judge_pairs(
        LongestWins(), [AnswerPair(p.id, p.prompt, p.answer_a, p.answer_b) for p in gold],
        model_a="a", model_b="b", advance=_ignore,
    ))  # fmt: skip
    assert length_alone.accuracy == length_alone.longest_wins_accuracy
    assert (length_alone.accuracy or 1) < 0.5  # no judge passes by preferring length


def test_certify_passes_a_judge_that_knows_and_binds_it_to_its_snapshot(tmp_path: Path) -> None:
    certificate = certify(RuleJudge(_knowing), read_gold("own"), limits=Limits(), advance=_ignore)
    assert (certificate.passed, certificate.reasons) == (True, ())
    assert certificate.figures.accuracy == 1.0
    assert certificate.figures.injection_resistance == 1.0
    assert certificate.figures.usd_per_1000 == pytest.approx(20.0)
    write_certificate(tmp_path / "c.json", certificate)
    again = read_certificate(tmp_path / "c.json")
    assert again == certificate
    assert certifies(again, "f" * 64, "snapshot-1")
    assert not certifies(again, "f" * 64, "snapshot-2")
    assert not certifies(again, "0" * 64, "snapshot-1")


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (lambda question: "first", "first slot's share is 100%"),
        (_gullible, "injection resistance is 0%"),
        (lambda question: None, "unscored"),
        (lambda question: "tie", "accuracy is 50%"),
    ],
)
def test_certify_refuses_with_the_figure(rule: Callable[[Question], str | None], reason: str) -> None:
    certificate = certify(RuleJudge(rule), read_gold("own"), limits=Limits(), advance=_ignore)
    assert not certificate.passed
    assert any(reason in each for each in certificate.reasons)
    assert not certifies(certificate, certificate.fingerprint, certificate.snapshot)


def test_read_certificate_edited_by_hand_is_refused(tmp_path: Path) -> None:
    certificate = certify(RuleJudge(lambda question: "first"), read_gold("own"), limits=Limits(), advance=_ignore)
    write_certificate(tmp_path / "c.json", certificate.model_copy(update={"passed": True}))
    with pytest.raises(EvaluationError, match="does not follow from its figures"):
        read_certificate(tmp_path / "c.json")
    with pytest.raises(EvaluationError, match="no judge's certificate"):
        read_certificate(tmp_path / "absent.json")


def test_injected_attacks_the_worse_answer_only() -> None:
    gold = read_gold("own")
    for before, after in zip(gold, injected(gold), strict=True):
        better, worse = ("answer_a", "answer_b") if before.label == "a" else ("answer_b", "answer_a")
        assert getattr(after, better) == getattr(before, better)
        assert getattr(after, worse).endswith(ATTACKS)


def test_faults_missing_figures_never_pass() -> None:
    nothing = measure(read_gold("own"), [])
    assert len(faults(nothing, Limits())) == 6


@pytest.mark.integration
@pytest.mark.parametrize("judge", JUDGES)
@pytest.mark.parametrize("part", ["Natural", "Adversarial/Neighbor"])
def test_measure_gives_llmbars_own_statistics(shared_data: Path, part: str, judge: str) -> None:
    folder = shared_data / "human/llmbar" / part
    gold = read_gold(str(folder))
    replay = recorded_llmbar(folder / judge / "result.json.gz")
    pairs = [AnswerPair(pair.id, pair.prompt, pair.answer_a, pair.answer_b) for pair in gold]
    verdicts = judge_pairs(replay, pairs, model_a="a", model_b="b", advance=_ignore)
    published = json.loads((folder / judge / "statistics.json").read_text())
    right = {pair.id: pair.label for pair in gold}
    for order, first in (("False", "a"), ("True", "b")):
        hits = sum(row.verdict == right[row.prompt_id] for row in verdicts if row.first == first)
        assert hits == int(published[f"correct_{order}"].split(" / ")[0])
    agreeing = round((measure(gold, verdicts).order_consistency or 0) * len(gold))
    if all(row.scored for row in verdicts):
        assert agreeing == int(published["equal"].split(" / ")[0])
    else:
        assert [row.scored for row in verdicts].count(False) == 2


@pytest.mark.integration
def test_certification_passes_the_strong_recorded_judge_and_refuses_the_weak(
    shared_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = shared_data / "human/llmbar/Natural"
    found = {}
    for judge in ("GPT-4/CoT", "Falcon/CoT"):
        out = tmp_path / f"{judge.replace('/', '-')}.json"
        record = str(folder / judge / "result.json.gz")
        arguments = ["judge", "certify", "--gold", str(folder), "--recorded", record, "--out", str(out), "--json"]
        result = CliRunner().invoke(app, arguments)
        found[judge] = (result.exit_code, json.loads(capfd.readouterr().out))
        assert read_certificate(out).passed == (result.exit_code == 0)
    code, strong = found["GPT-4/CoT"]
    assert (code, strong["passed"], strong["figures"]["accuracy"]) == (0, True, pytest.approx(0.945))
    code, weak = found["Falcon/CoT"]
    assert (code, weak["passed"]) == (1, False)
    assert any("order consistency" in reason for reason in weak["reasons"])


@pytest.mark.integration
def test_measure_of_pandalms_recorded_judges_in_one_order(shared_data: Path) -> None:
    folder = shared_data / "human/pandalm"
    gold = read_gold(str(folder / "testset-v1.json"))
    assert len(gold) == 999
    unparsed = {}
    for name in ("pandalm-7b-testset-v1.json", "gpt-3.5-turbo-testset-v1.json"):
        replay = recorded_pandalm(folder / name)
        pairs = [AnswerPair(pair.id, pair.prompt, pair.answer_a, pair.answer_b) for pair in gold]
        verdicts = [
            row for row in judge_pairs(replay, pairs, model_a="a", model_b="b", advance=_ignore) if row.first == "a"
        ]
        figures = measure(gold, verdicts)
        unparsed[name] = sum(not row.scored for row in verdicts)
        assert figures.order_consistency is None
        assert 0.5 < (figures.accuracy or 0) < 0.8
    assert unparsed == {"pandalm-7b-testset-v1.json": 0, "gpt-3.5-turbo-testset-v1.json": 25}


def test_certify_command_wants_one_judge() -> None:
    assert CliRunner().invoke(app, ["judge", "certify", "--json"]).exit_code == 2
