"""What a composition costs each of its adapters on that adapter's own task. Knows models, texts and losses."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedModel

from qlora_core.adapters.on_base import attach_stack
from qlora_core.errors import DataError
from qlora_core.evaluation.heldout import RowLoss, compare_losses
from qlora_core.model.adapter import attach_adapter
from qlora_core.model.base import load_any
from qlora_core.model.perplexity import document_losses, encode_documents, read_text

_CONFIDENCE = 0.95
_RESAMPLES = 1000


class Task(NamedTuple):
    """An adapter's name, the folders that were active when it was finished (itself last), and its held-out text."""

    name: str
    stack: tuple[Path, ...]
    text: Path


def forgetting(base: Path, composed: Path, tasks: Sequence[Task]) -> list[dict[str, Any]]:
    """For each task: the loss of the base, of the adapter as it was finished, and of the composition, on its text.

    Entries {"name", "documents", "tokens", "base", "before", "after", "forgotten" (after - before, nats per token;
    above 0 is worse), "forgotten_low", "forgotten_high" (95 %, over documents), "confidence"}.

    Raises:
        DataError: a text of fewer than two documents. ModelError: an adapter that does not fit, or lacks its parents.
    """
    model = load_any(base)
    tokenizer: Any = AutoTokenizer.from_pretrained(base, local_files_only=True)
    found = []
    for task in tasks:
        documents = encode_documents(tokenizer, read_text(task.text))
        if len(documents) < 2:
            raise DataError(f"{task.text} holds {len(documents)} documents; an interval needs at least 2")
        plain = text_losses(model, documents)
        before = with_adapters(model, task.stack, documents)
        after = with_adapters(model, (composed,), documents)
        found.append({"name": task.name, **_entry(plain, before, after)})
    return found


def with_adapters(model: PreTrainedModel, folders: Sequence[Path], documents: Sequence[Sequence[int]]) -> list[RowLoss]:
    """Losses by document with adapters on a base, one or a stack; the base is clean again afterwards."""
    attached = attach_stack(model, folders) if len(folders) > 1 else attach_adapter(model, folders[0])
    try:
        return text_losses(attached, documents)
    finally:
        attached.unload()


def text_losses(model: PreTrainedModel | PeftModel, documents: Sequence[Sequence[int]]) -> list[RowLoss]:
    """The losses of documents of token ids, each in windows of the model's length."""
    scored = document_losses(model, documents)
    return [RowLoss(str(place), nats, count) for place, (nats, count) in enumerate(scored)]


def _entry(plain: list[RowLoss], before: list[RowLoss], after: list[RowLoss]) -> dict[str, Any]:
    against = compare_losses(before, after, confidence=_CONFIDENCE, resamples=_RESAMPLES, seed=0)
    return {
        "documents": against["rows"],
        "tokens": against["tokens"],
        "base": sum(row.nats for row in plain) / against["tokens"],
        "before": against["base_loss"],
        "after": against["adapter_loss"],
        "forgotten": -against["gain"],
        "forgotten_low": -against["gain_high"],
        "forgotten_high": -against["gain_low"],
        "confidence": _CONFIDENCE,
    }
