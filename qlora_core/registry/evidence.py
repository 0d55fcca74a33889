"""What a promotion was decided on, kept with the version so that it can be decided again and no edit goes unnoticed.

One file of canonical JSON on the version's run, its SHA-256 in a tag on the version. Knows nothing of how the figures
were measured.
"""

import json
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from qlora_core.config.gate import GateConfig
from qlora_core.digest import canonical_json, digest_bytes, digest_json
from qlora_core.errors import RegistryError
from qlora_core.registry.connection import registry_errors
from qlora_core.registry.evidence_digests import changed_parts, code_version, part_digests
from qlora_core.registry.gate.decide import Decision, decide
from qlora_core.registry.versions import ADAPTER_TAG, BASE_TAG, RegisteredVersion, set_version_tag

if TYPE_CHECKING:
    from mlflow import MlflowClient

EVIDENCE_TAG = "evidence_sha256"
VERDICT_TAG = "verdict"
DATA_TAG = "data_digest"
_SELF = "sha256"


def evidence_for(
    version: RegisteredVersion,
    *,
    evaluation: Mapping[str, Any],
    champion: Mapping[str, Any] | None,
    policy: GateConfig,
    decision: Mapping[str, Any],
) -> dict[str, Any]:
    """The evidence of one version as JSON data. Figures that are not finite become null, which no gate accepts.

    `digests` names every part (`evidence_digests`), and what the pack is bound to: data, base, adapter, prompts and
    code. `sha256` is over all the rest in canonical JSON, so that the file alone shows an edit to whoever reads it.
    """
    evidence = _finite(
        {
            "schema_version": 2,
            "model_name": version.name,
            "version": version.version,
            ADAPTER_TAG: version.tag(ADAPTER_TAG),
            "evaluation": dict(evaluation),
            "champion": dict(champion) if champion is not None else None,
            "policy": policy.model_dump(mode="json"),
            "decision": {"verdict": decision["verdict"], "reasons": list(decision["reasons"])},
        }
    )
    evidence["code"] = code_version()
    evidence["digests"] = part_digests(evidence) | {
        "data": version.tags.get(DATA_TAG),
        "base": version.tags.get(BASE_TAG),
        "adapter": version.tag(ADAPTER_TAG),
        "prompts": evaluation.get("prompts_digest"),
        "code": evidence["code"]["source_sha256"],
    }
    return {**evidence, _SELF: digest_json(evidence)}


def evidence_bytes(evidence: Mapping[str, Any]) -> bytes:
    """The pack as it is written: canonical JSON, whose SHA-256 is what the version's tag holds."""
    return canonical_json(dict(evidence))


def write_evidence(client: "MlflowClient", version: RegisteredVersion, evidence: Mapping[str, Any]) -> None:
    """Keep the evidence with its version: file first, then the digest that vouches for it, then the verdict."""
    with registry_errors(f"storing the evidence of version {version.version} of {version.name!r}"):
        client.log_text(version.run_id, evidence_bytes(evidence).decode(), _path(version))
    set_version_tag(client, version, EVIDENCE_TAG, digest_json(evidence))
    set_version_tag(client, version, VERDICT_TAG, evidence["decision"]["verdict"])


def read_evidence(client: "MlflowClient", version: RegisteredVersion) -> dict[str, Any]:
    """The evidence of a version, verified: unedited, and about this very adapter. RegistryError otherwise."""
    expected = version.tag(EVIDENCE_TAG)
    with tempfile.TemporaryDirectory(prefix="evidence-") as folder:
        with registry_errors(f"reading the evidence of version {version.version} of {version.name!r}"):
            path = Path(client.download_artifacts(version.run_id, _path(version), folder))
        data = path.read_bytes()
    try:
        evidence = json.loads(data)
        # Packs of the first schema were not written in canonical form
        found = digest_json(evidence) if evidence.get("schema_version") == 1 else digest_bytes(data)
    except (ValueError, AttributeError) as error:
        raise RegistryError(f"{_named(version)} is not JSON any more ({error}); evaluate and register again") from error
    if found != expected:
        raise RegistryError(
            f"{_named(version)} was changed after the decision (digest {found}, recorded {expected}); "
            "evaluate and register again"
        )
    _check_about(version, evidence)
    return evidence


def read_evidence_file(path: Path) -> dict[str, Any]:
    """Evidence from a file of its own, by its own digest: whole and unedited since it was written.

    Whoever can write the file can write the digest too; `read_evidence` compares with what the registry holds. Raises
    RegistryError.
    """
    try:
        data = path.read_bytes()
        evidence = json.loads(data)
    except OSError as error:
        raise RegistryError(f"no evidence at {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise RegistryError(
            f"{path} is not JSON ({error}); `qlora run` writes evidence.json at registration"
        ) from error
    if not isinstance(evidence, dict) or not {_SELF, "evaluation", "champion", "policy"} <= evidence.keys():
        raise RegistryError(f"{path} is no evidence of a promotion; `qlora run` writes evidence.json at registration")
    found = digest_json({name: value for name, value in evidence.items() if name != _SELF})
    chained = evidence.get("schema_version") != 1
    parts = changed_parts(evidence) if chained else []
    if found != evidence[_SELF] or parts or (chained and data.rstrip(b"\n") != evidence_bytes(evidence)):
        where = f", in its {' and '.join(parts)}" if parts else ""
        raise RegistryError(
            f"{path} was changed after the decision{where} (digest {found}, recorded {evidence[_SELF]}); evaluate again"
        )
    return evidence


def decide_again(evidence: Mapping[str, Any], policy: GateConfig | None = None) -> Decision:
    """The gate's decision on recorded evidence, under the recorded policy or the one given. Raises RegistryError."""
    return decide(evidence["evaluation"], evidence["champion"], policy or policy_of(evidence))


def policy_of(evidence: Mapping[str, Any]) -> GateConfig:
    """The policy recorded with the evidence. Raises RegistryError where this version does not know it."""
    try:
        return GateConfig.model_validate(evidence["policy"])
    except ValidationError as error:
        raise RegistryError(
            f"the recorded gate policy is not one this version knows: {error}; evaluate again"
        ) from error


def compared_champion(champion: Mapping[str, Any] | None) -> str | None:
    """The champion version that a comparison was made against; None where the base was."""
    version = champion.get("version") if champion is not None else None
    return None if version is None else str(version)


def champion_changed(expected: str | None, found: str | None) -> str:
    """Why a PROMOTE was not carried out: the champion is not the one the evidence speaks of."""
    compared = f"champion version {expected}" if expected else "the base, when there was no champion"
    now = f"version {found}" if found else "no version"
    return f"The comparison was made with {compared}, and {now} is champion now; evaluate again against it."


def _check_about(version: RegisteredVersion, evidence: Mapping[str, Any]) -> None:
    digests = evidence.get("digests") or {}
    bound = {"base": BASE_TAG, "data": DATA_TAG}
    other = [part for part, tag in bound.items() if digests.get(part) not in (None, version.tags.get(tag))]
    about = (evidence.get(ADAPTER_TAG), evidence.get("version"), evidence.get("model_name"))
    if about != (version.tag(ADAPTER_TAG), version.version, version.name):
        raise RegistryError(f"{_named(version)} is about another adapter; evaluate and register this one")
    if other:
        raise RegistryError(f"{_named(version)} is about other {' and '.join(other)}; evaluate and register this one")


def _named(version: RegisteredVersion) -> str:
    return f"the evidence of version {version.version} of {version.name!r}"


def _path(version: RegisteredVersion) -> str:
    return f"evidence/version-{version.version}.json"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
