"""What the store commands are told alike: which store, which artifact, how its server encrypts, lengths of time."""

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from qlora_core.store.store import Store

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}

StoreOption = Annotated[
    str | None, typer.Option("--store", metavar="URL", help="A folder or s3://bucket/prefix, instead of --config.")
]
ConfigOption = Annotated[
    Path | None, typer.Option("--config", help="The pipeline config whose store is meant; default: ./pipeline.yaml.")
]
KeyArgument = Annotated[
    str, typer.Argument(help="An artifact's key, or its first 6 digits or more.", metavar="KEY", show_default=False)
]
EncryptionOption = Annotated[
    Literal["none", "AES256", "aws:kms"] | None,
    typer.Option(
        "--encryption",
        help="With --store s3://...: asked of the server with every write; with --config it is the config's.",
    ),
]
KmsKeyOption = Annotated[
    str | None,
    typer.Option("--kms-key-id", metavar="KEY", help="With --encryption aws:kms; else the account's own key."),
]


def open_store_of(
    url: str | None,
    config: Path | None,
    *,
    is_new: bool = False,
    encryption: str | None = None,
    kms_key_id: str | None = None,
) -> "Store":
    """The store that a command is about: at `url`, or that of a config file. The rest is for one at `url`."""
    from qlora_core.config.load import load_config
    from qlora_core.errors import ConfigError
    from qlora_core.pipeline.job import Job

    default = Path("pipeline.yaml")
    if url is not None and config is not None:
        raise ConfigError("--store and --config both say which store is meant; give one of them")
    if url is None and (encryption or kms_key_id):
        raise ConfigError("--encryption and --kms-key-id go with --store; a config says its own in the section `store`")
    if url is None and config is None and not default.is_file():
        raise ConfigError(
            f"which store? There is no {default} in {Path.cwd()}: give --store with a folder or s3://bucket/prefix, or "
            "--config with a pipeline config"
        )
    store = Job(load_config(config or default)).store if url is None else _open_at(url, encryption, kms_key_id)
    if not is_new and not store.location.startswith("s3://") and not (Path(store.location) / "v1").is_dir():
        raise ConfigError(f"there is no store in {store.location} yet; a run of the pipeline makes it")
    return store


def _open_at(url: str, encryption: str | None, kms_key_id: str | None) -> "Store":
    from qlora_core.errors import ConfigError
    from qlora_core.store.store import open_store

    if not url.startswith("s3://") and (encryption or kms_key_id):
        raise ConfigError(f"--encryption and --kms-key-id are asked of a bucket's server, and {url} is a folder")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qlora"
    asked: dict[str, Any] = {"encryption": encryption or "none", "kms_key_id": kms_key_id}
    return open_store(url, cache, **asked)


def duration_s(text: str) -> float:
    """Seconds in "30m", "12h", "7d" or "0s". Raises ConfigError for anything else."""
    from qlora_core.errors import ConfigError

    told = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", text.strip())
    if told is None:
        raise ConfigError(f"{text!r} is no length of time: a number and s, m, h, d or w, such as 30m, 12h, 7d or 0s")
    return float(told[1]) * _SECONDS[told[2]]
