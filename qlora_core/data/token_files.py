"""The sides of the split in tokens, written shard by shard and counted on the way. Decides nothing."""

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from qlora_core.config.curation import PackingConfig
from qlora_core.config.data import DataConfig
from qlora_core.data.chat_template import ChatTokenizer
from qlora_core.data.encodings import PARTS, EncodedRows, Encoder
from qlora_core.data.loss_mask import MaskedRow, text_parts
from qlora_core.data.memory import return_memory
from qlora_core.data.packing import PACKS_FILE, pack_rows, packing_summary, sequence_tokens, write_packs
from qlora_core.data.preference_pairs import log_lost_pairs, with_rejected
from qlora_core.data.proof_tags import PROOF_SCHEMA
from qlora_core.data.remaining import Remaining
from qlora_core.data.row import text_json, turn_json
from qlora_core.data.split_columns import read_columns
from qlora_core.data.tables import SplitWriter
from qlora_core.data.tags.personal_data import Recogniser
from qlora_core.data.window import fit
from qlora_core.errors import DataError
from qlora_core.progress import progress_bar

BATCH_ROWS = 512
SAMPLE_ROWS = 20


@dataclass
class WrittenSide:
    """What was written of one side: lengths and trained tokens by row, counts by source, samples, names of tags.

    `digest` is over the rows in order: ids, categories, messages with their train flags.
    """

    lengths: array = field(default_factory=lambda: array("q"))
    trained: array = field(default_factory=lambda: array("q"))
    sources: Counter[str] = field(default_factory=Counter)
    tokens_by_source: Counter[str] = field(default_factory=Counter)
    licences: dict[str, Counter[str]] = field(default_factory=dict)
    generators: Counter[str] = field(default_factory=Counter)
    samples: list["Sample"] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    digest: Any = field(default_factory=hashlib.sha256)

    def add(self, rows: pa.Table) -> None:
        """Count the next rows, a table of ROW_SCHEMA."""
        lengths = rows.column("tokens").to_numpy()
        trained = _trained(rows.column("loss_mask").combine_chunks())
        sources = rows.column("source").to_pylist()
        self.lengths.frombytes(lengths.astype(np.int64).tobytes())
        self.trained.frombytes(trained.tobytes())
        self.sources.update(sources)
        for source, length in zip(sources, lengths.tolist(), strict=True):
            self.tokens_by_source[source] += length
        for source, licence in zip(sources, rows.column("licence").to_pylist(), strict=True):
            self.licences.setdefault(source, Counter())[licence or "not stated"] += 1
        self.generators.update(generator or "not stated" for generator in rows.column("generator").to_pylist())
        if len(self.samples) < SAMPLE_ROWS:
            shown = rows.slice(0, SAMPLE_ROWS - len(self.samples)).select(["id", "input_ids", "loss_mask"])
            self.samples += [Sample(**values) for values in shown.to_pylist()]
        self.digest.update("".join(_content_lines(rows)).encode())


@dataclass(frozen=True, slots=True)
class Sample:
    """A row as it is trained, to be shown."""

    id: str
    input_ids: list[int]
    loss_mask: list[bool]


def _trained(masks: pa.ListArray) -> np.ndarray:
    """How many tokens of each row carry loss, int64. A row's first token is predicted from nothing: it never does."""
    starts = masks.offsets.to_numpy() - masks.offsets[0].as_py()
    flags = masks.flatten().to_numpy(zero_copy_only=False)
    before = np.concatenate([[0], np.cumsum(flags, dtype=np.int64)])
    return before[starts[1:]] - before[starts[:-1] + 1]


def _content_lines(rows: pa.Table) -> Iterator[str]:
    """What the digest is over: a row's id, category, turns with their flags, tools and rejected answer as JSON."""
    messages = rows.column("messages").combine_chunks()
    said = messages.flatten()
    train = rows.column("train").combine_chunks().flatten().to_pylist()
    turns = list(map(turn_json, said.field("role").to_pylist(), said.field("content").to_pylist(), train))
    bounds = (messages.offsets.to_numpy() - messages.offsets[0].as_py()).tolist()
    names = ("id", "category", "tools", "rejected")
    for (start, stop), row_id, category, *others in zip(
        pairwise(bounds), *(rows.column(name).to_pylist() for name in names), strict=True
    ):
        extra = "".join(f",{text_json(value)}" for value in others if value is not None)
        yield f"[{text_json(row_id)},{text_json(category)},[{','.join(turns[start:stop])}]{extra}]\n"


