"""Lays the rows of several trials end to end, or padded under each other, and says which tokens are whose.

Knows nothing of adapters or losses. Shapes: T tokens of all rows end to end; B rows, L tokens of the longest, where
rows are padded; P predicted positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from qlora_core.data.dataset import TokenRow
from qlora_core.model.document_attention import document_inputs
from qlora_core.model.encoder_decoder import answer_start, encoder_decoder_inputs, is_encoder_decoder
from qlora_core.model.packed_attention import document_positions, isolating_inputs
from qlora_core.training.batches import PackedRow, labels_of
from qlora_core.training.preference import PairTerms


@dataclass(frozen=True)
class Part:
    """One trial's rows of a pass: `first_row` is the place of `rows[0]` in the trial's effective batch.

    With `pairs`, rows 2i and 2i + 1 are the better and the worse answer of preference pair i.
    """

    slot: int
    rows: Sequence[TokenRow]
    first_row: int
    step: int
    pairs: PairTerms | None = None


@dataclass(frozen=True)
class Span:
    """The rows of one slot in a pass, as a range of the leading axis of what the base computes on.

    `tokens` and `rows` (int64, one each of the range's tokens) say where a token stands: its place in its row, and the
    row's place in the effective batch; dropout is drawn from them.
    """

    slot: int
    start: int
    stop: int
    step: int
    tokens: torch.Tensor
    rows: torch.Tensor


@dataclass(frozen=True)
class Layout:
    """One pass over the base: `inputs` of its forward, the spans of its slots, and what is predicted where.

    `kept` (int64 [P]) are flat positions, `labels` [P] the tokens to predict there, `bounds` each part's range of P.
    With an encoder and a decoder these are the decoder's, and `source_spans` are the spans among the encoder's tokens.
    """

    inputs: dict[str, Any]
    spans: tuple[Span, ...]
    kept: torch.Tensor
    labels: torch.Tensor
    bounds: tuple[tuple[int, int], ...]
    end_to_end: bool
    source_spans: tuple[Span, ...] = ()


def lay_out(parts: Sequence[Part], base: PreTrainedModel, *, end_to_end: bool) -> Layout:
    """The pass that computes all parts at once; every part has at least one row."""
    if is_encoder_decoder(base):
        return _encoder_decoder(parts, base)
    return _end_to_end(parts, base.device) if end_to_end else _padded(parts, base)


def _end_to_end(parts: Sequence[Part], device: torch.device) -> Layout:
    ids: list[int] = []
    lengths: list[int] = []
    kept: list[int] = []
    labels: list[int] = []
    spans, bounds = [], []
    for part in parts:
        start, first_kept = len(ids), len(kept)
        for row in part.rows:
            for place, label in labels_of(row):
                kept.append(len(ids) + place)
                labels.append(label)
            ids.extend(row.input_ids)
            lengths.extend(row.lengths if isinstance(row, PackedRow) else (len(row.input_ids),))
        spans.append(_span(part, start, len(ids), [len(row.input_ids) for row in part.rows], device))
        bounds.append((first_kept, len(kept)))
    inputs = {"input_ids": torch.tensor([ids], device=device), **document_inputs(lengths, device)}
    return Layout(inputs, tuple(spans), _ints(kept, device), _ints(labels, device), tuple(bounds), end_to_end=True)


def _padded(parts: Sequence[Part], base: PreTrainedModel) -> Layout:
    device = base.device
    every = [row for part in parts for row in part.rows]
    longest = max(len(row.input_ids) for row in every)
    ids_BL = torch.zeros((len(every), longest), dtype=torch.long)
    mask_BL = torch.zeros((len(every), longest), dtype=torch.long)
    kept: list[int] = []
    labels: list[int] = []
    spans, bounds = [], []
    place = 0
    for part in parts:
        start, first_kept = place, len(kept)
        for row in part.rows:
            ids_BL[place, : len(row.input_ids)] = torch.tensor(list(row.input_ids))
            mask_BL[place, : len(row.input_ids)] = 1
            for token, label in labels_of(row):
                kept.append(place * longest + token)
                labels.append(label)
            place += 1
        spans.append(_span(part, start * longest, place * longest, [longest] * len(part.rows), device))
        bounds.append((first_kept, len(kept)))
    inputs: dict[str, Any] = {"input_ids": ids_BL.to(device), **_mask_inputs(every, mask_BL.to(device), base)}
    return Layout(inputs, tuple(spans), _ints(kept, device), _ints(labels, device), tuple(bounds), end_to_end=False)


def _encoder_decoder(parts: Sequence[Part], base: PreTrainedModel) -> Layout:
    inputs = encoder_decoder_inputs(base, [row for part in parts for row in part.rows])
    source, target = inputs["input_ids"].shape[1], inputs["decoder_input_ids"].shape[1]
    kept: list[int] = []
    labels: list[int] = []
    spans, source_spans, bounds = [], [], []
    place = 0
    for part in parts:
        count, first_kept = len(part.rows), len(kept)
        for own, row in enumerate(part.rows):
            # The token predicted at position t of the row is the decoder's token t + 1 - start
            kept.extend((place + own) * target + token + 1 - answer_start(row) for token, _ in labels_of(row))
            labels.extend(label for _, label in labels_of(row))
        spans.append(_span(part, place * target, (place + count) * target, [target] * count, base.device))
        source_spans.append(_span(part, place * source, (place + count) * source, [source] * count, base.device))
        bounds.append((first_kept, len(kept)))
        place += count
    where = (_ints(kept, base.device), _ints(labels, base.device))
    return Layout(inputs, tuple(spans), *where, tuple(bounds), end_to_end=False, source_spans=tuple(source_spans))


def _mask_inputs(rows: Sequence[TokenRow], mask_BL: torch.Tensor, base: PreTrainedModel) -> dict[str, Any]:
    packed = [row for row in rows if isinstance(row, PackedRow)]
    if not packed:
        return {"attention_mask": mask_BL, "use_cache": False}
    width = mask_BL.shape[1]
    lengths = [row.lengths if isinstance(row, PackedRow) else (len(row.input_ids),) for row in rows]
    positions = [document_positions(own, width) for own in lengths]
    return isolating_inputs(base, torch.tensor(positions, device=mask_BL.device))


def _span(part: Part, start: int, stop: int, lengths: Sequence[int], device: torch.device) -> Span:
    tokens = torch.cat([torch.arange(length) for length in lengths])
    rows = torch.repeat_interleave(torch.arange(len(lengths)) + part.first_row, torch.tensor(lengths))
    return Span(part.slot, start, stop, part.step, tokens.to(device), rows.to(device))


def _ints(values: Sequence[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.long, device=device)
