"""The optimizers of a trial behind one small interface: step at a rate, state as named tensors.

A trial's weights are a few flat buffers, so that a step is one fused pass over each. bitsandbytes pages optimizer state
between GPU and host memory; on a CPU there is nothing to page to, its own CPU kernels run with plain buffers, and
`description` says so. Paged buffers are freed with the optimizer. Knows nothing of schedules, clipping or files.
"""

import logging
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from bitsandbytes.functional import GlobalPageManager
from bitsandbytes.optim.adamw import PagedAdamW8bit, PagedAdamW32bit
from bitsandbytes.optim.lion import Lion32bit

from qlora_core.config.train import TrainConfig
from qlora_core.errors import TrainingError

logger = logging.getLogger(__name__)

_PAGED = {"paged_adamw_32bit": PagedAdamW32bit, "paged_adamw_8bit": PagedAdamW8bit}
OPTIMIZERS = (*_PAGED, "adamw", "lion", "sgd")
_EPSILON = 1e-8
_B = "b"


class TrialOptimizer:
    """One optimizer over a trial's flat weights: AdamW, Lion (Chen et al. 2023) or plain SGD.

    AdamW (Loshchilov and Hutter 2019) keeps float32 or 8-bit blockwise state. The buffer named "b" holds the B factors:
    its rate is `lora_plus_ratio` times that of the others (Hayou et al. 2024).
    `description` names what really runs, for the record of the trial.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], params: TrainConfig) -> None:
        """Raise TrainingError for an unknown optimizer or when there is nothing to train."""
        if not parameters:
            raise TrainingError("the optimizer got no parameters; the adapter has no trainable tensor")
        self._parameters = dict(parameters)
        self._ratios = {name: params.lora_plus_ratio if name == _B else 1.0 for name in parameters}
        device = next(iter(self._parameters.values())).device
        groups = [{"params": [parameter], "name": name} for name, parameter in self._parameters.items()]
        self._optimizer: Any = _build(groups, params, device)
        self.description = params.optimizer
        if params.optimizer in _PAGED and device.type == "cpu":
            self.description = f"{params.optimizer} (not paged: bitsandbytes keeps plain buffers on a CPU)"
            logger.info("optimizer %s", self.description)

    def step(self, learning_rate: float) -> None:
        """One update of every parameter from its gradient; gradients are set to zero afterwards."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate * self._ratios[group["name"]]
        with warnings.catch_warnings():
            # Said once in the description instead of once per process on standard error
            warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
            self._optimizer.step()
        self.drop_gradients()

    def drop_gradients(self) -> None:
        """Set every gradient to zero, in place: the factors' gradients are views of them."""
        for parameter in self._parameters.values():
            if parameter.grad is not None:
                parameter.grad.zero_()

    def release(self) -> None:
        """Let go of all state. bitsandbytes lists managed buffers for the process's life, so it is taken off there."""
        paged = {id(v) for state in self._optimizer.state.values() for v in state.values() if _is_paged(v)}
        manager = GlobalPageManager.get_instance()
        manager.paged_tensors = [tensor for tensor in manager.paged_tensors if id(tensor) not in paged]
        self._optimizer.state.clear()

    @property
    def state_bytes(self) -> int:
        """Bytes of the state that the optimizer holds now; none before the first step."""
        held = (v for state in self._optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor))
        return sum(value.nbytes for value in held)

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """The whole state as `parameter name|key` to tensor copies on the CPU, counters as int64; empty at first."""
        tensors = {}
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # paged buffers are written asynchronously and read here as host memory
        for name, parameter in self._parameters.items():
            for key, value in self._optimizer.state.get(parameter, {}).items():
                if value is None:  # SGD without momentum keeps the key alone
                    continue
                tensor = value.detach() if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=torch.int64)
                tensors[f"{name}|{key}"] = tensor.to("cpu", copy=True).contiguous()
        return tensors

    def load_state_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Restore what `state_tensors` gave, bit for bit.

        Raises:
            TrainingError: tensors that are missing, too many, or of another shape or dtype.
        """
        self.release()
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
        if isinstance(self._optimizer, torch.optim.SGD):
            return
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


def _is_paged(value: object) -> bool:
    return isinstance(value, torch.Tensor) and getattr(value, "is_paged", False)


def _build(groups: list[dict[str, Any]], params: TrainConfig, device: torch.device) -> torch.optim.Optimizer:
    betas = (params.adam_beta1, params.adam_beta2)
    rate, decay = params.learning_rate, params.weight_decay
    if params.optimizer == "adamw":
        fused = device.type in ("cpu", "cuda")
        return torch.optim.AdamW(groups, lr=rate, betas=betas, eps=_EPSILON, weight_decay=decay, fused=fused)
    if params.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=rate, weight_decay=decay)
    if params.optimizer == "lion":
        return Lion32bit(groups, lr=rate, betas=betas, weight_decay=decay)  # pyright: ignore[reportArgumentType]
    if params.optimizer not in _PAGED:
        raise TrainingError(f"optimizer {params.optimizer!r} is unknown; choose one of {', '.join(OPTIMIZERS)}")
    return _PAGED[params.optimizer](groups, lr=rate, betas=betas, eps=_EPSILON, weight_decay=decay)
