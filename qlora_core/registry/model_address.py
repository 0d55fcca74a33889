"""What `models:/NAME@ALIAS` and `models:/NAME/VERSION` mean: a version, and its verified PEFT folder on local disk."""

import re
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from qlora_core.errors import RegistryError
from qlora_core.registry.adapter_files import adapter_sha256
from qlora_core.registry.aliases import CHALLENGER, CHAMPION, alias_version
from qlora_core.registry.connection import connect, sqlite_file
from qlora_core.registry.versions import ADAPTER_TAG, BASE_TAG, RegisteredVersion, download_version, get_version

if TYPE_CHECKING:
    from mlflow import MlflowClient

SCHEME = "models:/"
_ADDRESS = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>[0-9]+))")


@dataclass(frozen=True)
class RegisteredAdapter:
    """A version that an address meant when it was looked up, and the folder that holds its bytes."""

    name: str
    version: str
    folder: Path
    adapter_sha256: str
    quantized_base_digest: str


def resolve_address(tracking_uri: str, address: str, cache_dir: Path) -> RegisteredAdapter:
    """The adapter that an address means now, downloaded under `cache_dir` and verified.

    Raises RegistryError for an address of another form, no such model, alias or version, a registry that is not there
    (a SQLite file is not created), and for files that are not those that were registered.
    """
    found = _ADDRESS.fullmatch(address)
    if found is None:
        raise RegistryError(f"{address!r} is no address of a version; write models:/NAME@ALIAS or models:/NAME/3")
    database = sqlite_file(tracking_uri)
    if database is not None and not database.is_file():
        raise RegistryError(f"there is no registry at {database}, so {address} cannot be found; run `qlora run` first")
    client = connect(tracking_uri)
    name, number = found["name"], found["version"]
    if number is None:
        number = alias_version(client, name, found["alias"])
    if number is None:
        raise RegistryError(f"{address}: {name!r} has no alias {found['alias']!r}; see `qlora history CONFIG`")
    version = get_version(client, name, number)
    folder = fetch_version(client, version, cache_dir)
    return RegisteredAdapter(name, version.version, folder, version.tag(ADAPTER_TAG), version.tag(BASE_TAG))


def present_aliases(tracking_uri: str, model_name: str) -> list[str]:
    """The addresses of a model's champion and challenger, those that there are.

    Raises RegistryError where there is neither.
    """
    database = sqlite_file(tracking_uri)
    found = []
    if database is None or database.is_file():
        client = connect(tracking_uri)
        aliases = [alias for alias in (CHAMPION, CHALLENGER) if alias_version(client, model_name, alias) is not None]
        found = [f"{SCHEME}{model_name}@{alias}" for alias in aliases]
    if not found:
        raise RegistryError(f"{model_name!r} has neither champion nor challenger yet; run `qlora run` first")
    return found


def fetch_version(client: "MlflowClient", version: RegisteredVersion, cache_dir: Path) -> Path:
    """The version's verified files in `cache_dir`/<adapter digest>; an earlier download that is whole is used again."""
    sha256 = version.tag(ADAPTER_TAG)
    folder = cache_dir / sha256
    if not _holds(folder, sha256):
        cache_dir.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix="version-", dir=cache_dir) as staging:
            _put(download_version(client, version, Path(staging)), folder)
    return folder


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
