"""The optimizers of a trial behind one small interface: step at a rate, state as named tensors.

bitsandbytes pages optimizer state between GPU and host memory. On a CPU there is nothing to page to: its own CPU
kernels run with plain buffers, and `description` says so. Knows nothing of schedules, clipping or files.
"""

import logging
import warnings
from collections.abc import Mapping

import torch
from bitsandbytes.optim.adamw import PagedAdamW8bit, PagedAdamW32bit

from qlora_core.config.train import TrainConfig
from qlora_core.errors import TrainingError

logger = logging.getLogger(__name__)

_PAGED = {"paged_adamw_32bit": PagedAdamW32bit, "paged_adamw_8bit": PagedAdamW8bit}
OPTIMIZERS = (*_PAGED, "adamw")
_EPSILON = 1e-8


class TrialOptimizer:
    """AdamW (Loshchilov and Hutter 2019) over a trial's named parameters, float32 state or 8-bit blockwise state.

    `description` names what really runs, for the record of the trial.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], params: TrainConfig) -> None:
        """Raise TrainingError for an unknown optimizer or when there is nothing to train."""
        if not parameters:
            raise TrainingError("the optimizer got no parameters; the adapter has no trainable tensor")
        self._parameters = dict(parameters)
        device = next(iter(self._parameters.values())).device
        self._optimizer = _build(list(self._parameters.values()), params, device)
        self.description = params.optimizer
        if params.optimizer in _PAGED and device.type == "cpu":
            self.description = f"{params.optimizer} (not paged: bitsandbytes keeps plain buffers on a CPU)"
            logger.info("optimizer %s", self.description)

    def step(self, learning_rate: float) -> None:
        """One update of every parameter from its gradient; gradients are dropped afterwards."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        with warnings.catch_warnings():
            # Said once in the description instead of once per process on standard error
            warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """The whole state as `parameter name|key` to tensor copies on the CPU, counters as int64; empty at first."""
        tensors = {}
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # paged buffers are written asynchronously and read here as host memory
        for name, parameter in self._parameters.items():
            for key, value in self._optimizer.state.get(parameter, {}).items():
                tensor = value.detach() if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=torch.int64)
                tensors[f"{name}|{key}"] = tensor.to("cpu", copy=True).contiguous()
        return tensors

    def load_state_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Restore what `state_tensors` gave, bit for bit.

        Raises:
            TrainingError: tensors that are missing, too many, or of another shape or dtype.
        """
        if not tensors:
            return
        self._allocate_state()
        expected = self.state_tensors()
        if expected.keys() != tensors.keys():
            odd = sorted(expected.keys() ^ tensors.keys())
            raise TrainingError(f"the checkpoint's optimizer state does not fit this trial; first difference: {odd[0]}")
        for name, parameter in self._parameters.items():
            state = self._optimizer.state[parameter]
            for key, value in state.items():
                stored = tensors[f"{name}|{key}"]
                wanted = expected[f"{name}|{key}"]
                if stored.shape != wanted.shape or stored.dtype != wanted.dtype:
                    raise TrainingError(
                        f"optimizer state {name}|{key} is {tuple(stored.shape)} {stored.dtype} in the checkpoint, but "
                        f"{tuple(wanted.shape)} {wanted.dtype} here"
                    )
                if isinstance(value, torch.Tensor):
                    value.copy_(stored)  # in place: paged buffers must stay the managed memory they are
                else:
                    state[key] = int(stored.item())

    def _allocate_state(self) -> None:
        if isinstance(self._optimizer, torch.optim.AdamW):
            for parameter in self._parameters.values():
                self._optimizer.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
            return
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
            for group_index, group in enumerate(self._optimizer.param_groups):
                for index, parameter in enumerate(group["params"]):
                    self._optimizer.init_state(group, parameter, group_index, index)


def _build(
    parameters: list[torch.nn.Parameter], params: TrainConfig, device: torch.device
) -> torch.optim.AdamW | PagedAdamW32bit | PagedAdamW8bit:
    betas = (params.adam_beta1, params.adam_beta2)
    if params.optimizer == "adamw":
        fused = device.type in ("cpu", "cuda")
        return torch.optim.AdamW(
            parameters,
            lr=params.learning_rate,
            betas=betas,
            eps=_EPSILON,
            weight_decay=params.weight_decay,
            fused=fused,
        )
    if params.optimizer not in _PAGED:
        raise TrainingError(f"optimizer {params.optimizer!r} is unknown; choose one of {', '.join(OPTIMIZERS)}")
    return _PAGED[params.optimizer](
        parameters, lr=params.learning_rate, betas=betas, eps=_EPSILON, weight_decay=params.weight_decay
    )
