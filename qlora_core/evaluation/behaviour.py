"""What a guard needs of base, adapter and champion beside losses and answers: general text, and seconds per token.

Knows a loaded scorer. Both are measured only where the config asks for them.
"""

import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora_core.config.evaluate import EvaluateConfig
from qlora_core.data.dataset import PromptRow
from qlora_core.digest import digest_bytes
from qlora_core.errors import EvaluationError
from qlora_core.evaluation.adapter_scores import AdapterScorer
from qlora_core.model.loss import max_positions_of, sequence_losses
from qlora_core.model.perplexity import checked_window, encode_documents, read_text, split_windows


def measure_behaviour(
    config: EvaluateConfig, scorer: AdapterScorer, prompts: Sequence[PromptRow], before: str | None, after: str
) -> dict[str, Any]:
    """`general`: {text_sha256, tokens, before_loss, after_loss} (nats per token); `latency`: {prompts, before_s,
    after_s} (median seconds per generated token); each null where the config does not ask for it.

    `before` and `after` are systems of the scorer. Raises DataError for a text that cannot be read and EvaluationError
    for one without a token to predict.
    """
    general = None
    if config.general_text is not None:
        text = read_text(Path(config.general_text))
        (loss_before, tokens), (loss_after, _) = (_text_loss(scorer, text, system) for system in (before, after))
        digest = digest_bytes(text.encode())
        general = {"text_sha256": digest, "tokens": tokens, "before_loss": loss_before, "after_loss": loss_after}
    return {"general": general, "latency": _latency(scorer, prompts[: config.latency_prompts], before, after)}


def _text_loss(scorer: AdapterScorer, text: str, system: str | None) -> tuple[float, int]:
    window = checked_window(None, max_positions_of(scorer.adapters.base))
    documents = encode_documents(scorer.chat.tokenizer, text)
    rows = [row for document in documents for row in split_windows(document, window)]
    found = sequence_losses(scorer.adapters, rows, batch_size=scorer.config.batch_size, adapters=[system] * len(rows))
    tokens = sum(count for _, count in found)
    if not tokens:
        raise EvaluationError("evaluate.general_text has no token to predict; give a longer text")
    return math.fsum(nats for nats, _ in found) / tokens, tokens


def _latency(
    scorer: AdapterScorer, prompts: Sequence[PromptRow], before: str | None, after: str
) -> dict[str, Any] | None:
    """One prompt at a time, both systems in turn, so that what else the machine does falls on both."""
    if not prompts:
        return None
    for system in (before, after):
        scorer.answers(prompts[:1], [system])  # the first call warms up
    seconds: dict[str | None, list[float]] = {before: [], after: []}
    for prompt in prompts:
        for system in (before, after):
            started = time.perf_counter()
            ((answer,),) = scorer.answers([prompt], [system])
            spent = time.perf_counter() - started
            tokens = len(scorer.chat.tokenizer(answer, add_special_tokens=False)["input_ids"]) + 1  # the stop token
            seconds[system].append(spent / tokens)
    return {
        "prompts": len(prompts),
        "before_s": statistics.median(seconds[before]),
        "after_s": statistics.median(seconds[after]),
    }
