"""One job: a resolved config, its store, and the digests of what it reads from outside. Builds nothing itself."""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_core.config.pipeline import PipelineConfig
from qlora_core.data.remote_sources import Objects, localize_sources
from qlora_core.data.source_files import SourceFile, list_source_files
from qlora_core.digest import digest_file, digest_json
from qlora_core.errors import ConfigError
from qlora_core.pipeline.base_source import BaseModelFiles, is_demo, locate_base
from qlora_core.store.store import Store, open_store

if TYPE_CHECKING:
    from qlora_core.pipeline.start_adapter import StartAdapter


class Job:
    """A config and everything outside the store that its stages read. Nothing is read before it is asked for."""

    def __init__(self, config: PipelineConfig) -> None:
        self.config = config

    @cached_property
    def store_settings(self) -> dict[str, Any]:
        """The arguments of `open_store` as plain JSON data, for processes that open the store themselves."""
        settings = self.section("store")
        if "://" not in settings["url"]:
            settings["url"] = str(self.config.path(settings["url"]))
        return {**settings, "cache_dir": str(self.config.work_dir / "cache")}

    @cached_property
    def store(self) -> Store:
        """The artifact store; local copies of remote artifacts are kept in the work folder."""
        return open_store(**self.store_settings)

    @cached_property
    def source_paths(self) -> list[Path]:
        """The files and folders of `data.sources`; those in a bucket or on the hub are fetched first."""
        return self._local(self.config.data.sources)

    @cached_property
    def prompt_set_paths(self) -> list[Path]:
        """The files and folders of `evaluate.prompt_sets`, likewise."""
        return self._local(self.config.evaluate.prompt_sets)

    @cached_property
    def sources(self) -> list[SourceFile]:
        """The dataset files, folders opened."""
        return list_source_files(self.source_paths)

    @cached_property
    def prompt_sets(self) -> list[SourceFile]:
        """The files of evaluation items, folders opened."""
        return list_source_files(self.prompt_set_paths, setting="evaluate.prompt_sets")

    @cached_property
    def source_digests(self) -> dict[str, str]:
        """The SHA-256 of each dataset file, by its name within its source."""
        return {source.name: digest_file(source.path) for source in self.sources}

    @cached_property
    def prompt_set_digests(self) -> dict[str, str]:
        """The SHA-256 of each file of evaluation items, by its name within its source."""
        return {file.name: digest_file(file.path) for file in self.prompt_sets}

    @cached_property
    def chat_template(self) -> Path | None:
        """The configured chat template file, if any."""
        if self.config.data.chat_template is None:
            return None
        path = self.config.path(self.config.data.chat_template)
        if not path.is_file():
            raise ConfigError(
                f"data.chat_template: no such file {str(path)!r}; give a Jinja file, or leave the key out"
            )
        return path

    @cached_property
    def chat_template_digest(self) -> str:
        """Identity of the configured chat template, or "none"."""
        return digest_file(self.chat_template) if self.chat_template else "none"

    @cached_property
    def quality_text(self) -> Path | None:
        """The text that the quantized base's quality is measured on, if one is configured."""
        if self.config.quantize.quality_text is None:
            return None
        path = self.config.path(self.config.quantize.quality_text)
        if not path.is_file():
            raise ConfigError(
                f"quantize.quality_text: no such file {str(path)!r}; give a text file, or leave the key out"
            )
        return path

    @cached_property
    def earlier_split(self) -> Path | None:
        """The curated folder whose rows keep their sides, if one is configured."""
        if self.config.data.split.earlier is None:
            return None
        path = self.config.path(self.config.data.split.earlier)
        if not (path / "curation.json").is_file():
            raise ConfigError(
                f"data.split.earlier: {str(path)!r} is no curated folder; give the path that `qlora curate` "
                "reports, or leave the key out"
            )
        return path

    @cached_property
    def earlier_split_digest(self) -> str:
        """Identity of the rows of that folder and their sides, or "none"."""
        if self.earlier_split is None:
            return "none"
        return json.loads((self.earlier_split / "curation.json").read_text())["digest"]

    @cached_property
    def external_base(self) -> BaseModelFiles | None:
        """The base checkpoint named in the config; None for the demo model, which the first stage makes."""
        return None if is_demo(self.config) else locate_base(self.config)

    @cached_property
    def start_adapter(self) -> "StartAdapter | None":
        """The adapter that training begins from, if the config names one."""
        from qlora_core.pipeline.start_adapter import find_start  # MLflow takes a while, and few jobs need it here

        return find_start(self.config)

    def check_inputs(self) -> None:
        """Look at everything a run needs from outside before it works for minutes: sources, template, base, store."""
        self.store.check()
        for file in [*self.sources, *self.prompt_sets]:
            file.path.stat()
        _ = self.chat_template, self.quality_text, self.earlier_split, self.external_base, self.start_adapter

    def section(self, name: str, *, without: frozenset[str] = frozenset()) -> dict[str, Any]:
        """A config section as plain data, less the settings that cannot change a result."""
        values = getattr(self.config, name).model_dump(mode="json")
        return {key: value for key, value in values.items() if key not in without}

    def _local(self, sources: Sequence[str]) -> list[Path]:
        return localize_sources(sources, self.config.work_dir / "sources", self.config.path, _objects)

    @cached_property
    def config_digest(self) -> str:
        """Identity of the whole resolved config."""
        return digest_json(self.config.resolved())


def _objects() -> Objects:
    from qlora_core.store.s3.objects import S3Objects  # boto3 takes a while, and few jobs need it here

    return S3Objects()
