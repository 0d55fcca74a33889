"""The parity certificate of an adapter or of a checkpoint merged from it, kept with the registered version.

The certificate's own folder holds it, too; here it can be found from the version that is served. Knows the
certificate's digests and figures; how they were measured is not its business.
"""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_core.digest import digest_files, digest_json
from qlora_core.errors import RegistryError
from qlora_core.registry.connection import connect, registry_errors, registry_lock
from qlora_core.registry.model_address import RegisteredAdapter
from qlora_core.registry.versions import RegisteredVersion, get_version, set_version_tag

if TYPE_CHECKING:
    from mlflow import MlflowClient

CERTIFICATE_FILE = "certificate.json"
_TARGETS = ("16bit", "nf4")
_FIGURES = ("gain_retained", "kl", "top1_agreement", "projection")
_OF_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


def certificate_tag(target: str, name: str = "sha256") -> str:
    """The tag of a version that holds a certificate's digest, or one of its figures; one set for each merge target."""
    return f"certificate_{target}_{name}"


def record_certificate(tracking_uri: str, found: RegisteredAdapter, certificate: Path) -> str:
    """`keep_certificate` for a version that was looked up before; returns the certificate's digest.

    The version is the one that was looked up, wherever its alias points by now. Raises what `keep_certificate` raises,
    and RegistryError where the registry does not answer.
    """
    client = connect(tracking_uri)
    with registry_lock(tracking_uri):
        return keep_certificate(client, get_version(client, found.name, found.version), found.folder, certificate)


def keep_certificate(client: "MlflowClient", version: RegisteredVersion, adapter: Path, certificate: Path) -> str:
    """Log a certificate beside the version's run and tag the version with its digest and figures; returns the digest.

    `adapter`: the version's folder. Merges to 16 bit and to NF4 have tags of their own; a newer certificate of the same
    target takes the tags over. Doing it again with the same certificate changes nothing.

    Raises:
        RegistryError: no JSON object, a certificate of another adapter or of a merge that was refused, or figures that
            are missing or not finite.
    """
    content = _read(certificate)
    found = digest_files({name: adapter / name for name in _OF_ADAPTER})
    if content.get("adapter_digest") != found:
        raise RegistryError(
            f"{certificate} is of adapter {content.get('adapter_digest')}, version {version.version} of "
            f"{version.name!r} is {found}; certify this adapter, or leave the file out"
        )
    figures, target, digest = _chosen_figures(content, certificate), content["target"], digest_json(content)
    if version.tags.get(certificate_tag(target)) == digest:
        return digest
    with registry_errors(f"keeping the certificate of version {version.version} of {version.name!r}"):
        text = json.dumps(content, indent=1, allow_nan=False) + "\n"
        client.log_text(version.run_id, text, f"certificates/{version.name}-{version.version}-{digest[:12]}.json")
        for name in _FIGURES:
            if name not in figures and certificate_tag(target, name) in version.tags:  # of the certificate before
                client.delete_model_version_tag(version.name, version.version, certificate_tag(target, name))
    for name, value in figures.items():
        set_version_tag(client, version, certificate_tag(target, name), repr(value))
    set_version_tag(client, version, certificate_tag(target), digest)  # last: a version that has it has the rest
    return digest


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RegistryError(f"the certificate {path} cannot be read: {error}; merge again") from error
    if not isinstance(content, dict):
        raise RegistryError(f"{path} holds a {type(content).__name__}, not a certificate; merge again")
    return content


def _chosen_figures(content: dict[str, Any], path: Path) -> dict[str, float]:
    """The figures of the candidate that was put in place; `gain_retained` is left out where there was no gain."""
    chosen = [each for each in content.get("candidates", []) if each.get("name") == content.get("chosen")]
    if content.get("chosen") is None or len(chosen) != 1:
        raise RegistryError(
            f"{path} certifies nothing: no candidate kept the thresholds; serve the adapter on its base"
        )
    if content.get("target") not in _TARGETS:
        raise RegistryError(f"{path} is of target {content.get('target')!r}, known are {_TARGETS}; merge again")
    figures = {name: chosen[0].get(name) for name in _FIGURES}
    kept = {name: float(value) for name, value in figures.items() if isinstance(value, int | float)}
    lacking = [name for name in _FIGURES if not math.isfinite(kept.get(name, math.nan)) and name != "gain_retained"]
    if lacking:
        raise RegistryError(f"{path} lacks {', '.join(lacking)} as numbers; merge again")
    return kept
