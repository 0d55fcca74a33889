"""The weights of one slot: every A and B of an adapter as views of flat buffers, and how they begin.

Flat buffers make clipping one norm and an optimizer step one pass. A factors lie in one buffer and B factors in
another, so that each can have its own learning rate (LoRA+, Hayou et al. 2024). Knows nothing of data, steps or files.
Shapes: r rank, I in_features, O out_features.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as PeftLinear
from peft.utils.loftq_utils import _low_rank_decomposition

from qlora_core.errors import TrainingError
from qlora_core.model.dense_weight import dense_weight
from qlora_core.training.pack.dropout import module_key

_BASE_CHANGING = ("pissa", "olora")


class Residuals(Protocol):
    """What quantization took from a base's layers."""

    def residual(self, name: str, stored: torch.Tensor) -> torch.Tensor:
        """The original weight of the linear layer `name` less the `stored` one, both [O, I]."""
        ...


@dataclass
class Factors:
    """One module's share of an adapter: y += scale * (B A - B0 A0) x, with B0 A0 what the start took out of the base.

    `a` [r, I], `b` [O, r] and `magnitude` [O] (DoRA) are parameters whose `grad` is a view of the slot's flat gradient.
    `start` is (A0, B0) for beginnings that are not zero on a base that stays as it is stored, else None.
    """

    a: torch.nn.Parameter
    b: torch.nn.Parameter
    scale: float
    dropout: float
    key: tuple[int, int]
    magnitude: torch.nn.Parameter | None = None
    start: tuple[torch.Tensor, torch.Tensor] | None = None


@dataclass
class FlatWeights:
    """A flat parameter and its flat gradient, both [n]."""

    values: torch.nn.Parameter = field(default_factory=lambda: torch.nn.Parameter(torch.empty(0)))

    @classmethod
    def zeros(cls, count: int, dtype: torch.dtype, device: torch.device) -> "FlatWeights":
        """`count` zeros with zero gradients."""
        values = torch.nn.Parameter(torch.zeros(count, dtype=dtype, device=device))
        values.grad = torch.zeros_like(values)
        return cls(values)

    def view(self, start: int, shape: tuple[int, ...]) -> torch.nn.Parameter:
        """A parameter over a part of the values, its gradient over the same part of the gradients."""
        stop = start + math.prod(shape)
        part = torch.nn.Parameter(self.values.data[start:stop].view(shape))
        gradient = self.values.grad
        part.grad = None if gradient is None else gradient[start:stop].view(shape)
        return part


