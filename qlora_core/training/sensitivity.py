"""Which layers an adapter is worth most on, by a short gradient probe: one backward pass over a few training examples.

A fresh adapter has B = 0, so the gradient of its A is 0 and that of B says how steeply the loss falls when a layer
begins to change. The probe's adapter is the same for all trials of a seed, whatever their rank and scale. Knows nothing
of how trials train.
"""

import math

from peft import LoraConfig

from qlora_core.config.train import TrainConfig
from qlora_core.errors import TrainingError
from qlora_core.training.adapter_config import target_names
from qlora_core.training.batches import BatchOrder
from qlora_core.training.examples import Examples
from qlora_core.training.pack.pack import Pack
from qlora_core.training.pass_loop import is_out_of_memory

PROBE_EXAMPLES = 16
PROBE_RANK = 8


def sensitive_modules(pack: Pack, params: TrainConfig, examples: Examples) -> list[str]:
    """Names of the `sensitive_layers` linear layers, of those that `target_modules` match, with the steepest loss.

    Steepness is the norm of the gradient of B over 16 examples drawn by the trial's seed, all examples where there are
    fewer; equal ones go by the model's order. Other slots of the pack, dropout and the size of passes have no part in
    it. Sorted by name.

    Raises:
        TrainingError: there are fewer such layers, or a gradient is not finite.
    """
    norms = _gradient_norms(pack, params, examples)
    count = params.sensitive_layers or len(norms)
    if count > len(norms):
        raise TrainingError(
            f"train.sensitive_layers is {count}, but train.target_modules match {len(norms)} linear layers; lower it"
        )
    for name, norm in norms.items():
        if not math.isfinite(norm):
            raise TrainingError(
                f"the gradient probe of train.sensitive_layers gives {norm} at {name}; use train.precision: float32, "
                "or name layers in train.target_modules"
            )
    return sorted(sorted(norms, key=lambda name: -norms[name])[:count])


def _gradient_norms(pack: Pack, params: TrainConfig, examples: Examples) -> dict[str, float]:
    """The norm of B's gradient by module, in the model's order."""
    order = BatchOrder(examples.lengths, PROBE_EXAMPLES, seed=params.seed, group_by_length=False)
    places = order.batch(0)
    targets = target_names(pack.base, params.target_modules)
    slot = pack.fill(LoraConfig(r=PROBE_RANK, lora_alpha=PROBE_RANK, target_modules=targets), params.seed)
    try:
        for place in places:  # one by one: how many fit memory at a time must not matter
            part = examples.part([place], slot, 0, 0, params)
            pack.backward([part], [examples.weight(places)], dropout=False)
        return {
            name: 0.0 if factors.b.grad is None else factors.b.grad.double().norm().item()
            for name, factors in pack.weights(slot).factors.items()
        }
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(
            "memory does not suffice for the gradient probe of train.sensitive_layers on one row; lower data.max_tokens"
        ) from error
    finally:
        pack.free(slot)
