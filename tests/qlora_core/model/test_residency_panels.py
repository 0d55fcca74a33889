"""The scratch by panels: the bits of the dense layer and of bitsandbytes, proven before panels are used."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit, Params4bit

from qlora_core.model.residency import layers, panels
from qlora_core.model.residency.layers import set_residency

SHAPE = (1088, 1216)
"""in, out: large enough for panels, and no multiple of them."""


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(panels, "_agreed", {})
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "bias"])
def stock(request: pytest.FixtureRequest) -> Any:
    generator = torch.Generator().manual_seed(0)
    make: Any = Params4bit
    layer: Any = Linear4bit(*SHAPE, bias=request.param, compute_dtype=torch.float32, quant_type="nf4")
    weight = torch.randn(SHAPE[::-1], generator=generator)
    layer.weight = make(weight, requires_grad=False, quant_type="nf4", module=layer).to("cpu")
    if request.param:
        layer.bias = torch.nn.Parameter(torch.randn(SHAPE[1], generator=generator), requires_grad=False)
    layer.support_avx512bf16_for_cpu = False
    return layer


def in_residency(layer: Any, residency: Any) -> Any:
    changed = copy.deepcopy(layer)
    set_residency(changed, residency, torch.float32)
    return changed


def forward_backward(layer: Any, *rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(*rows, SHAPE[0], generator=generator).requires_grad_()
    y = layer(x)
    (gradient,) = torch.autograd.grad(y, x, torch.randn(y.shape, generator=generator))
    return y.detach(), gradient


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The axis of every product that a layer takes by panels, from here on."""
    taken: list[str] = []

    def product(x: Any, stored: Any, axis: Any, *others: Any) -> torch.Tensor:
        taken.append(axis)
        return panels.product(x, stored, axis, *others)

    monkeypatch.setattr(layers, "product", product)
    return taken


@pytest.mark.parametrize("rows", [(1,), (16,), (3, 7), (2, 5, 4), (128,)])
def test_few_rows_go_by_panels_with_the_bits_of_the_other_ways(
    stock: Any, rows: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = counted(monkeypatch)
    expected = [forward_backward(layer, *rows) for layer in (stock, in_residency(stock, "dense"))]
    found = forward_backward(in_residency(stock, "scratch"), *rows)
    assert taken == ["rows", "columns"]
    for other in expected:
        assert torch.equal(found[0], other[0])
        assert torch.equal(found[1], other[1])


@pytest.mark.parametrize("case", ["rows", "threads", "none"])
def test_what_panels_do_not_pay_for_goes_whole(stock: Any, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = counted(monkeypatch)
    torch.set_num_threads(2 if case == "threads" else 1)
    rows = {"rows": panels.MOST_ROWS + 1, "threads": 4, "none": 0}[case]
    expected = forward_backward(in_residency(stock, "dense"), rows)
    found = forward_backward(in_residency(stock, "scratch"), rows)
    assert taken == []
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_where_a_single_bit_differs_panels_are_not_used(stock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = counted(monkeypatch)
    right = panels.product

    def adds_up_otherwise(*arguments: Any) -> torch.Tensor:
        y = right(*arguments)
        y.view(-1)[-1] = torch.nextafter(y.view(-1)[-1], torch.tensor(torch.inf))
        return y

    monkeypatch.setattr(panels, "product", adds_up_otherwise)
    expected = forward_backward(in_residency(stock, "dense"), 16)
    found = forward_backward(in_residency(stock, "scratch"), 16)
    assert taken == []
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert set(panels._agreed.values()) == {False}


def test_the_trial_takes_no_random_numbers_and_is_made_once(stock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[int] = []
    agree = panels._agree
    monkeypatch.setattr(panels, "_agree", lambda *arguments: (tries.append(arguments[1]), agree(*arguments))[1])
    layer = in_residency(stock, "scratch")
    state = torch.random.get_rng_state()
    for rows in (16, 16, 8):
        layer(torch.ones(rows, SHAPE[0]))
    assert tries == [16, 8]
    assert torch.equal(torch.random.get_rng_state(), state)


def test_input_with_gaps_goes_whole(stock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = counted(monkeypatch)
    x = torch.randn(SHAPE[0], 16, generator=torch.Generator().manual_seed(2)).t()
    assert torch.equal(in_residency(stock, "scratch")(x), in_residency(stock, "dense")(x))
    assert taken == []
