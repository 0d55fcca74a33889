"""The present champion's adapter on local disk, for comparison. Makes nothing: no registry means no champion."""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from qlora_core.errors import RegistryError
from qlora_core.registry.adapter_files import adapter_sha256
from qlora_core.registry.aliases import CHAMPION, alias_version
from qlora_core.registry.connection import connect, sqlite_file
from qlora_core.registry.versions import ADAPTER_TAG, BASE_TAG, download_version, get_version


@dataclass(frozen=True)
class Champion:
    """The version behind the champion alias, its verified PEFT folder, and the base it was trained over."""

    version: str
    folder: Path
    adapter_sha256: str
    quantized_base_digest: str


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
    sha256 = version.tag(ADAPTER_TAG)
    folder = cache_dir / sha256
    if not _holds(folder, sha256):
        cache_dir.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix="champion-", dir=cache_dir) as staging:
            local = download_version(client, version, Path(staging))
            _put(local, folder)
    return Champion(number, folder, sha256, version.tag(BASE_TAG))


def _holds(folder: Path, sha256: str) -> bool:
    """Whether an earlier download is still whole; an incomplete or edited one is fetched again."""
    if not folder.is_dir():
        return False
    try:
        return adapter_sha256(folder) == sha256
    except RegistryError:
        return False


def _put(local: Path, folder: Path) -> None:
    if folder.exists():
        folder.rename(local.with_name("damaged"))  # goes away with the staging folder
    local.rename(folder)
