"""Switches recomputation of activations on and off on a frozen base. Knows nothing of adapters' weights."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


@contextmanager
def recomputed_activations(base: PreTrainedModel, *, wanted: bool) -> Iterator[None]:
    """While the block runs, decoder layers keep their inputs alone and run again in the backward pass, if `wanted`.

    The base stays in eval mode: its own dropout is not what is trained.
    """
    if not wanted:
        yield
        return
    layers = [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers:
        layer.training = True  # the flag alone, not its children's: transformers asks it before checkpointing
    base.activation_checkpointing_enable({"use_reentrant": False})
    # transformers makes the embeddings' output require gradients, which only reentrant checkpointing needs
    base.disable_input_require_grads()
    try:
        yield
    finally:
        base.activation_checkpointing_disable()
        for layer in layers:
            layer.training = False
