"""The adapter that training begins from, where the config names one: the champion of the moment, a version, a folder.

`champion` means another adapter once somebody promotes, so that a run pins the version it began with.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

from qlora_core.config.pipeline import PipelineConfig
from qlora_core.errors import ConfigError
from qlora_core.registry.adapter_files import adapter_sha256
from qlora_core.registry.aliases import CHAMPION
from qlora_core.registry.champion import Champion, current_champion
from qlora_core.registry.model_address import SCHEME, resolve_address

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StartAdapter:
    """A verified PEFT folder and its digest. `quantized_base_digest` is None for a folder that no registry knows."""

    folder: Path
    adapter_sha256: str
    quantized_base_digest: str | None


def find_start(config: PipelineConfig) -> StartAdapter | None:
    """What `train.start_from` names, its files at hand; None where it names nothing, or a champion that is not yet.

    Raises ConfigError for a start without regression constraints and for a folder that is not there, RegistryError for
    a version that is not there or whose files are not those that were registered.
    """
    named = config.train.start_from
    if named is None:
        return None
    _check_watched(config)
    if named == CHAMPION:
        champion = _champion(config)
        if champion is None:
            return None
        return StartAdapter(champion.folder, champion.adapter_sha256, champion.quantized_base_digest)
    if named.startswith(SCHEME):
        found = resolve_address(config.tracking_uri, named, _cache(config))
        return StartAdapter(found.folder, found.adapter_sha256, found.quantized_base_digest)
    folder = config.path(named)
    if not folder.is_dir():
        raise ConfigError(
            f"train.start_from {named!r}: no such folder ({folder}); give champion, models:/NAME/VERSION or a folder"
        )
    return StartAdapter(folder, adapter_sha256(folder), None)


def pin_start(config: PipelineConfig) -> PipelineConfig:
    """The config with `champion` replaced by the version that is champion now, or by nothing where there is none."""
    if config.train.start_from != CHAMPION:
        return config
    _check_watched(config)
    champion = _champion(config)
    if champion is None:
        update = {"start_from": None, "start_as": "weights"}
    else:
        update = {"start_from": f"{SCHEME}{config.registry.model_name}/{champion.version}"}
    train = config.train.model_copy(update=update)
    return config.model_copy(update={"train": train}).rooted_at(config.folder)


def _check_watched(config: PipelineConfig) -> None:
    if config.gate.slices.by == "none":
        raise ConfigError(
            "train.start_from without gate.slices.by: what the start could do must be watched slice by slice; set "
            "gate.slices.by to category or language, or leave start_from out"
        )


def _champion(config: PipelineConfig) -> Champion | None:
    name = config.registry.model_name
    champion = current_champion(config.tracking_uri, name, _cache(config))
    if champion is None:
        logger.info("train.start_from: %s has no champion yet; training begins from scratch", name)
    return champion


def _cache(config: PipelineConfig) -> Path:
    return config.work_dir / "champions"