def write_sides(
    out: Path,
    remaining: Remaining,
    sides: Mapping[str, np.ndarray],
    encoder: Encoder,
    limit: int,
    config: DataConfig,
) -> dict[str, WrittenSide]:
    """Tokenize the rows of every side, in the order given (rising id), and write them with their tags.

    Rows are proven already; they are encoded again, some hundred at a time, or found as an earlier run encoded them.
    All sides grow together, by ranges of ids.
    """
    types = {entry.name: entry.type for entry in remaining.tags.table.schema if _is_written(entry)}
    written = {side: WrittenSide(tags=list(types)) for side in sides}
    return_memory()
    encoded_rows = EncodedRows(encoder, remaining.rows, remaining.numbers("tokens") <= limit)
    parts = {side: encoded_rows.parts(positions) for side, positions in sides.items()}
    lost_pairs: Counter[str] = Counter()
    with ExitStack() as open_files, progress_bar("Tokenizing", sum(map(len, sides.values()))) as advance:
        writers = {
            side: open_files.enter_context(SplitWriter(out, side, len(positions), config.shard_rows, types))
            for side, positions in sides.items()
        }
        for part in range(PARTS):
            runs = list(_runs({side: parts[side][part] for side in sides}))
            encoded = encoded_rows.encode(part, [np.concatenate(list(run.values())) for run in runs])
            for run, found in zip(runs, encoded, strict=True):
                masked = _fitting(found.masked, limit, config)
                masked = with_rejected(encoder.chat, masked, limit, config.over_long, lost_pairs)
                rows = found.table(masked)
                _check_fit(rows, limit)
                tags = remaining.tags.take(np.concatenate(list(run.values()))).table.select(list(types))
                for side, here, tags_here in _by_side(run, rows, tags):
                    writers[side].write(here, dict(zip(types, tags_here.columns, strict=True)))
                    written[side].add(here)
                advance(len(rows))
            return_memory()
    log_lost_pairs(lost_pairs)
    return written


def show_samples(chat: ChatTokenizer, samples: Sequence[Sample], config: DataConfig) -> list[dict[str, Any]]:
    """Rows as trained, for the report: secrets and personal data are masked there even where the rows keep them."""
    recogniser = Recogniser(config.tags.allow)
    shown = []
    for sample in samples:
        parts = text_parts(chat, sample.input_ids, sample.loss_mask)
        text_of = [{"text": recogniser.masked(text), "trained": trained} for text, trained in parts]
        shown.append({"id": sample.id, "text_parts": text_of})
    return shown


def write_packed(out: Path, train: WrittenSide, limit: int, config: PackingConfig) -> dict[str, Any] | None:
    """Write which training rows share a sequence; what that saves, or None where packing is off."""
    if not config.enabled:
        return None
    lengths, trained = np.array(train.lengths, np.int64), np.array(train.trained, np.int64)
    ids = read_columns(out, "train", ["id"]).column("id").to_pylist()
    packs = pack_rows(ids, lengths, trained, sequence_tokens(config.tokens, limit))
    write_packs(out / PACKS_FILE, packs, ids)
    return packing_summary(packs, lengths, trained)


def _runs(sides: Mapping[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    """The positions of all sides, cut into runs of up to BATCH_ROWS: small sides share one, for each has its cost."""
    run: dict[str, np.ndarray] = {}
    room = BATCH_ROWS
    for side, positions in sides.items():
        while len(positions):
            run[side], positions = positions[:room], positions[room:]
            room -= len(run[side])
            if not room:
                yield run
                run, room = {}, BATCH_ROWS
    if run:
        yield run


def _by_side(run: Mapping[str, np.ndarray], rows: pa.Table, tags: pa.Table) -> Iterator[tuple[str, pa.Table, pa.Table]]:
    """The rows of a run and their tags, one side after the other."""
    start = 0
    for side, positions in run.items():
        yield side, rows.slice(start, len(positions)), tags.slice(start, len(positions))
        start += len(positions)


def _fitting(proven: Sequence[MaskedRow], limit: int, config: DataConfig) -> list[MaskedRow]:
    masked = [fit(one, limit, config.over_long) for one in proven]
    fitting = [one for one in masked if one is not None]
    if len(fitting) != len(masked):
        raise _misfit(len(masked) - len(fitting), limit)
    return fitting


def _check_fit(rows: pa.Table, limit: int) -> None:
    too_long = int((rows.column("tokens").to_numpy() > limit).sum())
    if too_long:
        raise _misfit(too_long, limit)


def _misfit(count: int, limit: int) -> DataError:
    return DataError(
        f"{count} rows are longer than {limit} tokens, but were measured as shorter. The tag cache is not of this "
        "tokenizer: remove it, and please report this"
    )


def _is_written(entry: pa.Field) -> bool:
    """Tags of one value a row, but for those of the proof: its figures are columns of the rows themselves."""
    kinds = (pa.types.is_boolean, pa.types.is_integer, pa.types.is_floating, pa.types.is_string)
    return entry.name not in PROOF_SCHEMA.names and any(is_kind(entry.type) for is_kind in kinds)
