"""The plan of a training step against the peak that torch's allocator reports on a GPU."""

from pathlib import Path

import pytest
import torch

from benchmarks.memory_plan import SIZES, quantized_llama
from qlora_core.config.quantize import QuantizeConfig
from qlora_core.config.train import TrainConfig
from qlora_core.data.dataset import TokenRow
from qlora_core.model.base import load_quantized
from qlora_core.training.memory.parts import Workload, training_parts
from qlora_core.training.memory.shapes import read_shapes
from qlora_core.training.trainer import Trainer
from qlora_core.training.trial import Trial

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
TOKENS = 512


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("residency", ["dense", "scratch"])
def test_predicted_peak_is_the_allocators_within_a_tenth(tmp_path: Path, residency: str, recomputed: bool) -> None:
    folder = quantized_llama(tmp_path, SIZES["150M"])
    params = TrainConfig(
        lora_rank=16, max_steps=2, optimizer="adamw", gradient_accumulation_steps=1, gradient_checkpointing=recomputed
    )
    base = load_quantized(folder, device="cuda", residency=residency)
    ids = [[(7 * place + row) % 8192 for place in range(TOKENS)] for row in range(params.micro_batch_size)]
    rows = [TokenRow(str(number), row, [True] * TOKENS) for number, row in enumerate(ids)]
    trainer = Trainer(base, rows, [TokenRow("short", ids[0][:8], [True] * 8)], tmp_path / "work")
    torch.cuda.reset_peak_memory_stats()
    trainer.run([Trial("trial", params)], None)
    parts = training_parts(
        read_shapes(folder), Workload(params, QuantizeConfig(), TOKENS, 8), residency, base.dtype.itemsize, "cuda"
    )
    # The margin is for what lies between tensors, which the allocator's own count leaves out
    predicted = parts.total_bytes - parts.margin_bytes
    assert predicted == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.1)
