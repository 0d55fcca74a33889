"""The whole pipeline config. Knows its sections and how paths in it are resolved, and nothing of YAML."""

from pathlib import Path
from typing import Any

from pydantic import PrivateAttr

from qlora_core.config.base import BaseConfig
from qlora_core.config.compute import ComputeConfig
from qlora_core.config.data import DataConfig
from qlora_core.config.evaluate import EvaluateConfig
from qlora_core.config.gate import GateConfig
from qlora_core.config.quantize import QuantizeConfig
from qlora_core.config.registry import RegistryConfig
from qlora_core.config.section import Section
from qlora_core.config.store import StoreConfig
from qlora_core.config.sweep import SweepConfig
from qlora_core.config.train import TrainConfig


class PipelineConfig(Section):
    """One job: every section with defaults that work; `data.sources` and `base.model` must be named."""

    data: DataConfig
    base: BaseConfig
    quantize: QuantizeConfig = QuantizeConfig()
    train: TrainConfig = TrainConfig()
    sweep: SweepConfig = SweepConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    gate: GateConfig = GateConfig()
    registry: RegistryConfig = RegistryConfig()
    store: StoreConfig = StoreConfig()
    compute: ComputeConfig = ComputeConfig()

    _folder: Path = PrivateAttr(default_factory=Path.cwd)

    def rooted_at(self, folder: Path) -> "PipelineConfig":
        """The same config with relative paths starting at `folder` (the config file's folder)."""
        copy = self.model_copy()
        copy._folder = folder.resolve()
        return copy

    @property
    def folder(self) -> Path:
        """Where relative paths start."""
        return self._folder

    def path(self, value: str) -> Path:
        """`value` as an absolute path; a relative one starts at the config file's folder."""
        return (self._folder / Path(value).expanduser()).resolve()

    @property
    def work_dir(self) -> Path:
        """The folder for local state: checkpoints, study, MLflow's SQLite."""
        return self.path(self.compute.work_dir)

    @property
    def tracking_uri(self) -> str:
        """MLflow's address: the configured one, else SQLite in the work folder."""
        return self.registry.tracking_uri or f"sqlite:///{self.work_dir / 'mlflow.db'}"

    def resolved(self) -> dict[str, Any]:
        """Every setting with its value, defaults included, as plain JSON data."""
        return self.model_dump(mode="json")
