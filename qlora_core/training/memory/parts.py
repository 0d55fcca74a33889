"""Bytes of every part that a training process holds, for one way of running a trial.

Static parts follow from shapes to the byte. Activations are what autograd keeps (see `activations`). What comes and
goes is counted from the operations of the loss and of a layer's backward pass. Knows nothing of what is available, and
makes no choice.

Symbols: N tokens of a pass, T of its longest row, V vocabulary, c bytes of the compute dtype.
"""

from dataclasses import dataclass, fields, replace
from math import ceil

from qlora_core.config.quantize import QuantizeConfig
from qlora_core.config.train import TrainConfig
from qlora_core.training.memory.activations import LoraShape, layer_bytes_per_token, mlp_width
from qlora_core.training.memory.shapes import LinearShape, ModelShapes

VALIDATION_ROWS = 8
"""Rows of one validation batch, as the trainer has it: kept here too, so that a plan needs no torch."""

_FLOAT32 = 4
_NESTED_BLOCKSIZE = 256
_CODE_TABLE_BYTES = 16 * _FLOAT32
_NESTED_TABLE_BYTES = 256 * _FLOAT32
_SMALLEST_8BIT = 4096  # bitsandbytes keeps the state of smaller parameters in 32 bits
_OPTIMIZER_BLOCKSIZE = 256
_MOMENTS = {"sgd": 0, "lion": 1}
_BASE_CHANGING = ("pissa", "olora")
# Of what comes and goes: docs/measurements.md, section Memory plan. The share on a GPU is no measurement but a reserve.
_MARGIN = {"cpu": 0.02, "cuda": 0.1}
_LIBRARY_BYTES = {"cpu": 8 << 20, "cuda": 64 << 20}


@dataclass(frozen=True)
class Workload:
    """What is to be trained, as far as it takes memory.

    `sequence_tokens` and `validation_tokens` are the longest training row (with packing, sequence) and validation row.
    `pack_size` trials like this one are computed in one pass.
    """

    train: TrainConfig
    quantize: QuantizeConfig
    sequence_tokens: int
    validation_tokens: int
    pack_size: int = 1

    @property
    def lora(self) -> LoraShape:
        """What of the trial's settings decides its adapter's memory."""
        train = self.train
        targets = None if train.target_modules == "all-linear" else tuple(train.target_modules)
        return LoraShape(train.lora_rank, targets, tuple(train.rank_pattern.items()), train.use_dora)


@dataclass(frozen=True)
class MemoryParts:
    """Bytes by part.

    codes           the quantized weights as they are stored
    dense_weights   the same dequantized and kept, or scratch, the one buffer that the largest is dequantized into
    kept_weights    embeddings, head, norms, biases and Linears that are not quantized, in the compute dtype
    adapter         A, B and magnitudes in float32; gradients and optimizer state beside them
    activations     kept for the backward pass
    logits          the most that the loss holds at once
    workspace       the most that a layer's backward pass holds for a moment, beyond the logits, which are gone by then
    mapped          pages of the checkpoint's file from which kept weights were read and converted: on a CPU the file
                    stays mapped, and its pages count as this process's until the system wants them back
    margin          what the allocator and the math libraries add
    """

    codes_bytes: int
    dense_weights_bytes: int
    scratch_bytes: int
    kept_weights_bytes: int
    adapter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int = 0
    logits_bytes: int = 0
    workspace_bytes: int = 0
    mapped_bytes: int = 0
    margin_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """The sum of all parts."""
        return sum(getattr(self, field.name) for field in fields(self))


def training_parts(shapes: ModelShapes, work: Workload, residency: str, compute_bytes: int, device: str) -> MemoryParts:
    """The parts at the worst moment of a step, every token being trained and the optimizer having its state."""
    train = work.train
    tokens = train.micro_batch_size * work.pack_size * work.sequence_tokens
    hidden = tokens * shapes.hidden * compute_bytes
    layer = tokens * layer_bytes_per_token(shapes, work.lora, compute_bytes)
    activations = shapes.layers * (hidden if train.gradient_checkpointing else layer)
    # The last norm's input, the embeddings' output, and what goes into the head
    activations += tokens * shapes.hidden * _FLOAT32 + 2 * hidden
    backward = _backward_bytes(shapes, tokens, compute_bytes) + transient_weight_bytes(
        shapes, work, residency, compute_bytes
    )
    backward += layer if train.gradient_checkpointing else 0
    logits = 3 * _FLOAT32 * tokens * shapes.vocabulary  # log-probabilities, their gradient, the gradient of the logits
    parts = replace(
        static_parts(shapes, work, residency, compute_bytes),
        activation_bytes=activations,
        logits_bytes=logits,
        workspace_bytes=max(0, backward - logits),
        mapped_bytes=_mapped_bytes(shapes, work, compute_bytes, device),
    )
    return _with_margin(parts, device)


