from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

from qlora_core.errors import JudgeError
from qlora_core.evaluation.judge.offline import LogProbJudge
from qlora_core.evaluation.pairwise import AnswerPair, Question, judge_pairs, summarise_verdicts
from qlora_core.model.base import load_plain

A, B = 65, 66


class ByteTokenizer:
    """One token per byte, a BOS in front: " A" and " B" share the space and part at the letter."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [1, *text.encode()]}


class RuleModel(torch.nn.Module):
    """Next-token logits by a rule over the prompt's text; counts the sequences it was shown."""

    def __init__(self, rule: Callable[[str], tuple[float, float]], positions: int = 4096) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.rule = rule
        limits = SimpleNamespace(max_position_embeddings=positions)
        self.config = SimpleNamespace(get_text_config=lambda decoder: limits)
        self.seen = 0

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **settings: object) -> SimpleNamespace:
        logits = torch.full((len(input_ids), 1, 256), -30.0)
        for row, (ids, mask) in enumerate(zip(input_ids, attention_mask, strict=True)):
            logits[row, 0, A], logits[row, 0, B] = self.rule(bytes(ids[mask.bool()].tolist()[1:]).decode())
            self.seen += 1
        return SimpleNamespace(logits=logits)


def _judge(rule: Callable[[str], tuple[float, float]], positions: int = 4096) -> LogProbJudge:
    return LogProbJudge(RuleModel(rule, positions), ByteTokenizer(), batch_size=3)


def _prefers_good(text: str) -> tuple[float, float]:
    return (1.0, 0.0) if text.index("good") < text.index("bad") else (0.0, 1.0)


def _ignore(amount: float) -> None:
    return


def test_decide_picks_the_likelier_label_in_both_orders_and_any_batch() -> None:
    pairs = [AnswerPair(f"p{i}", "q" * i, "good", "bad") for i in range(7)]
    verdicts = judge_pairs(_judge(_prefers_good), pairs, model_a="x", model_b="y", advance=_ignore)
    assert [v.verdict for v in verdicts] == ["a"] * 14
    assert {v.judge for v in verdicts} == {"offline:log-probability"}


def test_decide_equal_labels_are_a_tie() -> None:
    judgements = _judge(lambda text: (0.5, 0.5)).decide([Question("p", "q", "x", "y", "ab")], _ignore)
    assert judgements[0].slot == "tie"


def test_decide_judge_of_the_slot_counts_one_half_and_is_warned_of() -> None:
    pairs = [AnswerPair(f"p{i}", "q", "good", "bad") for i in range(10)]
    verdicts = judge_pairs(_judge(lambda text: (1.0, 0.0)), pairs, model_a="x", model_b="y", advance=_ignore)
    summary = summarise_verdicts(verdicts, "x", confidence=0.95, resamples=200, seed=0)
    assert (summary["win_rate"], summary["order_consistency"]) == (0.5, 0.0)
    assert "first slot in 100%" in summary["warning"]


def test_decide_prompt_beyond_the_context_is_unscored_and_never_run() -> None:
    judge = _judge(_prefers_good, positions=200)
    done: list[float] = []
    long, short = Question("p0", "q" * 300, "good", "bad", "ab"), Question("p1", "q", "good", "bad", "ab")
    judgements = judge.decide([long, short], done.append)
    assert judgements[0].slot is None
    assert (judgements[0].reason or "").startswith("over_long")
    assert judgements[1].slot == "first"
    assert sum(done) == 2


def test_decide_logits_that_are_not_finite_are_refused() -> None:
    with pytest.raises(JudgeError, match="not finite"):
        _judge(lambda text: (float("nan"), 0.0)).decide([Question("p", "q", "x", "y", "ab")], _ignore)


def test_decide_real_model_equals_scoring_each_prompt_alone(tiny_base: Path) -> None:
    model, tokenizer = load_plain(tiny_base, precision="float32"), AutoTokenizer.from_pretrained(tiny_base)
    questions = [Question(f"p{i}", "Add.", "1" * (i + 1), "two", "ab") for i in range(4)]
    together = LogProbJudge(model, tokenizer, batch_size=4)
    prompts = [together._encode(question) for question in questions]
    margins = together._margins(prompts)
    for (ids, (first, second)), margin in zip(prompts, margins, strict=True):
        with torch.inference_mode():
            log_probabilities = model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
        assert margin == pytest.approx((log_probabilities[first] - log_probabilities[second]).item(), abs=1e-4)
