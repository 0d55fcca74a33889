"""`models:/NAME@ALIAS` and `models:/NAME/VERSION` on the command line: what a config's registry means by them."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_core.errors import ConfigError

if TYPE_CHECKING:
    from qlora_core.config.pipeline import PipelineConfig
    from qlora_core.registry.model_address import RegisteredAdapter

SCHEME = "models:/"


@dataclass(frozen=True)
class Registered:
    """A version, its verified folder on this machine, and the config whose registry it was found in."""

    config: "PipelineConfig"
    adapter: "RegisteredAdapter"

    @property
    def tracking_uri(self) -> str:
        """The registry that the version was found in."""
        return self.config.tracking_uri


def is_address(text: str) -> bool:
    """Whether a text means a registered version, not a folder."""
    return text.startswith(SCHEME)


def find_registered(address: str, registry: Path | None) -> Registered:
    """What an address means now. Raises ConfigError without a registry, RegistryError where it means nothing there."""
    from qlora_core.registry.model_address import resolve_address

    config = registry_config(address, registry)
    return Registered(config, resolve_address(config.tracking_uri, address, adapter_cache(config)))


def registry_config(address: str, registry: Path | None) -> "PipelineConfig":
    """The config whose registry knows the address."""
    from qlora_core.config.load import load_config

    if registry is None:
        raise ConfigError(f"{address} needs --registry CONFIG, whose registry knows it")
    return load_config(registry)


def base_in_store(config: "PipelineConfig", digest: str, *, of: str, option: str) -> Path:
    """The quantized base of a digest in a config's store, verified. Raises StoreError where it is not there."""
    from qlora_core.pipeline.job import Job
    from qlora_core.pipeline.registered_base import stored_base

    return stored_base(Job(config).store, digest, of=of, option=option)


def adapter_cache(config: "PipelineConfig") -> Path:
    """Where a config's registered adapters are kept on this machine."""
    return config.work_dir / "champions"