def validation_parts(
    shapes: ModelShapes, work: Workload, residency: str, compute_bytes: int, device: str
) -> MemoryParts:
    """The parts while validation rows are scored: nothing is kept, but there are logits at every place of a batch."""
    tokens = VALIDATION_ROWS * work.validation_tokens
    one_row = work.validation_tokens * shapes.vocabulary
    # The batch's logits; of one row its own copy, in float32 if it was not, and its log-probabilities
    copies = 2 * _FLOAT32 + (compute_bytes if compute_bytes < _FLOAT32 else 0)
    logits = VALIDATION_ROWS * one_row * compute_bytes + one_row * copies
    forward = 4 * tokens * mlp_width(shapes) * compute_bytes
    forward += transient_weight_bytes(shapes, work, residency, compute_bytes)
    static = static_parts(shapes, work, residency, compute_bytes)
    mapped = _mapped_bytes(shapes, work, compute_bytes, device)
    parts = replace(static, logits_bytes=logits, workspace_bytes=max(0, forward - logits), mapped_bytes=mapped)
    return _with_margin(parts, device)


def static_parts(shapes: ModelShapes, work: Workload, residency: str, compute_bytes: int) -> MemoryParts:
    """What is held from the first step to the last, whatever the batch."""
    quantized = [linear.parameters for linear in quantized_linears(shapes, work.quantize)]
    plain = sum(linear.parameters for linear in shapes.linears) - sum(quantized)
    flat = adapter_sizes(shapes, work.lora)
    adapter = work.pack_size * sum(flat.values()) * _FLOAT32
    starts = adapter if work.train.lora_init in _BASE_CHANGING else 0
    return MemoryParts(
        codes_bytes=sum(stored_bytes(parameters, work.quantize) for parameters in quantized),
        dense_weights_bytes=sum(quantized) * compute_bytes if residency == "dense" else 0,
        scratch_bytes=max(quantized, default=0) * compute_bytes if residency == "scratch" else 0,
        kept_weights_bytes=(shapes.kept_parameters + plain) * compute_bytes,
        adapter_bytes=adapter + starts,
        gradient_bytes=adapter,
        optimizer_bytes=work.pack_size * sum(state_bytes(size, work.train.optimizer) for size in flat.values()),
    )


def stored_bytes(parameters: int, quantize: QuantizeConfig) -> int:
    """Bytes of one quantized weight as it is stored and held: codes, absmax, and the tables that undo them.

    Half a byte a weight; one absmax a block in float32, or one byte and a float32 for every 256 blocks under double
    quantization (Dettmers et al. 2023, section 3). The JSON of a few hundred bytes that describes it is left out.
    """
    blocks = ceil(parameters / quantize.blocksize)
    codes = ceil(parameters / 2) + _CODE_TABLE_BYTES
    if not quantize.double_quant:
        return codes + _FLOAT32 * blocks
    return codes + blocks + _FLOAT32 * ceil(blocks / _NESTED_BLOCKSIZE) + _NESTED_TABLE_BYTES


def quantized_linears(shapes: ModelShapes, quantize: QuantizeConfig) -> list[LinearShape]:
    """The Linears stored in four bits: all but those whose name ends in one of `quantize.skip_modules`."""
    return [linear for linear in shapes.linears if not linear.name.endswith(tuple(quantize.skip_modules))]


def adapter_sizes(shapes: ModelShapes, lora: LoraShape) -> dict[str, int]:
    """Elements of an adapter's flat buffers: all A of [r, in], all B of [out, r], under DoRA magnitudes of [out]."""
    targets = [linear for linear in shapes.linears if lora.acts_on(linear)]
    return {
        "a": sum(lora.rank_at(linear) * linear.in_features for linear in targets),
        "b": sum(lora.rank_at(linear) * linear.out_features for linear in targets),
        "m": sum(linear.out_features for linear in targets) if lora.dora else 0,
    }


def state_bytes(elements: int, optimizer: str) -> int:
    """Bytes of the moments of one flat buffer: 4 an element and moment, or 1 and its blocks' constants in 8 bits."""
    moments = _MOMENTS.get(optimizer, 2)
    if optimizer != "paged_adamw_8bit" or elements < _SMALLEST_8BIT:
        return moments * _FLOAT32 * elements
    return moments * (elements + _FLOAT32 * ceil(elements / _OPTIMIZER_BLOCKSIZE))


def transient_weight_bytes(shapes: ModelShapes, work: Workload, residency: str, compute_bytes: int) -> int:
    """What is dequantized for one product and let go: the largest weight, where bitsandbytes executes it.

    DoRA needs the weight, the adapter's product and their sum in float32 besides, in any residency.
    """
    largest = max((linear.parameters for linear in quantized_linears(shapes, work.quantize)), default=0)
    own = largest * compute_bytes if residency == "bitsandbytes" else 0
    return own + (3 * _FLOAT32 * largest if work.train.use_dora else 0)


def _backward_bytes(shapes: ModelShapes, tokens: int, compute_bytes: int) -> int:
    """What lives together where the MLP's last Linear goes back: its dropped input, its gradient, dropout's factors."""
    return tokens * mlp_width(shapes) * (2 * compute_bytes + _FLOAT32)


def _mapped_bytes(shapes: ModelShapes, work: Workload, compute_bytes: int, device: str) -> int:
    """Nothing on a GPU, nor where the dtypes are one: what is mapped is the weight itself then."""
    if device != "cpu" or shapes.stored_bytes == compute_bytes:
        return 0
    quantized = sum(linear.parameters for linear in quantized_linears(shapes, work.quantize))
    return (shapes.parameters - quantized) * shapes.stored_bytes


def _with_margin(parts: MemoryParts, device: str) -> MemoryParts:
    moving = parts.activation_bytes + parts.logits_bytes + parts.workspace_bytes
    return replace(parts, margin_bytes=_LIBRARY_BYTES[device] + round(_MARGIN[device] * moving))
