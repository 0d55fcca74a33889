"""Length and mask proof as tags, so that a row that was proven before is not proven again."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from qlora_core.data.chat_template import ChatTokenizer
from qlora_core.data.proof_tags import PROOF_SCHEMA, prove_rows
from qlora_core.data.row import Row
from qlora_core.data.tags.tagger import Tagged, fingerprint_of
from qlora_core.digest import digest_files
from qlora_core.quantization.checkpoint import tokenizer_files

# Raise it whenever the proof would say something else of the same row.
PROOF_VERSION = 1


class ProofTagger:
    """The columns of `PROOF_SCHEMA` for the tokenizer in `folder` under the template that `chat` uses.

    The window is no part of it: a length is compared with it later. It never fails: a row without a proof has a rule.
    """

    name = "proof"
    cached = True
    schema: pa.Schema = PROOF_SCHEMA

    def __init__(self, chat: ChatTokenizer, folder: Path) -> None:
        self._chat = chat
        self.fingerprint = fingerprint_of(self.name, PROOF_VERSION, PROOF_SCHEMA, tokenizer_settings(chat, folder))

    def tag(self, rows: Sequence[Row]) -> Tagged:
        """Render, tokenize and decode every row."""
        return Tagged(prove_rows(self._chat, rows), np.zeros(len(rows), dtype=bool))


def tokenizer_settings(chat: ChatTokenizer, folder: Path) -> dict[str, Any]:
    """What decides how a row is rendered and encoded by the tokenizer in `folder`, for a fingerprint."""
    return {"tokenizer": digest_files(tokenizer_files(folder)), "template": chat.tokenizer.chat_template}
