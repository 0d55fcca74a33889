"""An adapter with its part in a composition. Knows no method."""

from collections.abc import Mapping
from dataclasses import dataclass

from qlora_core.adapters.adapter_folder import AdapterFolder


@dataclass(frozen=True)
class Ingredient:
    """An adapter, what reports call it, and its weight, which may differ by module (None: the same everywhere)."""

    name: str
    adapter: AdapterFolder
    weight: float
    by_module: Mapping[str, float] | None = None

    def weight_on(self, module: str) -> float:
        """The factor of its delta on a module."""
        return self.weight if self.by_module is None else self.by_module.get(module, 0.0)
