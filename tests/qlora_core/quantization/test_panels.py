"""Panels hold the values of the whole weight, to the bit, wherever they are cut."""

import pytest
import torch

from qlora_core.errors import ModelError
from qlora_core.quantization.blockwise import QuantizedTensor, dequantize_into, quantize_tensor
from qlora_core.quantization.panels import Axis, has_panels, panels


def stored_weight(*shape: int, type: str = "nf4", blocksize: int = 64, double_quant: bool = True) -> QuantizedTensor:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return quantize_tensor(weight, type=type, blocksize=blocksize, double_quant=double_quant)


@pytest.mark.parametrize("axis", ["rows", "columns"])
@pytest.mark.parametrize(
    ("type", "blocksize", "double_quant"), [("nf4", 64, True), ("int4", 4096, False), ("e2m1", 256, True)]
)
@pytest.mark.parametrize(
    ("shape", "size"), [((130, 320), 64), ((64, 64), 64), ((200, 192), 128), ((3, 128), 256), ((129, 4160), 64)]
)
def test_panels_are_the_weight_s_own_values(
    axis: Axis, type: str, blocksize: int, double_quant: bool, shape: tuple[int, int], size: int
) -> None:
    stored = stored_weight(*shape, type=type, blocksize=blocksize, double_quant=double_quant)
    whole = dequantize_into(stored, torch.empty(shape))
    total = shape[0 if axis == "rows" else 1]
    buffer = torch.full((shape[0] * shape[1],), float("nan"))
    reached = 0
    for start, stop, values in panels(stored, axis, size, buffer):
        assert start == reached and (stop - start == size or (stop == total and stop - start < 2 * size))
        assert torch.equal(values, whole[start:stop] if axis == "rows" else whole[:, start:stop])
        reached = stop
    assert reached == total


def test_a_buffer_of_the_largest_panel_is_enough_and_a_smaller_one_is_refused() -> None:
    stored = stored_weight(130, 128)
    assert len(list(panels(stored, "rows", 64, torch.empty(66 * 128)))) == 2
    with pytest.raises(ModelError, match="cannot hold panels of 8448"):
        next(panels(stored, "rows", 64, torch.empty(66 * 128 - 1)))
    with pytest.raises(ModelError, match="bfloat16"):
        next(panels(stored, "rows", 64, torch.empty(130 * 128, dtype=torch.bfloat16)))


def test_rows_that_end_inside_a_run_of_codes_and_odd_sizes_have_no_panels() -> None:
    odd = stored_weight(64, 96)
    assert not has_panels(odd)
    with pytest.raises(ModelError, match="64 wide"):
        next(panels(odd, "columns", 64, torch.empty(64 * 96)))
    with pytest.raises(ModelError, match="panels of 100 rows"):
        next(panels(stored_weight(64, 128), "rows", 100, torch.empty(64 * 128)))
