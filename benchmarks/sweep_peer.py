"""One trial as one fresh process: transformers, PEFT and bitsandbytes, the base quantized while it is loaded.

    python -m benchmarks.sweep_peer BASE CURATED PARAMS STEPS

What somebody writes who starts a process per configuration, as lean as it gets: no Trainer, no log, no checkpoint. The
rows, their order, the masks, the first weights, the effective batch and the optimizer are those of a trial here. Prints
one JSON object: seconds of wall and of CPU since the process began, at the first step and at the end, and the
validation loss.
"""

import hashlib
import json
import math
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from bitsandbytes.optim.adamw import PagedAdamW32bit
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy

from benchmarks.warm_start import quantize_while_loading
from qlora_core.config.train import TrainConfig
from qlora_core.data.dataset import TokenRow, read_split
from qlora_core.training.batches import BatchOrder
from qlora_core.training.schedule import rate_multiplier, warmup_steps

VALIDATION_BATCH_ROWS = 8


def loss_of(model: Any, rows: list[TokenRow]) -> tuple[torch.Tensor, int]:
    """Sum of nats over the trained tokens of the rows, padded on the right, and how many those are."""
    longest = max(len(row.input_ids) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    attended, targets = torch.zeros_like(ids), torch.full_like(ids, -100)
    for place, row in enumerate(rows):
        size = len(row.input_ids)
        ids[place, :size] = torch.tensor(row.input_ids)
        attended[place, :size] = 1
        mask = torch.tensor(row.loss_mask)
        targets[place, :size] = torch.where(mask, ids[place, :size], -100)
    logits = model(input_ids=ids, attention_mask=attended, use_cache=False).logits[:, :-1]
    targets = targets[:, 1:]
    return cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum"), int((targets >= 0).sum())


def train(base: Path, curated: Path, params: TrainConfig, steps: int) -> dict[str, Any]:
    """A whole trial of `steps` optimizer steps and its validation."""
    rows = [row for row in read_split(curated, "train") if any(row.loss_mask[1:])]
    held_out = read_split(curated, "validation")
    warmup = warmup_steps(params, steps)
    torch.manual_seed(params.seed)
    config = LoraConfig(
        r=params.lora_rank,
        lora_alpha=int(params.lora_alpha),
        lora_dropout=params.lora_dropout,
        target_modules="all-linear",
    )
    model = get_peft_model(quantize_while_loading(base), config)
    same_first_weights(model, params.seed)
    adapter = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = PagedAdamW32bit(adapter, lr=params.learning_rate, betas=(params.adam_beta1, params.adam_beta2))
    batch = params.micro_batch_size * params.gradient_accumulation_steps
    lengths = [len(row.input_ids) for row in rows]
    order = BatchOrder(lengths, batch, seed=params.seed, group_by_length=params.group_by_length)
    first: dict[str, float] = {}
    for step in range(steps):
        places = order.batch(step)
        weight = sum(sum(rows[place].loss_mask[1:]) for place in places)
        for begin in range(0, len(places), params.micro_batch_size):
            nats, _ = loss_of(model, [rows[place] for place in places[begin : begin + params.micro_batch_size]])
            (nats / weight).backward()
        torch.nn.utils.clip_grad_norm_(adapter, params.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = params.learning_rate * rate_multiplier(params.schedule, step, steps, warmup)
        optimizer.step()
        optimizer.zero_grad()
        first = first or spent()
    model.eval()
    with torch.no_grad():
        parts = [
            loss_of(model, held_out[begin : begin + VALIDATION_BATCH_ROWS])
            for begin in range(0, len(held_out), VALIDATION_BATCH_ROWS)
        ]
    loss = sum(nats.item() for nats, _ in parts) / sum(tokens for _, tokens in parts)
    return {"loss": loss, "first_step": first, "end": spent()}


def same_first_weights(model: torch.nn.Module, seed: int) -> None:
    """Draw A as a trial here does, from seed and module; PEFT's own draw is of the same distribution."""
    for name, value in model.named_parameters():
        module, found, _ = name.removeprefix("base_model.model.").partition(".lora_A.")
        if found:
            draw = int.from_bytes(hashlib.sha256(f"init/{seed}/{module}".encode()).digest()[:8]) >> 1
            generator = torch.Generator().manual_seed(draw)
            torch.nn.init.kaiming_uniform_(value.data, a=math.sqrt(5), generator=generator)


def spent() -> dict[str, float]:
    """Seconds of CPU and of wall since the process began, imports included."""
    ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return {"cpu_s": time.process_time(), "wall_s": uptime - ticks / os.sysconf("SC_CLK_TCK")}


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
    given = TrainConfig(**json.loads(sys.argv[3]))
    sys.stdout.write(json.dumps(train(Path(sys.argv[1]), Path(sys.argv[2]), given, int(sys.argv[4]))) + "\n")
