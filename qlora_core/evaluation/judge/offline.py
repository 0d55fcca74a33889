"""A judge that needs no key and no parsing: which of the labels A and B a local model finds likelier as the next token.

What it is good for: showing the whole flow without an endpoint, and, with a capable local model, a first impression.
What it is not: evidence. It is never certified, and on small models it says next to nothing: there the label's place
decides, not the answers. That shows as a first-slot share near 0 or 1, which `pairwise.summarise_verdicts` warns of.
Each order is judged by itself and keeps its own verdict; where the two disagree the prompt counts one half, like a tie.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qlora_core.digest import digest_json
from qlora_core.errors import JudgeError
from qlora_core.evaluation.pairwise import Judgement, Question
from qlora_core.model.loss import max_positions_of

LABELS = (" A", " B")
TIE_NATS = 1e-6
TEMPLATE = "Question:\n%s\n\nAnswer A:\n%s\n\nAnswer B:\n%s\n\nWhich answer is better, A or B? The better answer is"


class LogProbJudge:
    """Compares log-probabilities of " A" and " B" after a prompt that shows the question and both answers.

    `model` is a causal language model in eval mode (the base: adapters must be off), `tokenizer` its Hugging Face
    tokenizer, `identity` a digest of both. The prompt is plain text, so that models with and without a chat template
    are asked alike.
    """

    certified = False

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        batch_size: int,
        name: str = "offline:log-probability",
        identity: str = "",
    ) -> None:
        self.name = name
        self.cost_usd = 0.0
        self.snapshot: str | None = identity or None
        self._model = model
        self._tokenizer = tokenizer
        self._batch_size = batch_size
        self._max_positions = max_positions_of(model)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the prompt's form; the model is the snapshot."""
        return digest_json([self.name, LABELS, TEMPLATE, TIE_NATS])

    def decide(self, questions: Sequence[Question], advance: Callable[[float], None]) -> list[Judgement]:
        """One judgement per question, in order; unscored ("over_long") where the prompt exceeds the model's positions.

        A tie only where both labels are equally likely to 1e-6 nats. Raises JudgeError where the tokenizer cannot tell
        the labels apart or the model's log-probabilities are not finite.
        """
        prompts = [self._encode(question) for question in questions]
        judgements = [Judgement(None, "over_long: the prompt exceeds the judge's context")] * len(questions)
        fitting = [
            i for i, (ids, _) in enumerate(prompts) if self._max_positions is None or len(ids) <= self._max_positions
        ]
        advance(len(questions) - len(fitting))
        # Like lengths share a batch, so that little of it is padding
        fitting.sort(key=lambda i: len(prompts[i][0]))
        for start in range(0, len(fitting), self._batch_size):
            batch = fitting[start : start + self._batch_size]
            margins = self._margins([prompts[i] for i in batch])
            for i, margin in zip(batch, margins, strict=True):
                judgements[i] = _judgement(margin)
            advance(len(batch))
        return judgements

    def _encode(self, question: Question) -> tuple[list[int], tuple[int, int]]:
        """Token ids up to where the two labelled texts part, and the token of each label there."""
        text = TEMPLATE % (question.text, question.first_answer, question.second_answer)
        first, second = (self._tokenizer(text + label)["input_ids"] for label in LABELS)
        shared = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
        if not shared:
            raise JudgeError(
                f"the judge's tokenizer gives {LABELS[0]!r} and {LABELS[1]!r} no tokens of their own; "
                "choose another base, or set evaluate.judge.kind: none"
            )
        return first[:shared], (first[shared], second[shared])

    @torch.inference_mode()
    def _margins(self, prompts: Sequence[tuple[list[int], tuple[int, int]]]) -> list[float]:
        """log P(A) - log P(B) in nats, per prompt: left-padded, so that every next token is at the last position."""
        device = next(self._model.parameters()).device
        width = max(len(ids) for ids, _ in prompts)
        input_ids = torch.zeros(len(prompts), width, dtype=torch.long)
        attention_mask = torch.zeros(len(prompts), width, dtype=torch.long)
        for row, (ids, _) in enumerate(prompts):
            input_ids[row, width - len(ids) :] = torch.tensor(ids)
            attention_mask[row, width - len(ids) :] = 1
        position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        logits: Tensor = self._model(
            input_ids=input_ids.to(device),
            attention_mask=attention_mask.to(device),
            position_ids=position_ids.to(device),
            use_cache=False,
            logits_to_keep=1,
        ).logits[:, -1]
        labels = torch.tensor([pair for _, pair in prompts], device=device)
        # The log-normaliser is the same for both labels, so the difference of logits is that of log-probabilities
        pair = logits.double().gather(1, labels)
        margins = (pair[:, 0] - pair[:, 1]).tolist()
        if not all(math.isfinite(margin) for margin in margins):
            raise JudgeError("the offline judge's logits are not finite; check the base model and the precision")
        return margins


def _judgement(margin_nats: float) -> Judgement:
    if abs(margin_nats) <= TIE_NATS:
        return Judgement("tie")
    return Judgement("first" if margin_nats > 0 else "second")
