"""Puts one trainable LoRA adapter on the frozen base and takes it off again without a trace.

The adapter is PEFT's own, so that its folder is the field's format. Knows nothing of optimizers, data or files.
"""

import hashlib
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_core.config.train import TrainConfig
from qlora_core.errors import TrainingError

_ADAPTER = "default"


class AttachedAdapter:
    """A LoRA adapter in place on the base: y = W x + (lora_alpha / lora_rank) B A x on every target module.

    `model` is PEFT's wrapper, `base` the same base model with the adapter's layers inside it.
    """

    def __init__(self, model: PeftModel, base: PreTrainedModel, config: LoraConfig) -> None:
        self.model = model
        self.base = base
        self.config = config
        # PEFT's file format leaves the adapter's name out of the keys
        self.parameters: dict[str, torch.nn.Parameter] = {
            name.replace(f".{_ADAPTER}.", "."): parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }

    def train_mode(self, *, gradient_checkpointing: bool) -> None:
        """Switch on LoRA dropout, and only it: the base's own dropout stays off, for it is not what is trained."""
        self.model.eval()
        for module in self.base.modules():
            if isinstance(module, LoraLayer):
                module.lora_dropout.train()
            elif gradient_checkpointing and isinstance(module, GradientCheckpointingLayer):
                module.training = True  # the flag alone, not its children's: transformers asks it before checkpointing
        if gradient_checkpointing:
            self.base.activation_checkpointing_enable({"use_reentrant": False})
            # transformers makes the embeddings' output require gradients, which only reentrant checkpointing needs
            self.base.disable_input_require_grads()

    def eval_mode(self) -> None:
        """Switch off dropout and gradient checkpointing."""
        if self.base.is_activation_checkpointing:
            self.base.activation_checkpointing_disable()
        self.model.eval()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Copies of the adapter's weights on the CPU, under the names of PEFT's files."""
        return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in self.parameters.items()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Overwrite the adapter's weights.

        Raises:
            TrainingError: a tensor is missing, too many, or of another shape.
        """
        if tensors.keys() != self.parameters.keys():
            odd = sorted(tensors.keys() ^ self.parameters.keys())
            raise TrainingError(f"the checkpoint's adapter does not fit this trial; first difference: {odd[0]}")
        for name, parameter in self.parameters.items():
            if tensors[name].shape != parameter.shape:
                raise TrainingError(
                    f"{name} is {tuple(tensors[name].shape)} in the checkpoint, but {tuple(parameter.shape)} here"
                )
            parameter.copy_(tensors[name])

    def digest(self) -> str:
        """SHA-256 over names and bytes of the weights: equal seeds give equal digests before the first step."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.tensors().items()):
            digest.update(name.encode())
            digest.update(tensor.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


@contextmanager
def attached_adapter(base: PreTrainedModel, params: TrainConfig) -> Iterator[AttachedAdapter]:
    """A fresh adapter on `base` while the block runs; afterwards the base is as it was, which is checked.

    The generator is seeded before the adapter is created, so equal seeds give equal weights whatever ran before; the
    caller's generators are put back. LoRA weights are float32 also over a bfloat16 base.

    Raises:
        TrainingError: target modules that match nothing, or a base that the block changed.
    """
    before = _weights_in_place(base)
    targets = target_names(base, params.target_modules)
    alpha = int(params.lora_alpha) if params.lora_alpha == int(params.lora_alpha) else params.lora_alpha
    config = LoraConfig(
        r=params.lora_rank,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType]  # PEFT scales by any number, whatever its annotation
        lora_dropout=params.lora_dropout,
        target_modules=targets,
        bias="none",
        task_type="CAUSAL_LM",
    )
    with own_generators(base.device), _quiet_peft():
        torch.manual_seed(params.seed)
        model = get_peft_model(base, config)
    adapter = AttachedAdapter(model, base, config)
    try:
        yield adapter
    finally:
        adapter.eval_mode()
        detach(model)
    if _weights_in_place(base) != before:
        raise TrainingError(
            "the frozen base's weights were moved or rewritten while an adapter was on it; load it anew with "
            "load_quantized, which keeps bitsandbytes from repacking weights in place"
        )


def reload_adapter(base: PreTrainedModel, folder: Path) -> PeftModel:
    """The adapter of a PEFT folder on `base` as stock PEFT loads it, in eval mode; `detach` takes it off."""
    with own_generators(base.device), _quiet_peft():  # PEFT draws initial weights before it overwrites them
        return PeftModel.from_pretrained(base, folder).eval()


def detach(model: PeftModel) -> None:
    """Take the adapter off: the base's modules are put back unmerged, in eval mode."""
    base = model.unload()
    base.requires_grad_(False)
    base.eval()


@contextmanager
def own_generators(device: torch.device) -> Iterator[None]:
    """Seeding inside the block leaves the caller's random generators as they were."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield


def target_names(base: PreTrainedModel, target_modules: str | list[str]) -> list[str]:
    """The name endings PEFT is to match, sorted: those of all linear layers, or the given ones once they are checked.

    The output head never counts as a linear layer here: it stays in full precision and out of the adapter.

    Raises:
        TrainingError: a name matches no linear layer; the message lists what exists.
    """
    head = base.get_output_embeddings()
    linear = [
        name for name, module in base.named_modules() if isinstance(module, torch.nn.Linear) and module is not head
    ]
    existing = sorted({name.rpartition(".")[2] for name in linear})
    if not linear:
        raise TrainingError(f"{type(base).__name__} has no linear layer to put an adapter on")
    if target_modules == "all-linear":
        return existing
    wanted = [target_modules] if isinstance(target_modules, str) else target_modules
    missing = [target for target in wanted if not any(name == target or name.endswith(f".{target}") for name in linear)]
    if missing or not wanted:
        raise TrainingError(
            f"target_modules {missing or wanted} match no linear layer of the base model; it has {', '.join(existing)} "
            "(or all-linear)"
        )
    return sorted(wanted)


@contextmanager
def _quiet_peft() -> Iterator[None]:
    with warnings.catch_warnings():
        # PEFT asks transformers under a name that is on its way out
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        yield


def _weights_in_place(base: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """Where each weight lies and how often it was written in place; writes through `.data` escape it."""
    return {name: (value.data_ptr(), value._version) for name, value in base.named_parameters()}
