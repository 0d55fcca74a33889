"""What `models:/NAME@ALIAS` and `models:/NAME/VERSION` mean: a version, and its verified PEFT folder on local disk.

An alias may mean another version at any time: what asks again holds an `AddressBook`.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from qlora_core.errors import RegistryError
from qlora_core.registry.adapter_files import adapter_sha256
from qlora_core.registry.aliases import CHALLENGER, CHAMPION, alias_version
from qlora_core.registry.connection import connect, registry_errors, sqlite_file
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


class AddressBook:
    """Looks addresses up in one registry, again and again, over one client; its folders go under `cache_dir`.

    Raises RegistryError for an address of another form and a registry that is not there (a SQLite file is not created);
    RegistryUnavailableError where it does not answer now.
    """

    def __init__(self, tracking_uri: str, cache_dir: Path) -> None:
        self._tracking_uri, self._cache_dir = tracking_uri, cache_dir
        self._client: MlflowClient | None = None

    def version_of(self, address: str) -> str | None:
        """The version that an address means now, from one look-up; None: there is no such model or alias."""
        found = _parsed(address)
        if found["version"] is not None:
            return found["version"]
        return alias_version(self._connected(address), found["name"], found["alias"])

    def fetch(self, address: str, version: str) -> RegisteredAdapter:
        """A version of the model that an address names, downloaded and verified.

        Raises RegistryError, too, where there is no such version, or its files are not those that were registered.
        """
        client = self._connected(address)
        found = get_version(client, _parsed(address)["name"], version)
        folder = fetch_version(client, found, self._cache_dir)
        return RegisteredAdapter(found.name, found.version, folder, found.tag(ADAPTER_TAG), found.tag(BASE_TAG))

    def what_is_missing(self, address: str) -> str:
        """Of an address without a version: the alias, or the model, with those that are registered."""
        found = _parsed(address)
        with registry_errors("listing the registered models"):
            known = sorted(model.name for model in self._connected(address).search_registered_models(max_results=100))
        if found["name"] in known:
            return f"{found['name']!r} has no alias {found['alias']!r}"
        return f"no model {found['name']!r} is registered, only {', '.join(map(repr, known)) or 'none'}"

    def _connected(self, address: str) -> "MlflowClient":
        database = sqlite_file(self._tracking_uri)
        if database is not None and not database.is_file():
            self._client = None
            raise RegistryError(
                f"there is no registry at {database}, so {address} cannot be found; run `qlora run` first"
            )
        self._client = self._client or connect(self._tracking_uri)
        return self._client


def resolve_address(tracking_uri: str, address: str, cache_dir: Path) -> RegisteredAdapter:
    """The adapter that an address means now, downloaded under `cache_dir` and verified.

    Raises RegistryError for what an `AddressBook` refuses, and for no such model or alias.
    """
    book = AddressBook(tracking_uri, cache_dir)
    version = book.version_of(address)
    if version is None:
        raise RegistryError(f"{address}: {book.what_is_missing(address)}; see `qlora history CONFIG`")
    return book.fetch(address, version)


def is_alias(address: str) -> bool:
    """Whether an address may mean another version later. Raises RegistryError for an address of another form."""
    return _parsed(address)["alias"] is not None


def _parsed(address: str) -> re.Match[str]:
    found = _ADDRESS.fullmatch(address)
    if found is None:
        raise RegistryError(f"{address!r} is no address of a version; write models:/NAME@ALIAS or models:/NAME/3")
    return found


def alias_addresses(model_name: str) -> list[str]:
    """The addresses of a model's champion and challenger, whether there are such or not."""
    return [f"{SCHEME}{model_name}@{alias}" for alias in (CHAMPION, CHALLENGER)]


def present_aliases(tracking_uri: str, model_name: str) -> list[str]:
    """The addresses of a model's champion and challenger, those that there are.

    Raises RegistryError where there is neither.
    """
    database = sqlite_file(tracking_uri)
    found = []
    if database is None or database.is_file():
        client = connect(tracking_uri)
        wanted = alias_addresses(model_name)
        found = [each for each in wanted if alias_version(client, model_name, _parsed(each)["alias"]) is not None]
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
