"""The base and the adapters that can be asked for by name, loaded once `admission` has let them in.

More can be put on while others are answered. Knows models on a device; knows nothing of registries, requests or HTTP.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from qlora_core.data.chat_template import ChatTokenizer
from qlora_core.errors import ConfigError, ModelError
from qlora_core.model.adapter import GOLDEN_PROMPTS_FILE, read_golden, verify_golden
from qlora_core.model.adapter_set import AdapterSet, NamedAdapter, attached_adapters
from qlora_core.model.base import load_any
from qlora_core.model.loss import max_positions_of
from qlora_core.registry.load_check import BFLOAT16_TOLERANCE, FLOAT32_TOLERANCE
from qlora_core.serving.admission import AdapterSource, Admission, Admitted
from qlora_core.serving.answer_text import Decoder

MODEL_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._:/@+-]{0,199}")


@dataclass(frozen=True)
class ServedModel:
    """A name that requests may give. `bound_by` says what showed that the adapter is of this base.

    `adapter`: what its rows are called in the set, None for the base; an adapter that took over a name is called
    something else than that name. `decoder` is a tokenizer apart: the engine's thread decodes while another encodes,
    and one must not do both.
    """

    id: str
    adapter: str | None
    chat: ChatTokenizer
    decoder: Decoder
    digest: str | None = None
    bound_by: str | None = None
    source: AdapterSource | None = None

    @property
    def stop_token_ids(self) -> frozenset[int]:
        """What ends an answer: the template's stop token, and the tokenizer's own end of text."""
        eos: Any = self.chat.tokenizer.eos_token_id
        return frozenset({self.chat.stop_token_id} | ({int(eos)} if eos is not None else set()))


@dataclass(frozen=True)
class Served:
    """What is loaded. `max_positions`: the longest prompt with its answer, in tokens; None: no limit is known.

    `admission`: lets in what is to be loaded beside it.
    """

    model: PreTrainedModel | AdapterSet
    models: dict[str, ServedModel]
    max_positions: int | None
    vocabulary: int
    admission: Admission


@contextmanager
def open_served(
    base: Path,
    adapters: Sequence[AdapterSource],
    *,
    base_name: str | None = None,
    precision: str = "auto",
    device: str | None = None,
    allow_unbound: bool = False,
) -> Iterator[Served]:
    """Load the base of a folder, 4-bit or not, and put the adapters on it while the block runs.

    Raises:
        ConfigError: a name that is odd or given twice. ModelError: an adapter of another base, or one that cannot show
            that it is of this one; what `attached_adapters` and `load_any` refuse; a tokenizer of another vocabulary.
    """
    name = base_name or base.name
    _check_names([name, *(adapter.name for adapter in adapters)])
    admission = Admission(base, allow_unbound=allow_unbound)
    admitted = [admission.admit(adapter) for adapter in adapters]
    model = load_any(base, precision=precision, device=device)
    models = {name: ServedModel(name, None, admission.chat, admission.decoder())}
    limit, vocabulary = max_positions_of(model), _rows_of(model.get_input_embeddings())
    if not adapters:
        yield Served(model, models, limit, vocabulary, admission)
        return
    with attached_adapters(model, [NamedAdapter(each.name, each.folder) for each in adapters]) as attached:
        for each in admitted:
            _check_golden(attached, each.source.name, each.source)
            models[each.source.name] = _served_model(each, each.source.name)
        yield Served(attached, models, limit, vocabulary, admission)


def put_on(attached: AdapterSet, admitted: Admitted, name: str) -> ServedModel:
    """Put an adapter beside those that are on the base, as `name`; to be called while no batch runs.

    Raises:
        ModelError: it does not fit, or its golden logits do not come out; the set is as it was then.
    """
    _check_names([admitted.source.name])
    attached.add(NamedAdapter(name, admitted.source.folder))
    try:
        _check_golden(attached, name, admitted.source)
    except ModelError:
        attached.drop(name)
        raise
    return _served_model(admitted, name)


def _served_model(admitted: Admitted, adapter: str) -> ServedModel:
    return ServedModel(
        admitted.source.name,
        adapter,
        admitted.chat,
        admitted.decoder,
        digest=admitted.digest,
        bound_by=admitted.bound_by,
        source=admitted.source,
    )


def _rows_of(embeddings: Any) -> int:
    return int(embeddings.weight.shape[0])


def _check_names(names: Sequence[str]) -> None:
    for place, name in enumerate(names):
        if not MODEL_ID.fullmatch(name):
            raise ConfigError(f"{name!r} cannot name a model: letters, digits and . _ : / @ + - are allowed")
        if name in names[:place]:
            raise ConfigError(f"two models are named {name!r}; a request could not say which it means: rename one")


def _check_golden(attached: AdapterSet, name: str, adapter: AdapterSource) -> None:
    if not (adapter.folder / GOLDEN_PROMPTS_FILE).is_file():
        return
    largest = max(float(logits.abs().max()) for logits in read_golden(adapter.folder).logits)
    in_float32 = next(attached.base.parameters()).dtype == torch.float32
    with attached.rows([name]):
        verify_golden(
            attached.base, adapter.folder, atol=FLOAT32_TOLERANCE if in_float32 else BFLOAT16_TOLERANCE * largest
        )
