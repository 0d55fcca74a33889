import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from qlora_core.errors import ModelError
from qlora_core.model.adapter import attach_adapter
from qlora_core.model.adapter_set import NamedAdapter, attached_adapters
from qlora_core.model.loss import sequence_losses


@dataclass(frozen=True)
class Row:
    input_ids: list[int]
    loss_mask: list[bool]


def rows_of(lengths: list[int]) -> list[Row]:
    generator = torch.Generator().manual_seed(1)
    return [
        Row(
            torch.randint(3, 98, (length,), generator=generator).tolist(),
            torch.rand(length, generator=generator).gt(0.4).tolist(),
        )
        for length in lengths
    ]


def reference(model: PreTrainedModel, row: Row) -> tuple[float, int]:
    """One row alone; log-softmax in float64 of the model's float32 logits."""
    with torch.inference_mode():
        logits = model(torch.tensor([row.input_ids]), use_cache=False).logits[0].double()
    nats = [-torch.log_softmax(logits[place - 1], -1)[token].item() for place, token in enumerate(row.input_ids)]
    counted = [nats[place] for place in range(1, len(nats)) if row.loss_mask[place]]
    return math.fsum(counted), len(counted)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_sums_equal_the_reference_in_order_whatever_the_batch(shared_model: PreTrainedModel, batch_size: int) -> None:
    rows = rows_of([5, 40, 2, 17, 64, 17, 9])
    found = sequence_losses(shared_model, rows, batch_size=batch_size)
    for row, (nats, count) in zip(rows, found, strict=True):
        expected, expected_count = reference(shared_model, row)
        assert count == expected_count
        assert nats == pytest.approx(expected, rel=2e-6)


def test_first_token_and_unmarked_rows_count_nothing(shared_model: PreTrainedModel) -> None:
    rows = [Row([1], [True]), Row([], []), Row([1, 40, 50], [True, False, False]), Row([1, 40], [True, True])]
    found = sequence_losses(shared_model, rows, batch_size=2)
    assert found[:3] == [(0.0, 0)] * 3
    assert found[3][1] == 1


def test_no_rows_give_no_losses(shared_model: PreTrainedModel) -> None:
    assert sequence_losses(shared_model, [], batch_size=4) == []


def test_padding_is_not_seen(shared_model: PreTrainedModel) -> None:
    """Negative control: what stands in a neighbour must not matter, what stands in the row must."""
    short, other, long = rows_of([6, 6, 30])
    alone = sequence_losses(shared_model, [short], batch_size=1)[0][0]
    beside = sequence_losses(shared_model, [long, short], batch_size=2)[1][0]
    assert beside == pytest.approx(alone, rel=2e-6)
    mixed = Row(other.input_ids, short.loss_mask)
    assert sequence_losses(shared_model, [mixed], batch_size=1)[0][0] != pytest.approx(alone, rel=1e-3)


def test_row_beyond_the_models_positions_is_refused(shared_model: PreTrainedModel) -> None:
    with pytest.raises(ModelError, match=r"row 1 has 65 tokens, the model takes 64; lower data\.max_tokens"):
        sequence_losses(shared_model, rows_of([3, 65]), batch_size=1)


def test_mask_of_another_length_is_refused(shared_model: PreTrainedModel) -> None:
    with pytest.raises(ModelError, match="row 0 has 3 tokens but a loss mask of 2"):
        sequence_losses(shared_model, [Row([1, 2, 3], [True, True])], batch_size=1)


def test_batch_size_below_one_is_refused(shared_model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="at least 1, not 0"):
        sequence_losses(shared_model, rows_of([3]), batch_size=0)


def test_each_row_is_scored_under_its_own_adapter(
    model: PreTrainedModel, shared_model: PreTrainedModel, unlike_adapters: dict[str, Path]
) -> None:
    rows = rows_of([9, 9, 9])
    with attached_adapters(model, [NamedAdapter(name, unlike_adapters[name]) for name in ("rs", "wide")]) as adapters:
        found = sequence_losses(adapters, rows, batch_size=2, adapters=["wide", None, "rs"])
    alone = attach_adapter(model, unlike_adapters["wide"])
    assert found[0] == (pytest.approx(sequence_losses(alone, rows[:1], batch_size=1)[0][0], rel=2e-6), found[0][1])
    assert found[1] == (pytest.approx(reference(shared_model, rows[1])[0], rel=2e-6), found[1][1])
    base = reference(shared_model, rows[2])[0]
    assert found[2][0] != pytest.approx(base, rel=1e-3)
