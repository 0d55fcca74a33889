"""Adapter folders as registered model versions, and back again, byte for byte.

A version is plain files (safetensors, JSON, text) without any MLflow flavor: loading a flavor runs code chosen by
whoever wrote it. Knows nothing of aliases, the gate, or how an adapter is attached to a model.
"""

import logging
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_core.digest import digest_json
from qlora_core.errors import RegistryError
from qlora_core.registry.adapter_files import adapter_sha256
from qlora_core.registry.connection import registry_errors

if TYPE_CHECKING:
    from mlflow import MlflowClient

ADAPTER_TAG = "adapter_sha256"
BASE_TAG = "quantized_base_digest"
DATA_TAG = "data_digest"
IDEMPOTENCY_TAG = "idempotency_key"
RUN_KEY_TAG = "run_key"
# Where an adapter comes from: every version says it. Digests are SHA-256, 64 hex digits.
LINEAGE_TAGS = ("base_model", "base_revision", BASE_TAG, DATA_TAG, "config_digest")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RegisteredVersion:
    """A model version as registered. `version` is MLflow's number as text, whatever type the backend returns."""

    name: str
    version: str
    run_id: str
    tags: Mapping[str, str]
    aliases: tuple[str, ...]

    def tag(self, key: str) -> str:
        """A tag that must be there; RegistryError when this version was registered by something else."""
        if key not in self.tags:
            raise RegistryError(
                f"version {self.version} of {self.name!r} has no tag {key!r}, so this pipeline did not register it; "
                "register the adapter with `qlora run`, or name another version"
            )
        return self.tags[key]


def register_adapter(
    client: "MlflowClient", model_name: str, folder: Path, *, run_id: str, run_key: str, lineage: Mapping[str, str]
) -> RegisteredVersion:
    """Register an adapter folder as a version of `model_name`; one adapter of one `run_key` gives one version.

    `lineage` becomes tags and must name all of LINEAGE_TAGS. Hold the registry's lock around it: MLflow itself counts
    every retry as a new version. Raises RegistryError, before anything is written, for incomplete lineage and for a
    folder with files that may not be registered.
    """
    if missing := [key for key in LINEAGE_TAGS if not lineage.get(key)]:
        raise RegistryError(
            f"the lineage lacks {', '.join(missing)}; say where the adapter comes from, then register it"
        )
    sha256 = adapter_sha256(folder)
    key = digest_json({"run_key": run_key, ADAPTER_TAG: sha256})
    with registry_errors(f"registering an adapter as {model_name!r}"):
        _ensure_model(client, model_name)
        found = client.search_model_versions(f"name = '{model_name}' and tags.{IDEMPOTENCY_TAG} = '{key}'")
        if found:
            _log.info("Adapter %s is version %s of %s already", sha256[:12], found[0].version, model_name)
            return get_version(client, model_name, str(found[0].version))
        experiment_id = client.get_run(run_id).info.experiment_id
        tags = {**lineage, ADAPTER_TAG: sha256, IDEMPOTENCY_TAG: key, RUN_KEY_TAG: run_key}
        model = client.create_logged_model(
            experiment_id, name="adapter", source_run_id=run_id, model_type="peft-adapter", tags=tags
        )
        client.log_model_artifacts(model.model_id, str(folder))
        model = client.finalize_logged_model(model.model_id, "READY")
        version = client.create_model_version(
            model_name, source=model.artifact_location, run_id=run_id, model_id=model.model_id, tags=tags
        )
    return get_version(client, model_name, str(version.version))


def get_version(client: "MlflowClient", model_name: str, version: str) -> RegisteredVersion:
    """A version by number; RegistryError when there is none, naming those there are."""
    from mlflow.exceptions import MlflowException

    with registry_errors(f"reading version {version} of {model_name!r}"):
        try:
            found: Any = client.get_model_version(model_name, version)
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            known = sorted(
                (str(one.version) for one in client.search_model_versions(f"name = '{model_name}'")), key=int
            )
            raise RegistryError(
                f"{model_name!r} has no version {version!r}; it has: {', '.join(known) or 'none'}"
            ) from error
    return RegisteredVersion(
        model_name, str(found.version), str(found.run_id), dict(found.tags), tuple(sorted(found.aliases))
    )


def versions_of_run(client: "MlflowClient", model_name: str, run_key: str) -> list[RegisteredVersion]:
    """The versions registered under one run key, newest first; empty when there is none, or no such model."""
    with registry_errors(f"looking for run {run_key} among the versions of {model_name!r}"):
        found = client.search_model_versions(f"name = '{model_name}' and tags.{RUN_KEY_TAG} = '{run_key}'")
    return [
        get_version(client, model_name, number) for number in sorted((str(one.version) for one in found), key=int)[::-1]
    ]


def set_version_tag(client: "MlflowClient", version: RegisteredVersion, key: str, value: str) -> None:
    """Add or replace one tag of a version."""
    with registry_errors(f"tagging version {version.version} of {version.name!r}"):
        client.set_model_version_tag(version.name, version.version, key, value)


def download_version(client: "MlflowClient", version: RegisteredVersion, folder: Path) -> Path:
    """The version's files in a new folder under `folder`, verified against the digest it was registered with.

    MLflow serves overwritten files without a word; here they raise RegistryError.
    """
    import mlflow.artifacts

    expected = version.tag(ADAPTER_TAG)
    folder.mkdir(parents=True, exist_ok=True)
    target = tempfile.mkdtemp(prefix="download-", dir=folder)
    with registry_errors(f"downloading version {version.version} of {version.name!r}"):
        source = client.get_model_version_download_uri(version.name, version.version)
        local = Path(
            mlflow.artifacts.download_artifacts(
                artifact_uri=source, dst_path=target, tracking_uri=client.tracking_uri, registry_uri=client.tracking_uri
            )
        )
    verify_adapter(local, expected, f"version {version.version} of {version.name!r}")
    return local


def verify_version(client: "MlflowClient", version: RegisteredVersion) -> None:
    """RegistryError unless the registry still holds the bytes that were registered."""
    with tempfile.TemporaryDirectory(prefix="verify-") as folder:
        download_version(client, version, Path(folder))


def verify_adapter(folder: Path, expected: str, name: str) -> None:
    """RegistryError unless the folder's bytes are those with digest `expected`."""
    found = adapter_sha256(folder)
    if found != expected:
        raise RegistryError(
            f"{name} does not hold the adapter it was registered with: its files have digest {found}, its tag "
            f"{ADAPTER_TAG} says {expected}; do not serve it: register the adapter again, or roll back"
        )


def _ensure_model(client: "MlflowClient", model_name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(model_name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
