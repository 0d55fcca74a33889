"""What `qlora doctor` looks at: each check tries the real thing in small, and a failed one says how to mend it.

Knows which services there are. How each is reached is asked of its own home in the library.
"""

import importlib
import importlib.metadata
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qlora_core.config.load import load_config, parse_config
from qlora_core.config.pipeline import PipelineConfig
from qlora_core.errors import QloraError


@dataclass(frozen=True)
class Check:
    """One finding. `mend` says what to do and is empty where all is well."""

    name: str
    ok: bool
    found: str
    mend: str = ""

    def row(self) -> dict[str, Any]:
        """The check as JSON data."""
        return asdict(self)


def examine(config_path: Path | None) -> list[Check]:
    """Every check, in the order a run meets them. Without a config, the defaults are checked in the working directory.

    A config that cannot be read is not a finding but an error: ConfigError.
    """
    if config_path is None:
        config = parse_config({"data": {"sources": ["."]}, "base": {"model": "demo"}}, folder=Path.cwd())
    else:
        config = load_config(config_path)
    checks: list[tuple[str, Callable[[PipelineConfig], str], str]] = [
        ("device", _device, "install a torch build that fits the driver"),
        ("bitsandbytes", _bitsandbytes, "reinstall bitsandbytes with the version in constraints.txt"),
        ("prefect", _prefect, "install the versions in constraints.txt"),
        ("ray", _ray, "check compute.ray_address and RAY_AUTH_TOKEN, or leave the key out to use this machine"),
        ("store", _store, "mend the store setting or its credentials"),
        ("mlflow", _mlflow, "check registry.tracking_uri, or leave the key out to use SQLite"),
        ("judge", _judge, "set OPENAI_API_KEY, or evaluate.judge.kind: offline"),
    ]
    return [_try(name, check, config, mend) for name, check, mend in checks]


def _try(name: str, check: Callable[[PipelineConfig], str], config: PipelineConfig, mend: str) -> Check:
    try:
        return Check(name, True, check(config))
    except (QloraError, ImportError, OSError, RuntimeError) as error:
        return Check(name, False, str(error), mend)


def _device(config: PipelineConfig) -> str:
    import torch

    from qlora_core.model.base import choose_device, choose_precision

    device = choose_device()
    precision = str(choose_precision(config.train.precision, device)).removeprefix("torch.")
    name = torch.cuda.get_device_name() if device.startswith("cuda") else f"{os.cpu_count()} cores"
    return f"{device} ({name}), compute in {precision}"


def _bitsandbytes(config: PipelineConfig) -> str:
    from qlora_core.model.base import choose_device
    from qlora_core.quantization.probe import probe_kernels

    error = probe_kernels(config.quantize, choose_device())
    return f"{importlib.metadata.version('bitsandbytes')}, {config.quantize.type} round trip error {error:.4f}"


def _prefect(config: PipelineConfig) -> str:
    importlib.import_module("prefect.server.api.server")  # its import is what breaks on a wrong fastapi
    versions = {name: importlib.metadata.version(name) for name in ("prefect", "fastapi", "sqlalchemy")}
    if tuple(map(int, versions["sqlalchemy"].split(".")[:2])) >= (2, 1):
        raise RuntimeError(f"sqlalchemy {versions['sqlalchemy']}: scheduled runs never appear from 2.1 on")
    where = os.environ.get("PREFECT_API_URL", "in-process")
    return f"{', '.join(f'{name} {version}' for name, version in versions.items())}; API {where}"


def _ray(config: PipelineConfig) -> str:
    from qlora_core.sweep.ray_connection import cluster_resources

    resources = cluster_resources(config.compute)
    where = config.compute.ray_address or "local"
    return f"{importlib.metadata.version('ray')}, {where}: {resources}"


def _store(config: PipelineConfig) -> str:
    from qlora_core.pipeline.job import Job

    Job(config).store.check()
    return f"{config.store.url}: written, read back and removed"


def _mlflow(config: PipelineConfig) -> str:
    from qlora_core.registry.connection import sqlite_file, without_credentials

    where = without_credentials(config.tracking_uri)
    database = sqlite_file(config.tracking_uri)
    if database is not None and not database.is_file():
        return f"{where}: made by the first run"
    from qlora_core.registry.connection import connect

    connect(config.tracking_uri)
    return f"{where}: answers"


def _judge(config: PipelineConfig) -> str:
    from qlora_core.evaluation.judge.client import resolve_kind

    judge = config.evaluate.judge
    kind = resolve_kind(judge, os.environ)
    if kind == "openai":
        from qlora_core.evaluation.judge.endpoint import open_openai_judge

        with open_openai_judge(judge, os.environ, None) as client:
            client.check()
        return f"{judge.model} at {judge.base_url or 'OpenAI'}: answers"
    if kind == "checks":
        from qlora_core.evaluation.judge.check_file import read_check_rows

        rows = read_check_rows(config.path(judge.checks or ""))
        return f"{len(rows)} programmatic checks: uncertified"
    return "offline, by log-probability: uncertified" if kind == "offline" else "none"