class SlotWeights:
    """All factors of one adapter, by module name, in the modules' order.

    `modules`: the linear layers that are adapted. With `residuals` the adapter begins as the best approximation of
    these (LoftQ, Li et al. 2023, with the quantized base as it is stored, so after one step of its alternation).
    Raises TrainingError for a start that this base cannot have.
    """

    def __init__(
        self,
        modules: Mapping[str, torch.nn.Module],
        config: LoraConfig,
        seed: int,
        dtype: torch.dtype,
        residuals: Residuals | None = None,
    ) -> None:
        self.config = config
        device = next(iter(modules.values())).weight.device
        assert isinstance(device, torch.device)
        shapes = {name: (rank_of(config, name), *features(module)) for name, module in modules.items()}
        self.a = FlatWeights.zeros(sum(rank * wide for rank, wide, _ in shapes.values()), dtype, device)
        self.b = FlatWeights.zeros(sum(rank * wide for rank, _, wide in shapes.values()), dtype, device)
        count = sum(wide for _, _, wide in shapes.values()) if config.use_dora else 0
        self.m = FlatWeights.zeros(count, dtype, device)
        self.factors: dict[str, Factors] = {}
        places = [0, 0, 0]
        for name, (rank, wide_in, wide_out) in shapes.items():
            factors = Factors(
                a=self.a.view(places[0], (rank, wide_in)),
                b=self.b.view(places[1], (wide_out, rank)),
                scale=scale_of(config, name, rank),
                dropout=float(config.lora_dropout),
                key=module_key(seed, name),
                magnitude=self.m.view(places[2], (wide_out,)) if config.use_dora else None,
            )
            places = [places[0] + rank * wide_in, places[1] + rank * wide_out, places[2] + (count and wide_out)]
            residual = None if residuals is None else residuals.residual(name, dense_weight(modules[name]))
            _begin(factors, name, modules[name], config, seed, residual)
            self.factors[name] = factors

    def flat(self) -> dict[str, torch.nn.Parameter]:
        """The flat parameters that an optimizer steps, those that hold anything."""
        parts = {"a": self.a.values, "b": self.b.values, "m": self.m.values}
        return {name: values for name, values in parts.items() if values.numel()}

    def named(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Every tensor of the adapter under its name in PEFT's files."""
        for name, factors in self.factors.items():
            yield f"base_model.model.{name}.lora_A.weight", factors.a
            yield f"base_model.model.{name}.lora_B.weight", factors.b
            if factors.magnitude is not None:
                yield f"base_model.model.{name}.lora_magnitude_vector", factors.magnitude


def features(module: torch.nn.Module) -> tuple[int, int]:
    """in_features and out_features of a linear layer."""
    return int(module.in_features), int(module.out_features)  # pyright: ignore[reportArgumentType]


def rank_of(config: LoraConfig, name: str) -> int:
    """The rank at a module: its entry in `rank_pattern`, else `r`."""
    return _own(config.rank_pattern or {}, name, config.r)


def scale_of(config: LoraConfig, name: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023), with the true rank of the module."""
    alpha = _own(config.alpha_pattern or {}, name, config.lora_alpha)
    return alpha / math.sqrt(rank) if config.use_rslora else alpha / rank


def _own(pattern: Mapping[str, int], name: str, default: int) -> int:
    return next((value for ending, value in pattern.items() if name == ending or name.endswith(f".{ending}")), default)


def _takes_from_base(config: LoraConfig) -> bool:
    """Whether PEFT's start would move a part of the base's weights into the adapter."""
    return str(config.init_lora_weights).startswith(_BASE_CHANGING)


@torch.no_grad()
def _begin(
    factors: Factors,
    name: str,
    module: torch.nn.Module,
    config: LoraConfig,
    seed: int,
    residual: torch.Tensor | None,
) -> None:
    """The first values of one module's factors: by PEFT's own rules, drawn from (seed, module), and from a residual."""
    start = config.init_lora_weights
    draw = int.from_bytes(hashlib.sha256(f"init/{seed}/{name}".encode()).digest()[:8]) >> 1
    if start is True:
        generator = torch.Generator().manual_seed(draw)
        fresh = torch.empty(factors.a.shape, dtype=torch.float32)
        torch.nn.init.kaiming_uniform_(fresh, a=math.sqrt(5), generator=generator)
        factors.a.copy_(fresh)
    else:
        _begin_as_peft(factors, module, config, draw)
    if residual is not None:
        _take_in(factors, residual)
    if factors.magnitude is not None:
        weight = dense_weight(module)
        delta = factors.scale * (factors.b.float() @ factors.a.float())
        factors.magnitude.copy_(torch.linalg.vector_norm(weight + delta.to(weight), dim=1))


def _take_in(factors: Factors, residual: torch.Tensor) -> None:
    """scale * B A becomes the best approximation of the residual by the factors' rank, split evenly over A and B.

    A rank beyond that of the residual begins as it would without one.
    """
    rank = min(factors.a.shape[0], *residual.shape)
    found = _low_rank_decomposition(residual.float(), reduced_rank=rank)
    # PEFT leaves the scale out, and so begins elsewhere unless alpha is the rank
    root = math.sqrt(factors.scale)
    factors.a[:rank].copy_(found["R"] / root)
    factors.b[:, :rank].copy_(found["L"] / root)


def _begin_as_peft(factors: Factors, module: torch.nn.Module, config: LoraConfig, draw: int) -> None:
    wide_in, wide_out = features(module)
    stand_in = torch.nn.Linear(wide_in, wide_out, bias=False, device="cpu")
    stand_in.weight = torch.nn.Parameter(dense_weight(module).float().cpu(), requires_grad=False)
    rank = factors.a.shape[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draw)
        try:
            layer = PeftLinear(
                stand_in,
                "default",
                config=LoraConfig(init_lora_weights=config.init_lora_weights, use_rslora=config.use_rslora),
                r=rank,
                lora_alpha=config.lora_alpha,
            )
        except (ValueError, RuntimeError) as error:
            raise TrainingError(f"the start {config.init_lora_weights!r} cannot be made: {error}") from error
    factors.a.copy_(layer.lora_A["default"].weight)  # pyright: ignore[reportArgumentType]
    factors.b.copy_(layer.lora_B["default"].weight)  # pyright: ignore[reportArgumentType]
    if _takes_from_base(config):
        # The base stays as it is stored, so what the start added is taken off again
        factors.start = (factors.a.detach().clone(), factors.b.detach().clone())
