"""Losses and answers of adapters and of their base, from one loaded model.

Knows the folders of the stages before evaluation, not what is made of the figures.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_core.config.evaluate import EvaluateConfig
from qlora_core.data.chat_template import ChatTokenizer, load_chat_tokenizer
from qlora_core.data.dataset import PromptRow, TokenRow, read_split
from qlora_core.errors import EvaluationError
from qlora_core.evaluation.heldout import RowLoss
from qlora_core.model.adapter_set import AdapterSet, NamedAdapter, attached_adapters
from qlora_core.model.base import load_quantized
from qlora_core.model.generate import generate_answers
from qlora_core.model.loss import sequence_losses
from qlora_core.progress import progress_bar

SPLIT = "test"
BATCHES_PER_ADVANCE = 4


@dataclass(frozen=True)
class AdapterScorer:
    """Base and adapters in one model, with the tokenizer all speak through. A system is an adapter's name, or the base.

    The base is None, as it is for `AdapterSet`.
    """

    adapters: AdapterSet
    chat: ChatTokenizer
    config: EvaluateConfig

    def losses(self, rows: Sequence[TokenRow], system: str | None) -> list[RowLoss]:
        """Summed nats and trained tokens of each row under one system, in order."""
        piece = self.config.batch_size * BATCHES_PER_ADVANCE
        losses: list[RowLoss] = []
        with progress_bar(f"Scoring {system or 'base'}", len(rows)) as advance:
            for start in range(0, len(rows), piece):
                part = rows[start : start + piece]
                scored = sequence_losses(
                    self.adapters, part, batch_size=self.config.batch_size, adapters=[system] * len(part)
                )
                losses += [RowLoss(row.id, nats, tokens) for row, (nats, tokens) in zip(part, scored, strict=True)]
                advance(len(part))
        return losses

    def answers(self, prompts: Sequence[PromptRow], systems: Sequence[str | None]) -> list[list[str]]:
        """For each system its greedy answers, in the prompts' order; all answer a batch of prompts in one pass."""
        asked = [(row.prompt, system) for row in prompts for system in systems]
        answers = generate_answers(
            self.adapters,
            self.chat.tokenizer,
            [prompt for prompt, _ in asked],
            max_new_tokens=self.config.max_new_tokens,
            batch_size=self.config.batch_size * len(systems),
            stop_token_id=self.chat.stop_token_id,
            adapters=[system for _, system in asked],
        )
        return [answers[place :: len(systems)] for place in range(len(systems))]


@contextmanager
def open_scorer(
    config: EvaluateConfig,
    quantized_folder: Path,
    adapters: Sequence[NamedAdapter],
    curated_folder: Path,
    precision: str,
    residency: Mapping[str, Any] | None = None,
) -> Iterator[AdapterScorer]:
    """Load the base once and put the adapters on it; the tokenizer is the one the rows were rendered with.

    `residency` are the arguments of `load_quantized` on how layers execute.
    """
    base = load_quantized(quantized_folder, precision=precision, **(residency or {}))
    chat = load_chat_tokenizer(curated_folder / "tokenizer", None)
    with attached_adapters(base, adapters) as attached:
        yield AdapterScorer(attached, chat, config)


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
