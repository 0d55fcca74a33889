"""The base and the adapters that can be asked for by name, loaded once it is certain that they belong together.

An adapter belongs to the base whose digest it records. One that records none has to give its golden logits on it; one
that has neither is refused unless the caller says otherwise. Knows folders and digests; knows nothing of registries,
requests or HTTP.
"""

import copy
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from qlora_core.adapters.adapter_folder import adapter_digest, read_provenance
from qlora_core.data.chat_template import ChatTokenizer, load_chat_tokenizer
from qlora_core.digest import digest_files
from qlora_core.errors import ConfigError, ModelError
from qlora_core.model.adapter import GOLDEN_PROMPTS_FILE, PROVENANCE_FILE, read_golden, verify_golden
from qlora_core.model.adapter_set import AdapterSet, NamedAdapter, attached_adapters
from qlora_core.model.base import load_any
from qlora_core.model.loss import max_positions_of
from qlora_core.registry.load_check import BFLOAT16_TOLERANCE, FLOAT32_TOLERANCE
from qlora_core.serving.answer_text import Decoder

logger = logging.getLogger(__name__)

MODEL_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._:/@+-]{0,199}")
_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class AdapterSource:
    """A PEFT folder to serve as `name`. `address`, `version`, `base_digest`: what a registry says of it, if any."""

    name: str
    folder: Path
    address: str | None = None
    version: str | None = None
    base_digest: str | None = None


@dataclass(frozen=True)
class ServedModel:
    """A name that requests may give. `bound_by` says what showed that the adapter is of this base.

    `decoder` is a tokenizer apart: the engine's thread decodes while another encodes, and one must not do both.
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
    """What is loaded. `max_positions`: the longest prompt with its answer, in tokens; None: no limit is known."""

    model: PreTrainedModel | AdapterSet
    models: dict[str, ServedModel]
    max_positions: int | None
    vocabulary: int


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
    bound = _check_digests(base, adapters, allow_unbound)
    chat = load_chat_tokenizer(base)
    chats = {adapter.name: _chat_of(adapter.folder, chat) for adapter in adapters}
    model = load_any(base, precision=precision, device=device)
    models = {name: ServedModel(name, None, chat, copy.deepcopy(chat.tokenizer))}
    limit, vocabulary = max_positions_of(model), _rows_of(model.get_input_embeddings())
    if not adapters:
        yield Served(model, models, limit, vocabulary)
        return
    with attached_adapters(model, [NamedAdapter(each.name, each.folder) for each in adapters]) as attached:
        for each in adapters:
            _check_golden(attached, each)
            own = chats[each.name]
            models[each.name] = ServedModel(
                each.name,
                each.name,
                own,
                copy.deepcopy(own.tokenizer),
                digest=adapter_digest(each.folder),
                bound_by=bound[each.name],
                source=each,
            )
        yield Served(attached, models, limit, vocabulary)


def base_digest(folder: Path) -> str:
    """The digest that adapters record of the base they were trained on: over names and contents of all its files."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return digest_files({name: path for name, path in files.items() if name != _MANIFEST})


def _rows_of(embeddings: Any) -> int:
    return int(embeddings.weight.shape[0])


def _check_names(names: Sequence[str]) -> None:
    for place, name in enumerate(names):
        if not MODEL_ID.fullmatch(name):
            raise ConfigError(f"{name!r} cannot name a model: letters, digits and . _ : / @ + - are allowed")
        if name in names[:place]:
            raise ConfigError(f"two models are named {name!r}; a request could not say which it means: rename one")


def _check_digests(base: Path, adapters: Sequence[AdapterSource], allow_unbound: bool) -> dict[str, str]:
    """What binds each adapter to the base: "digest", "golden logits" (still to be compared), or "shapes"."""
    bound: dict[str, str] = {}
    present: str | None = None
    for adapter in adapters:
        recorded = _recorded_base(adapter)
        if recorded is not None:
            present = present or base_digest(base)
            if recorded != present:
                raise ModelError(
                    f"{adapter.name}: the adapter in {adapter.folder} was trained on base {recorded}, {base} is "
                    f"{present}; serve it on the base it was trained on"
                )
            bound[adapter.name] = "digest"
        elif (adapter.folder / GOLDEN_PROMPTS_FILE).is_file():
            bound[adapter.name] = "golden logits"
        elif allow_unbound:
            logger.warning("%s records no base and has no golden logits; only its shapes fit %s", adapter.name, base)
            bound[adapter.name] = "shapes"
        else:
            raise ModelError(
                f"{adapter.name}: the adapter in {adapter.folder} records no base and has no golden logits, so nothing "
                "shows that it is of this one; export it with `qlora adapter export --base`, or pass --allow-unbound"
            )
    return bound


def _recorded_base(adapter: AdapterSource) -> str | None:
    if not adapter.folder.is_dir():
        raise ModelError(f"{adapter.name}: no adapter folder {str(adapter.folder)!r}; name a PEFT adapter folder")
    if adapter.base_digest is not None:
        return adapter.base_digest
    if not (adapter.folder / PROVENANCE_FILE).is_file():
        return None
    return read_provenance(adapter.folder).get("quantized_base_digest")


def _chat_of(folder: Path, base: ChatTokenizer) -> ChatTokenizer:
    """The tokenizer and template that the adapter was trained with, where its folder holds them; else the base's."""
    if not (folder / "tokenizer_config.json").is_file():
        return base
    own = load_chat_tokenizer(folder)
    if own.tokenizer.get_vocab() != base.tokenizer.get_vocab():
        raise ModelError(f"the tokenizer in {folder} has another vocabulary than the base's; it is of another base")
    return own


def _check_golden(attached: AdapterSet, adapter: AdapterSource) -> None:
    if not (adapter.folder / GOLDEN_PROMPTS_FILE).is_file():
        return
    largest = max(float(logits.abs().max()) for logits in read_golden(adapter.folder).logits)
    in_float32 = next(attached.base.parameters()).dtype == torch.float32
    with attached.rows([adapter.name]):
        verify_golden(
            attached.base, adapter.folder, atol=FLOAT32_TOLERANCE if in_float32 else BFLOAT16_TOLERANCE * largest
        )
