"""What a job reads from outside, told by digests and listings alone: whether there is anything new to do.

The cheap check before a scheduled run. It fetches no data, opens no model, asks no registry; all it says is whether the
sources, the base, the settings or the code differ from those of another time.
"""

import importlib.metadata
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_core.config.pipeline import PipelineConfig
from qlora_core.data.arrivals import Listing, fingerprint_sources
from qlora_core.digest import digest_json
from qlora_core.errors import ConfigError
from qlora_core.evaluation.judge.client import resolve_kind
from qlora_core.file_digests import FileDigests
from qlora_core.pipeline.base_source import is_demo
from qlora_core.quantization.checkpoint import checkpoint_files, tokenizer_files
from qlora_core.registry.adapter_files import adapter_sha256
from qlora_core.store.manifest import DISTRIBUTION

FILE_SETTINGS = (
    "data.chat_template",
    "data.split.earlier",
    "quantize.quality_text",
    "evaluate.judge.certificate",
    "evaluate.judge.checks",
    "evaluate.general_text",
    "evaluate.votes",
    "evaluate.parity_certificate",
)
"""Settings whose value names a file or folder: what lies there is an input too."""

SHOWN = 5
Inputs = Mapping[str, Any]


def read_inputs(config: PipelineConfig) -> dict[str, Any]:
    """The job's inputs as plain JSON data: two jobs with equal inputs give equal results.

    Keys: `data` and `prompt_sets` (file: content), `base`, `config` (digest of every setting that can change a result),
    `files` (setting: content of what it names), `judge` (which kind `auto` means here) and `code` (the version). Raises
    DataError and ConfigError for what is not there, StoreError where S3 does not answer.
    """
    digests = FileDigests(config.work_dir / "file-digests.json")
    settings = config.resolved()
    del settings["compute"]
    try:
        return {
            "data": fingerprint_sources(config.data.sources, config.path, _objects, digests.digest),
            "prompt_sets": fingerprint_sources(
                config.evaluate.prompt_sets, config.path, _objects, digests.digest, setting="evaluate.prompt_sets"
            ),
            "base": _base(config, digests),
            "config": digest_json(settings),
            "files": _named_files(config, settings, digests),
            "judge": resolve_kind(config.evaluate.judge, os.environ),
            "code": importlib.metadata.version(DISTRIBUTION),
        }
    finally:
        digests.save()


def what_changed(before: Inputs, now: Inputs) -> list[str]:
    """One sentence for each kind of input that differs; empty where a run would only find what is known already."""
    told = [
        *_files_changed("data", before.get("data", {}), now["data"]),
        *_files_changed("evaluation sets", before.get("prompt_sets", {}), now["prompt_sets"]),
    ]
    names = {"base": "base model", "config": "config", "files": "files named in the config", "judge": "judge"}
    told += [f"{said}: changed" for name, said in names.items() if before.get(name) != now[name]]
    if before.get("code") != now["code"]:
        told.append(f"code: version {before.get('code')} -> {now['code']}")
    return told


def _files_changed(what: str, before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    ways = {
        "new": [name for name in now if name not in before],
        "changed": [name for name in now if name in before and before[name] != now[name]],
        "gone": [name for name in before if name not in now],
    }
    return [f"{what}: {len(names)} {way} ({_shown(names)})" for way, names in ways.items() if names]


def _shown(names: list[str]) -> str:
    first = [name.partition("/")[2] for name in names[:SHOWN]]
    return ", ".join([*first, f"and {len(names) - SHOWN} more"] if len(names) > SHOWN else first)


def _base(config: PipelineConfig, digests: FileDigests) -> str:
    """Identity of the base without opening or fetching it: a hub name is pinned by its commit."""
    folder = config.path(config.base.model)
    if is_demo(config) or not folder.is_dir():
        return f"{config.base.model}@{config.base.revision}"
    files = {**checkpoint_files(folder), **tokenizer_files(folder)}
    return digest_json({name: digests.digest(path) for name, path in sorted(files.items())})


def _named_files(config: PipelineConfig, settings: Mapping[str, Any], digests: FileDigests) -> dict[str, str]:
    named = {setting: _value(settings, setting) for setting in FILE_SETTINGS}
    found = {name: _content(name, config.path(value), digests) for name, value in named.items() if value is not None}
    start = config.train.start_from
    if start is not None and config.path(start).is_dir():
        found["train.start_from"] = adapter_sha256(config.path(start))
    return found


def _value(settings: Mapping[str, Any], dotted: str) -> Any:
    value: Any = settings
    for name in dotted.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _content(setting: str, path: Path, digests: FileDigests) -> str:
    if path.is_dir():
        path = path / "curation.json"
    if not path.is_file():
        raise ConfigError(f"{setting}: no such file {str(path)!r}; correct the path, or leave the key out")
    return digests.digest(path)


def _objects() -> Listing:
    from qlora_core.store.s3.objects import S3Objects  # boto3 takes a while, and few jobs need it here

    return S3Objects()
