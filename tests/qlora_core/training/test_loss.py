"""The token-weighted loss and its gradients, against plain float64 computations."""

from collections.abc import Callable, Iterator

import pytest
import torch
from transformers import PreTrainedModel

from qlora_core.data.dataset import TokenRow
from qlora_core.training.batches import collate
from qlora_core.training.lora import AttachedAdapter, attached_adapter
from qlora_core.training.loss import accumulate_gradients, loss_sum
from qlora_core.training.trial import Trial

CPU = torch.device("cpu")


def _reference_nats(base: PreTrainedModel, row: TokenRow) -> float:
    """-sum ln p of the trained tokens of one row alone, token by token, without padding or mask."""
    with torch.no_grad():
        log_p = torch.log_softmax(base(input_ids=torch.tensor([row.input_ids])).logits[0], dim=-1)
    return -sum(log_p[t - 1, row.input_ids[t]].item() for t in range(1, len(row.input_ids)) if row.loss_mask[t])


def _gradients(adapter: AttachedAdapter, rows: list[TokenRow], micro_batch_size: int) -> dict[str, torch.Tensor]:
    for parameter in adapter.parameters.values():
        parameter.grad = None
    batches = [collate(rows[i : i + micro_batch_size], CPU) for i in range(0, len(rows), micro_batch_size)]
    accumulate_gradients(adapter.base, batches, sum(batch.trained_tokens for batch in batches))
    return {name: p.grad.clone() for name, p in adapter.parameters.items() if p.grad is not None}


@pytest.fixture
def nonzero_adapter(base64: PreTrainedModel, trial: Callable[..., Trial]) -> Iterator[AttachedAdapter]:
    with attached_adapter(base64, trial(lora_dropout=0.0).params) as adapter:
        generator = torch.Generator().manual_seed(0)
        for parameter in adapter.parameters.values():
            parameter.data.normal_(std=0.1, generator=generator)
        yield adapter


def test_loss_sum_of_a_padded_batch_is_the_sum_of_its_rows_alone(
    base64: PreTrainedModel, rows: Callable[..., list[TokenRow]]
) -> None:
    batch = rows(5, seed=3)
    with torch.no_grad():
        found = loss_sum(base64, collate(batch, CPU)).item()
    assert found == pytest.approx(sum(_reference_nats(base64, row) for row in batch), rel=1e-12)


def test_a_batch_without_labels_has_loss_zero(base64: PreTrainedModel) -> None:
    with torch.no_grad():
        assert loss_sum(base64, collate([TokenRow("a", [1, 2, 3], [False] * 3)], CPU)).item() == 0.0


@pytest.mark.parametrize("micro_batch_size", [1, 2, 5])
def test_accumulated_gradients_equal_those_of_one_big_batch(
    nonzero_adapter: AttachedAdapter, rows: Callable[..., list[TokenRow]], micro_batch_size: int
) -> None:
    batch = rows(12, seed=3)
    whole = _gradients(nonzero_adapter, batch, 12)
    parts = _gradients(nonzero_adapter, batch, micro_batch_size)
    assert whole.keys() == parts.keys() == nonzero_adapter.parameters.keys()
    for name, gradient in whole.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(parts[name], gradient, rtol=1e-10, atol=1e-13)


def test_a_mean_of_micro_batch_means_would_be_another_gradient(
    nonzero_adapter: AttachedAdapter, rows: Callable[..., list[TokenRow]]
) -> None:
    batch = rows(12, seed=3)
    whole = _gradients(nonzero_adapter, batch, 12)
    for parameter in nonzero_adapter.parameters.values():
        parameter.grad = None
    for row in batch:
        micro = collate([row], CPU)
        (loss_sum(nonzero_adapter.base, micro) / micro.trained_tokens / len(batch)).backward()
    differences = [
        ((p.grad - whole[name]).norm() / whole[name].norm()).item()
        for name, p in nonzero_adapter.parameters.items()
        if p.grad is not None
    ]
    assert max(differences) > 1e-3


def test_gradient_matches_a_finite_difference(
    nonzero_adapter: AttachedAdapter, rows: Callable[..., list[TokenRow]]
) -> None:
    # A wide shift: transformers' norms and rotary tables stay in float32, so the loss itself is exact to about 1e-8
    batch, shift = rows(4, seed=3), 1e-2
    gradients = _gradients(nonzero_adapter, batch, 2)
    micro = collate(batch, CPU)
    for name, parameter in list(nonzero_adapter.parameters.items())[::7]:
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter[0, 0] += sign * shift
                losses.append(loss_sum(nonzero_adapter.base, micro).item() / micro.trained_tokens)
                parameter[0, 0] -= sign * shift
        slope = (losses[0] - losses[1]) / (2 * shift)
        assert slope == pytest.approx(gradients[name][0, 0].item(), rel=1e-2, abs=1e-5)


def test_accumulation_reports_raw_sums_in_nats(base64: PreTrainedModel, trial: Callable[..., Trial]) -> None:
    short, long = TokenRow("a", [1, 2], [False, True]), TokenRow("b", list(range(9)), [False] + [True] * 8)
    with attached_adapter(base64, trial().params) as adapter:
        sums = accumulate_gradients(adapter.base, [collate([short], CPU), collate([long], CPU)], 9)
    expected = [_reference_nats(base64, row) for row in (short, long)]
    assert sums == pytest.approx(expected, rel=1e-12)  # B is zero, so the adapter changes nothing yet
