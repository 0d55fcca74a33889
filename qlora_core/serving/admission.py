"""Which adapters may answer on a base: those that show that they are of it, by its digest or by their golden logits.

An adapter belongs to the base whose digest it records. One that records none has to give its golden logits on it; one
that has neither is refused unless the caller says otherwise. Knows folders and digests; knows no model.
"""

import copy
import logging
import threading
from dataclasses import dataclass
from pathlib import Path

from qlora_core.adapters.adapter_folder import adapter_digest, read_provenance
from qlora_core.data.chat_template import ChatTokenizer, load_chat_tokenizer
from qlora_core.digest import digest_files
from qlora_core.errors import ModelError
from qlora_core.model.adapter import GOLDEN_PROMPTS_FILE, PROVENANCE_FILE
from qlora_core.serving.answer_text import Decoder

logger = logging.getLogger(__name__)

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
class Admitted:
    """An adapter that may be put on the base. `bound_by`: "digest", "golden logits" (still to be compared), "shapes".

    `chat`: the tokenizer and template that it was trained with, where its folder holds them; else the base's.
    `decoder`: a tokenizer apart, for another thread than the one that encodes.
    """

    source: AdapterSource
    bound_by: str
    chat: ChatTokenizer
    decoder: Decoder
    digest: str


class Admission:
    """Lets adapters in for the base in a folder. The base's files are read once, when an adapter first asks for it."""

    def __init__(self, base: Path, *, allow_unbound: bool) -> None:
        self.chat = load_chat_tokenizer(base)
        self._unused = copy.deepcopy(self.chat.tokenizer)  # one that encodes at the same time must not be copied
        self._base = base
        self._allow_unbound = allow_unbound
        self._digest: str | None = None
        self._lock = threading.Lock()

    def admit(self, source: AdapterSource) -> Admitted:
        """Check an adapter's folder against the base.

        Raises:
            ModelError: it is of another base, cannot show that it is of this one, or has a tokenizer of another
                vocabulary.
        """
        bound_by, own = self._bound_by(source), self._own_chat(source.folder)
        chat, decoder = (self.chat, self.decoder()) if own is None else (own, copy.deepcopy(own.tokenizer))
        return Admitted(source, bound_by, chat, decoder, adapter_digest(source.folder))

    def decoder(self) -> Decoder:
        """A copy of the base's tokenizer that nobody else uses. From any thread."""
        with self._lock:
            return copy.deepcopy(self._unused)

    def _bound_by(self, source: AdapterSource) -> str:
        recorded = _recorded_base(source)
        if recorded is not None:
            present = self._base_digest()
            if recorded != present:
                raise ModelError(
                    f"{source.name}: the adapter in {source.folder} was trained on base {recorded}, {self._base} is "
                    f"{present}; serve it on the base it was trained on"
                )
            return "digest"
        if (source.folder / GOLDEN_PROMPTS_FILE).is_file():
            return "golden logits"
        if self._allow_unbound:
            logger.warning(
                "%s records no base and has no golden logits; only its shapes fit %s", source.name, self._base
            )
            return "shapes"
        raise ModelError(
            f"{source.name}: the adapter in {source.folder} records no base and has no golden logits, so nothing "
            "shows that it is of this one; export it with `qlora adapter export --base`, or pass --allow-unbound"
        )

    def _base_digest(self) -> str:
        with self._lock:
            self._digest = self._digest or base_digest(self._base)
            return self._digest

    def _own_chat(self, folder: Path) -> ChatTokenizer | None:
        if not (folder / "tokenizer_config.json").is_file():
            return None
        own = load_chat_tokenizer(folder)
        if own.tokenizer.get_vocab() != self._unused.get_vocab():
            raise ModelError(f"the tokenizer in {folder} has another vocabulary than the base's; it is of another base")
        return own


def base_digest(folder: Path) -> str:
    """The digest that adapters record of the base they were trained on: over names and contents of all its files."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return digest_files({name: path for name, path in files.items() if name != _MANIFEST})


def _recorded_base(source: AdapterSource) -> str | None:
    if not source.folder.is_dir():
        raise ModelError(f"{source.name}: no adapter folder {str(source.folder)!r}; name a PEFT adapter folder")
    if source.base_digest is not None:
        return source.base_digest
    if not (source.folder / PROVENANCE_FILE).is_file():
        return None
    return read_provenance(source.folder).get("quantized_base_digest")
