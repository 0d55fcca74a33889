"""What a quality report is measured on: a text and calibration rows, as tokens; and whether the base fits into memory.

All of it is read and checked before anything is quantized. Knows tokenizers, headers and limits, and no weights.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from transformers import AutoTokenizer

from qlora_core.available_memory import available_memory_bytes
from qlora_core.config.curation import ReadersConfig
from qlora_core.data.containers.record import Record
from qlora_core.data.readers.format import Format
from qlora_core.data.readers.recognise import known_formats, recognise
from qlora_core.data.records import read_records
from qlora_core.data.row import RowError, make_row
from qlora_core.data.source_files import SourceFile
from qlora_core.digest import digest_file
from qlora_core.errors import DataError, ModelError
from qlora_core.model.base import choose_device, choose_precision
from qlora_core.model.perplexity import TOKENS_PER_BATCH, encode_document, encode_documents, read_text
from qlora_core.quantization.checkpoint import max_positions, read_model_config, read_tensors, tokenizer_files

MAX_WINDOW_TOKENS = 2048
"""Longest stretch that is scored at once, also where the model takes more: it bounds logits and attention."""
MIN_TEXT_TOKENS = 100
MAX_CALIBRATION_ROWS = 128
_MAX_ROW_BYTES = 16 << 20


@dataclass(frozen=True)
class Calibration:
    """Token ids, each row at most a window; `origin` says whether they are a file of rows or the text itself.

    `without_text` counts the records of the file that gave none.
    """

    origin: Literal["rows", "text"]
    file: str
    sha256: str
    rows: list[list[int]]
    without_text: int


@dataclass(frozen=True)
class QualityInputs:
    """A text's documents as token ids, the window they are read in, and the calibration rows."""

    file: str
    sha256: str
    documents: list[list[int]]
    window: int
    calibration: Calibration

    @property
    def tokens(self) -> int:
        """Tokens that are predicted: each document's but its first."""
        return sum(max(0, len(ids) - 1) for ids in self.documents)


def read_inputs(source: Path, text_file: Path, calibration_file: Path | None = None) -> QualityInputs:
    """Text and calibration rows in the tokens of the base in `source`; without a file of rows the text serves for both.

    The text is as for `text_loss`. Calibration takes the first `MAX_CALIBRATION_ROWS` rows or stretches of a window. A
    row's text is its field `text`; or its turns, apart by a blank line, for any dataset format that curation reads.

    Raises:
        DataError: a file that cannot be read, a text with under `MIN_TEXT_TOKENS` tokens to predict, rows without text.
        ModelError: the base has no tokenizer, or its config sets no longest sequence.
    """
    tokenizer_files(source)
    tokenizer: Any = AutoTokenizer.from_pretrained(source, local_files_only=True)
    window = min(max_positions(source), MAX_WINDOW_TOKENS)
    documents = encode_documents(tokenizer, read_text(text_file))
    tokens = sum(max(0, len(ids) - 1) for ids in documents)
    if tokens < MIN_TEXT_TOKENS:
        raise DataError(
            f"{text_file} has {tokens} tokens to predict; a quality report needs at least {MIN_TEXT_TOKENS}, and says "
            "little under some thousands: give a longer text"
        )
    digest = digest_file(text_file)
    if calibration_file is None:
        calibration = Calibration("text", text_file.name, digest, _stretches(documents, window), 0)
    else:
        texts, without_text = _read_row_texts(calibration_file)
        encoded = [encode_document(tokenizer, text) for text in texts]
        digest_of_rows = digest_file(calibration_file)
        rows = _stretches(encoded, window)
        calibration = Calibration("rows", calibration_file.name, digest_of_rows, rows, without_text)
    return QualityInputs(text_file.name, digest, documents, window, calibration)


def check_memory(source: Path, *, device: str | None = None, available_bytes: int | None = None) -> None:
    """Refuse a base whose full-precision forward pass cannot fit: a floor from its headers, without activations.

    Counted are all weights in the compute dtype, a batch of logits, and on the CPU three copies of the largest layer
    (source, restored, difference). `available_bytes` is memory of the device; None asks the machine.

    Raises:
        ModelError: with the bytes needed and those available.
    """
    device = device or choose_device()
    itemsize = choose_precision("auto", device).itemsize
    shapes = [tensor.shape for tensor in read_tensors(source).values()]
    weights = itemsize * sum(math.prod(shape) for shape in shapes)
    vocabulary = int(read_model_config(source).get("vocab_size", 0))
    layers = [math.prod(shape) for shape in shapes if vocabulary not in shape]  # embeddings are never quantized
    logits = TOKENS_PER_BATCH * vocabulary * (itemsize + 8)  # as computed, in float32, and their log-softmax
    layer = 3 * 4 * max(layers, default=0) if device == "cpu" else 0
    needed = weights + logits + layer
    available = available_bytes if available_bytes is not None else available_memory_bytes(device)
    if available is not None and needed > available:
        raise ModelError(
            f"a quality report runs {source} in full precision: that takes at least {needed:,} bytes on {device} "
            f"({weights:,} weights, {logits:,} logits, {layer:,} for one layer), and {available:,} are free; "
            "use a machine with more memory, or leave the quality report out"
        )


def _stretches(documents: Sequence[Sequence[int]], window: int) -> list[list[int]]:
    pieces = (list(ids[start : start + window]) for ids in documents for start in range(0, len(ids), window))
    return list(islice(pieces, MAX_CALIBRATION_ROWS))


def _read_row_texts(path: Path) -> tuple[list[str], int]:
    """The texts of a file's first records, at most `MAX_CALIBRATION_ROWS`, and how many records gave none."""
    file = SourceFile(path.name, path)
    records = list(islice(read_records(file, _MAX_ROW_BYTES), MAX_CALIBRATION_ROWS))
    chats = [one for one in records if isinstance(one, Record) and not _plain_text(one.value)]
    form = _format_of(file.name, chats)
    texts: list[str] = []
    without_text = 0
    for record in records:
        found = list(_texts_of(record.value, form, file.name, record.line)) if isinstance(record, Record) else []
        texts += found
        without_text += not found
    if not texts:
        fields = sorted({str(name) for one in chats if isinstance(one.value, Mapping) for name in one.value})
        raise DataError(
            f"calibration rows {path}: none of the first {len(records)} records has a text; its fields are {fields}. "
            "Give rows with a field `text`, or conversations in a dataset format that `qlora curate` reads"
        )
    return texts, without_text


def _texts_of(value: Any, form: Format | None, file: str, line: int) -> Iterator[str]:
    if text := _plain_text(value):
        yield text
    elif form is not None and isinstance(value, Mapping):
        for part in form.parts(value):
            try:
                row = make_row(form.read(part), file, line)
            except RowError:
                continue  # counted by the caller
            yield "\n\n".join(message.content for message in row.messages)


def _plain_text(value: Any) -> str:
    text = value.get("text") if isinstance(value, Mapping) else None
    return text.strip() if isinstance(text, str) else ""


def _format_of(name: str, records: Sequence[Record]) -> Format | None:
    try:
        return recognise(name, records, known_formats(ReadersConfig())) if records else None
    except DataError:
        return None  # then these records have no text, which the caller says
