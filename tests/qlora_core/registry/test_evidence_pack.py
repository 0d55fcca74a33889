"""The evidence pack: every flipped field is noticed, another adapter's pack refused; its digests are of its parts."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from qlora_core.digest import canonical_json, digest_bytes, digest_json
from qlora_core.errors import RegistryError
from qlora_core.registry.aliases import alias_version
from qlora_core.registry.evidence import (
    EVIDENCE_TAG,
    decide_again,
    evidence_bytes,
    read_evidence,
    read_evidence_file,
    write_evidence,
)
from qlora_core.registry.evidence_digests import changed_parts, code_version
from qlora_core.registry.promotion import promote
from qlora_core.registry.versions import RegisteredVersion, get_version

Place = tuple[str | int, ...]
ITEMS = {
    "rows": {"id": ["r1", "r2"], "category": ["qa", None], "tokens": [3, 4], "before": [6.0, 8.0], "after": [4.5, 6.0]},
    "prompts": {"id": ["r1"], "before": {"words": [4]}, "after": {"words": [5]}, "judge": [0.5], "human": [None]},
}
JUDGE = {"kind": "openai", "model": "m", "fingerprint": "f" * 64, "snapshot": "s", "certificate": None}


@pytest.fixture
def version(register: Callable[..., RegisteredVersion], better: dict[str, Any]) -> RegisteredVersion:
    better["metrics"]["judge"] = JUDGE
    return register(1, {**better, "items": ITEMS, "prompts_digest": "e" * 64})


@pytest.fixture
def pack(version: RegisteredVersion, client: MlflowClient) -> dict[str, Any]:
    return read_evidence(client, version)


def leaves(value: Any, place: Place = ()) -> Iterator[tuple[Place, Any]]:
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if not children:
        yield place, value
        return
    for key, child in children:
        yield from leaves(child, (*place, key))


def flipped(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return (
        "changed" if value is None or not isinstance(value, str) else value[:-1] + ("0" if value[-1:] != "0" else "1")
    )


def with_change(pack: dict[str, Any], place: Place, value: Any) -> dict[str, Any]:
    copy = json.loads(json.dumps(pack))
    inner = copy
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return copy


def test_the_pack_names_policy_data_base_adapter_judge_prompts_items_and_code(
    pack: dict[str, Any], version: RegisteredVersion
) -> None:
    digests = pack["digests"]
    assert digests["policy"] == digest_json(pack["policy"])
    assert digests["items"] == digest_json({"base": ITEMS, "champion": None})
    assert digests["judge"] == digest_json(JUDGE)
    assert digests["data"] == version.tags["data_digest"] and digests["base"] == version.tags["quantized_base_digest"]
    assert digests["adapter"] == version.tags["adapter_sha256"] and digests["prompts"] == "e" * 64
    assert pack["code"] == code_version() and digests["code"] == code_version()["source_sha256"]
    assert len(code_version()["source_sha256"]) == 64


def test_the_file_is_canonical_and_its_sha256_is_the_versions_tag(
    pack: dict[str, Any], version: RegisteredVersion, client: MlflowClient, tmp_path: Path
) -> None:
    file = Path(client.download_artifacts(version.run_id, "evidence/version-1.json", str(tmp_path)))
    assert file.read_bytes() == canonical_json(pack) == evidence_bytes(pack)
    assert digest_bytes(file.read_bytes()) == version.tag(EVIDENCE_TAG)


def test_every_flipped_field_is_noticed_even_with_the_digest_over_all_made_anew(
    pack: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "evidence.json"
    path.write_bytes(evidence_bytes(pack))
    assert read_evidence_file(path) == pack  # the control
    places = list(leaves(pack))
    assert len(places) > 60
    for place, value in places:
        changed = with_change(pack, place, flipped(value))
        path.write_bytes(evidence_bytes(changed))
        with pytest.raises(RegistryError):
            read_evidence_file(path)
        rest = {key: each for key, each in changed.items() if key != "sha256"}
        inside = place[0] in ("policy", "evaluation", "champion", "decision")
        if inside:  # what its own digest covers: a digest over all made anew does not help
            path.write_bytes(evidence_bytes({**rest, "sha256": digest_json(rest)}))
            with pytest.raises(RegistryError, match=f"in its .*{place[0]}"):
                read_evidence_file(path)


def test_added_removed_and_reformatted_content_is_noticed(pack: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "evidence.json"
    whole = evidence_bytes(pack)
    for data in (
        evidence_bytes({**pack, "note": "added"}),
        evidence_bytes({key: value for key, value in pack.items() if key != "decision"}),
        json.dumps(pack, indent=1).encode(),
        whole.replace(
            b'{"adapter_sha256"', b'{"adapter_sha256":"0","adapter_sha256"', 1
        ),  # the last of two keys counts
    ):
        assert data != whole
        path.write_bytes(data)
        with pytest.raises(RegistryError):
            read_evidence_file(path)


def test_every_flipped_field_is_refused_by_the_registry_though_all_digests_were_made_anew(
    pack: dict[str, Any], version: RegisteredVersion, client: MlflowClient, tracking_uri: str, tmp_path: Path
) -> None:
    """A forger with the pack's own code, but without the version's tags."""
    from qlora_core.registry.evidence_digests import part_digests

    for place in [("evaluation", "metrics", "heldout", "gain"), ("policy", "min_rows"), ("evaluation", "items")]:
        changed = with_change(pack, place, 7)
        changed["evaluation"] = {**changed["evaluation"], "items": pack["evaluation"]["items"]}
        changed["digests"] |= part_digests(changed)
        rest = {key: value for key, value in changed.items() if key != "sha256"}
        client.log_text(version.run_id, json.dumps({**rest, "sha256": digest_json(rest)}), "evidence/version-1.json")
        with pytest.raises(RegistryError, match="was changed after the decision"):
            promote(tracking_uri, version.name, version="1")
        with pytest.raises(RegistryError, match="was changed after the decision"):
            promote(tracking_uri, version.name, version="1", force_reason="no excuse")
    assert alias_version(client, version.name, "champion") is None


def test_evidence_of_another_adapter_is_refused(
    register: Callable[..., RegisteredVersion],
    better: dict[str, Any],
    client: MlflowClient,
    tracking_uri: str,
    model_name: str,
) -> None:
    first, second = register(1, better), register(2, better)
    evidence = read_evidence(client, first)
    write_evidence(client, second, evidence)  # whole, sound, with its tag: but about version 1
    with pytest.raises(RegistryError, match="is about another adapter"):
        promote(tracking_uri, model_name, version="2")
    relabelled = {key: value for key, value in evidence.items() if key != "sha256"} | {
        "version": "2",
        "adapter_sha256": second.tag("adapter_sha256"),
    }
    relabelled["digests"] = {**evidence["digests"], "data": "0" * 64}
    write_evidence(client, second, {**relabelled, "sha256": digest_json(relabelled)})
    with pytest.raises(RegistryError, match="is about other data"):
        promote(tracking_uri, model_name, version="2")
    assert alias_version(client, model_name, "champion") is None


def test_a_pack_of_the_first_schema_is_still_decided_on(pack: dict[str, Any], tmp_path: Path) -> None:
    old = {key: value for key, value in pack.items() if key not in ("sha256", "digests", "code")} | {
        "schema_version": 1
    }
    path = tmp_path / "evidence.json"
    path.write_text(json.dumps({**old, "sha256": digest_json(old)}, indent=1))
    assert decide_again(read_evidence_file(path)).verdict == "PROMOTE"
    path.write_text(json.dumps({**old, "version": "9", "sha256": digest_json(old)}))
    with pytest.raises(RegistryError, match="was changed"):
        read_evidence_file(path)


def test_changed_parts_are_named(pack: dict[str, Any], client: MlflowClient, version: RegisteredVersion) -> None:
    assert changed_parts(pack) == []
    assert changed_parts(with_change(pack, ("policy", "min_rows"), 2)) == ["policy"]
    items = with_change(pack, ("evaluation", "items", "rows", "after", 0), 0.0)
    assert changed_parts(items) == ["evaluation", "items"]
    assert changed_parts(with_change(pack, ("evaluation", "metrics", "judge", "fingerprint"), "g")) == [
        "evaluation",
        "judge",
    ]
    assert get_version(client, version.name, "1").tag("verdict") == pack["decision"]["verdict"]
