"""The present champion's adapter on local disk, for comparison. Makes nothing: no registry means no champion."""

from dataclasses import dataclass
from pathlib import Path

from qlora_core.registry.aliases import CHAMPION, alias_version
from qlora_core.registry.connection import connect, sqlite_file
from qlora_core.registry.model_address import fetch_version
from qlora_core.registry.versions import ADAPTER_TAG, BASE_TAG, DATA_TAG, RUN_KEY_TAG, get_version


@dataclass(frozen=True)
class Champion:
    """The version behind the champion alias, its verified PEFT folder, and the base and data it was trained on.

    `run_key` is that of its registration, under whose name the store keeps what it was made from.
    """

    version: str
    folder: Path
    adapter_sha256: str
    quantized_base_digest: str
    data_digest: str
    run_key: str


def current_champion(tracking_uri: str, model_name: str, cache_dir: Path) -> Champion | None:
    """The champion of `model_name`, its files verified under `cache_dir`; None where there is none yet.

    A SQLite file that does not exist is not created. Raises RegistryError when the registry cannot be read, or when the
    champion's files are not those that were registered.
    """
    database = sqlite_file(tracking_uri)
    if database is not None and not database.is_file():
        return None
    client = connect(tracking_uri)
    number = alias_version(client, model_name, CHAMPION)
    if number is None:
        return None
    version = get_version(client, model_name, number)
    folder = fetch_version(client, version, cache_dir)
    made_from = version.tag(BASE_TAG), version.tag(DATA_TAG)
    return Champion(number, folder, version.tag(ADAPTER_TAG), *made_from, version.tag(RUN_KEY_TAG))
