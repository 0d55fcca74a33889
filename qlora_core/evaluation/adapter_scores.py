"""Losses and answers of an adapter and of its base, from one loaded model: "base" is the model with the adapter off.

Knows the folders of the stages before evaluation, not what is made of the figures.
"""

from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel

from qlora_core.config.evaluate import EvaluateConfig
from qlora_core.data.chat_template import ChatTokenizer, load_chat_tokenizer
from qlora_core.data.dataset import PromptRow, TokenRow, read_split
from qlora_core.errors import EvaluationError
from qlora_core.evaluation.heldout import RowLoss
from qlora_core.model.adapter import attach_adapter
from qlora_core.model.base import load_quantized
from qlora_core.model.generate import generate_answers
from qlora_core.model.loss import sequence_losses
from qlora_core.progress import progress_bar

SPLIT = "test"
BATCHES_PER_ADVANCE = 4


@dataclass(frozen=True)
class AdapterScorer:
    """Base and adapter in one model, with the tokenizer both speak through."""

    model: PeftModel
    chat: ChatTokenizer
    config: EvaluateConfig

    def losses(self, rows: Sequence[TokenRow], *, adapter: bool) -> list[RowLoss]:
        """Summed nats and trained tokens of each row, in order, with the adapter on or off."""
        piece = self.config.batch_size * BATCHES_PER_ADVANCE
        losses: list[RowLoss] = []
        with ExitStack() as stack:
            stack.enter_context(self._switched(adapter))
            advance = stack.enter_context(progress_bar(f"Scoring {'adapter' if adapter else 'base'}", len(rows)))
            for start in range(0, len(rows), piece):
                part = rows[start : start + piece]
                scored = sequence_losses(self.model, part, batch_size=self.config.batch_size)
                losses += [RowLoss(row.id, nats, tokens) for row, (nats, tokens) in zip(part, scored, strict=True)]
                advance(len(part))
        return losses

    def answers(self, prompts: Sequence[PromptRow], *, adapter: bool) -> list[str]:
        """Greedy answers in the prompts' order, with the adapter on or off; none without prompts."""
        if not prompts:
            return []
        with self._switched(adapter):
            return generate_answers(
                self.model,
                self.chat.tokenizer,
                [row.prompt for row in prompts],
                max_new_tokens=self.config.max_new_tokens,
                batch_size=self.config.batch_size,
                stop_token_id=self.chat.stop_token_id,
            )

    def _switched(self, adapter: bool) -> Any:
        return nullcontext() if adapter else self.model.disable_adapter()


def load_scorer(
    config: EvaluateConfig, quantized_folder: Path, adapter_folder: Path, curated_folder: Path, precision: str
) -> AdapterScorer:
    """Load the base once and put the adapter on it; the tokenizer is the one the rows were rendered with."""
    base = load_quantized(quantized_folder, precision=precision)
    chat = load_chat_tokenizer(curated_folder / "tokenizer", None)
    return AdapterScorer(attach_adapter(base, adapter_folder), chat, config)


def heldout_rows(config: EvaluateConfig, curated_folder: Path) -> list[TokenRow]:
    """The test rows that are scored: the first `max_rows` by id. Ids are content hashes, so that is a fixed sample.

    Raises EvaluationError where there are fewer than two.
    """
    rows = sorted(read_split(curated_folder, SPLIT), key=lambda row: row.id)[: config.max_rows]
    if len(rows) < 2:
        raise EvaluationError(
            f"the test split has {len(rows)} row(s) and an interval needs 2; give more data or raise data.split.test"
        )
    return rows
