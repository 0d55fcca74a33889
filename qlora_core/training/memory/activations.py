"""Bytes a token that autograd keeps between forward and backward, by what a decoder layer is made of.

Counted for a pack's adapters over frozen Linears, rows end to end. A frozen Linear keeps nothing of its input, since
its weight needs no gradient; an adapter keeps the input as it came, once for all Linears that read the same one, and
draws dropout anew in the backward pass. Knows nothing of batches or choices.

Symbols: d hidden size, f MLP width, c bytes of the compute dtype (4 float32, 2 bfloat16), r LoRA rank.
"""

from dataclasses import dataclass

from qlora_core.training.memory.shapes import LinearShape, ModelShapes

_FLOAT32 = 4
# Tensors of the MLP's width that an activation keeps: its input, or what its formula is put together from
_KEPT_BY_ACTIVATION = {"gelu_new": 4}
_GATED = ("gate_proj", "gate_up_proj", "w1")
_FUSED_ATTENTION = ("query_key_value", "qkv_proj", "c_attn")
_CLOSING = ("o_proj", "dense", "out_proj", "c_proj", "down_proj", "dense_4h_to_h", "fc2", "w2")


@dataclass(frozen=True)
class LoraShape:
    """What of an adapter decides its memory.

    `targets`: name endings of the target Linears; None: all of them. `ranks`: other ranks, by name ending. `dora`: each
    target has a magnitude for every output too.
    """

    rank: int
    targets: tuple[str, ...] | None
    ranks: tuple[tuple[str, int], ...] = ()
    dora: bool = False

    def acts_on(self, linear: LinearShape) -> bool:
        """Whether the Linear carries an adapter."""
        return self.targets is None or any(_ends_in(linear.name, target) for target in self.targets)

    def rank_at(self, linear: LinearShape) -> int:
        """The rank there: the first of `ranks` whose ending fits, else the common one."""
        return next((rank for ending, rank in self.ranks if _ends_in(linear.name, ending)), self.rank)


def layer_bytes_per_token(shapes: ModelShapes, lora: LoraShape, compute_bytes: int) -> int:
    """Bytes a token that one decoder layer keeps without gradient checkpointing."""
    return (
        norm_bytes_per_token(shapes, compute_bytes)
        + attention_bytes_per_token(shapes, compute_bytes)
        + mlp_bytes_per_token(shapes, compute_bytes)
        + adapter_bytes_per_token(shapes, lora, compute_bytes)
    )


def norm_bytes_per_token(shapes: ModelShapes, compute_bytes: int) -> int:
    """The input of each norm and its statistics.

    RMSNorm works in float32 and keeps one statistic for every vector it normalizes, LayerNorm two, in the compute
    dtype. Where attention and MLP stand side by side, both norms read the same tensor.
    """
    if not shapes.layer_norm:
        return _FLOAT32 * (sum(shapes.norm_widths) + shapes.norm_vectors)
    inputs = shapes.norm_widths[:1] if shapes.parallel else shapes.norm_widths
    return compute_bytes * (sum(inputs) + 2 * shapes.norm_vectors)


def attention_bytes_per_token(shapes: ModelShapes, compute_bytes: int) -> int:
    """What sdpa keeps: q, k, v, its output, and the log-sum-exp of each head in float32.

    Rotated q and k are new tensors. A fused projection keeps its whole output alive through v, a view of it.
    """
    width, key_width = shapes.heads * shapes.head_dim, shapes.kv_heads * shapes.head_dim
    fused = any(linear.name.rpartition(".")[2] in _FUSED_ATTENTION for linear in shapes.first_layer)
    kept = width + 2 * key_width
    if fused and shapes.rotary:
        kept += width + key_width
    return (kept + width) * compute_bytes + _FLOAT32 * shapes.heads


def mlp_bytes_per_token(shapes: ModelShapes, compute_bytes: int) -> int:
    """The activation's input, and for a gated MLP both factors of the product."""
    kept = _KEPT_BY_ACTIVATION.get(shapes.activation, 1)
    gated = any(linear.name.rpartition(".")[2] in _GATED for linear in shapes.first_layer)
    return mlp_width(shapes) * compute_bytes * (kept + (2 if gated else 0))


def adapter_bytes_per_token(shapes: ModelShapes, lora: LoraShape, compute_bytes: int) -> int:
    """The inputs of the adapted Linears: one for all that open attention, one for the MLP's, one for each that closes.

    DoRA goes through autograd instead, and keeps for each Linear the input after dropout, dropout's factors, and two
    outputs beside A x.
    """
    targets = [linear for linear in shapes.first_layer if lora.acts_on(linear)]
    if lora.dora:
        return compute_bytes * sum(
            2 * (linear.in_features + linear.out_features) + lora.rank_at(linear) for linear in targets
        )
    shared = {_block_of(linear.name): linear.in_features for linear in targets if not _closes_block(linear)}
    own = [linear.in_features for linear in targets if _closes_block(linear)]
    return compute_bytes * (sum(shared.values()) + sum(own))


def mlp_width(shapes: ModelShapes) -> int:
    """The widest input of a Linear inside a layer: that of the MLP's last one."""
    return max((linear.in_features for linear in shapes.first_layer), default=0)


def _closes_block(linear: LinearShape) -> bool:
    """Whether the Linear is the last of attention or MLP, so that it does not read a norm's output."""
    return linear.name.rpartition(".")[2] in _CLOSING


def _block_of(name: str) -> str:
    return name.rpartition(".")[0]


def _ends_in(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")
