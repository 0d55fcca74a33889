"""Each role's IAM policy on a server that enforces it: enough for what the role does, and for nothing beside it."""

import json
import urllib.request
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import boto3
import pytest
from moto.server import ThreadedMotoServer

from qlora_core.digest import digest_bytes
from qlora_core.errors import StoreError
from qlora_core.store.artifact import StageKey
from qlora_core.store.gc import collect
from qlora_core.store.holder import Holder
from qlora_core.store.layout import REFS, VERDICTS, blob_name, manifest_name
from qlora_core.store.lease import LeaseRecord, lease_name
from qlora_core.store.manifest import Manifest
from qlora_core.store.refs import add_pin, add_ref, remove_ref
from qlora_core.store.shelf import Shelf
from qlora_core.store.store import Store, open_store
from qlora_core.store.tag_shelf import StoreTagShelf
from qlora_core.store.verification import verify
from qlora_core.store.work import WorkArea

POLICIES = Path(__file__).parents[2] / "infra" / "iam"
BUCKET, PREFIX = "artifacts", "team"
ROLES = ("builder", "evaluator", "janitor", "promoter", "serving", "trainer")
As = Callable[[str], Store]


def key_of(stage: str, seed: int = 0) -> StageKey:
    return StageKey(stage, "1", {"seed": seed}, {})


def build(out: Path) -> None:
    (out / "weights.safetensors").write_bytes(b"some weights" * 100)


def build_what_is_new(out: Path) -> None:
    (out / "weights.safetensors").write_bytes(b"weights that nobody has stored")


def leave_dead_lease(store: Store, manifest: Manifest, state: Literal["held", "committed"]) -> None:
    """The lease of a producer that died on this machine."""
    dead = Holder.this_process().model_copy(update={"started": "1"})
    now = datetime.now(UTC)
    told = manifest if state == "committed" else None
    lease = LeaseRecord(token=9, state=state, holder=dead, nonce="n", ttl_s=60, since=now, manifest=told)
    name = lease_name(manifest.address.removeprefix("v1/"))
    found = store.backend.read(name)
    assert found is not None
    assert store.backend.replace(name, lease.to_json(), found.tag)


def policy(role: str) -> str:
    """The role's policy for the bucket of these tests."""
    return (POLICIES / f"{role}.json").read_text().replace("BUCKET", BUCKET).replace("PREFIX", PREFIX)


@pytest.fixture(scope="module")
def keys() -> Iterator[dict[str, Any]]:
    """An enforcing server's address, and an access key a role."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    access = {"aws_access_key_id": "root", "aws_secret_access_key": "root", "region_name": "us-east-1"}
    boto3.client("s3", endpoint_url=url, **access).create_bucket(Bucket=BUCKET)
    iam = boto3.client("iam", endpoint_url=url, **access)
    found: dict[str, Any] = {"url": url}
    for role in ROLES:
        iam.create_user(UserName=role)
        iam.put_user_policy(UserName=role, PolicyName=role, PolicyDocument=policy(role))
        found[role] = iam.create_access_key(UserName=role)["AccessKey"]
    before = enforce(url, "0")
    yield found
    enforce(url, before)
    server.stop()


def enforce(url: str, calls_before: str) -> str:
    """Enforce policies after so many calls; returns what it was before."""
    kind = {"Content-Type": "text/plain"}
    request = urllib.request.Request(f"{url}/moto-api/reset-auth", calls_before.encode(), kind, method="POST")
    with urllib.request.urlopen(request) as answer:  # the server of these tests, on loopback
        return str(json.load(answer)["PREVIOUS_INITIAL_NO_AUTH_ACTION_COUNT"])


@pytest.fixture
def acting(keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> As:
    """The store as a role sees it, on a machine of its own."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", keys["url"])
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")

    def act(role: str) -> Store:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", keys[role]["AccessKeyId"])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", keys[role]["SecretAccessKey"])
        return open_store(f"s3://{BUCKET}/{PREFIX}", tmp_path / role)

    return act


def test_builder_builds_checks_and_sets_corrupt_things_aside(acting: As) -> None:
    store = acting("builder")
    store.check()
    artifact, cached = store.get_or_build(key_of("quantize", 1), build)
    assert not cached
    (entry,) = artifact.manifest.files.values()
    store.backend.set_aside(f"v1/blob/{entry.sha256[:2]}/{entry.sha256}")
    artifact.path.joinpath("weights.safetensors").chmod(0o644)
    artifact.path.joinpath("weights.safetensors").write_bytes(b"flipped")
    _, cached = store.get_or_build(key_of("quantize", 1), build)
    assert not cached


def test_builder_keeps_and_replaces_tags(acting: As) -> None:
    shelf = StoreTagShelf(acting("builder").backend)
    shelf.write("f" * 64, "one.parquet", b"tags")
    assert shelf.read("f" * 64, "one.parquet") == b"tags"
    shelf.remove("f" * 64, "one.parquet")
    assert shelf.sizes("f" * 64) == {}


def test_evaluator_evaluates_and_keeps_verdicts(acting: As) -> None:
    acting("builder").get_or_build(key_of("sweep", 2), build)
    store = acting("evaluator")
    store.check()
    assert store.get(key_of("sweep", 2)) is not None
    store.get_or_build(key_of("evaluate", 2), build)
    shelf = Shelf(store.backend, VERDICTS)
    shelf.put(digest_bytes(b"asked"), {"slot": "tie"})
    assert shelf.get(digest_bytes(b"asked")) == {"slot": "tie"}


def test_trainer_reads_artifacts_and_keeps_checkpoints(acting: As, tmp_path: Path) -> None:
    acting("builder").get_or_build(key_of("quantize", 3), build)
    store = acting("trainer")
    assert store.get(key_of("quantize", 3)) is not None
    folder = tmp_path / "step-00000001"
    folder.mkdir()
    build(folder)
    name = "sweep/0123456789abcdef/t000"
    area = WorkArea(store.backend, name)
    area.save(folder, "step-00000001")
    assert area.restore(tmp_path / "back") is not None
    found = store.backend.read(f"v1/work/{name}/snapshot.json")
    assert found is not None and store.backend.replace(f"v1/work/{name}/snapshot.json", b"damaged", found.tag)
    assert area.restore(tmp_path / "again") is None
    area.clear()


def test_promoter_refers_to_what_it_registered(acting: As) -> None:
    artifact, _ = acting("builder").get_or_build(key_of("sweep", 4), build)
    add_ref(acting("promoter").backend, "model", "assistant/1", [artifact.manifest.address])


def test_serving_reads(acting: As) -> None:
    acting("builder").get_or_build(key_of("sweep", 5), build)
    assert acting("serving").get(key_of("sweep", 5)) is not None
    assert acting("serving").get(key_of("sweep", 99)) is None


def test_janitor_collects_and_pins(acting: As) -> None:
    artifact, _ = acting("builder").get_or_build(key_of("curate", 6), build)
    acting("builder").get_or_build(key_of("curate", 7), build)
    store = acting("janitor")
    store.backend.remove("v1/pin/forbidden.json")
    add_pin(store.backend, "audit", [artifact.manifest.address])
    collect(store, keep_last=0, older_than_s=0)
    assert acting("serving").get(key_of("curate", 6)) is not None
    assert acting("serving").get(key_of("curate", 7)) is None


def test_janitor_looks_at_what_it_would_collect(acting: As) -> None:
    artifact, _ = acting("builder").get_or_build(key_of("curate", 10), build)
    seen = collect(acting("janitor"), keep_last=0, older_than_s=0, dry_run=True)
    assert artifact.key in {row["key"] for row in seen.artifacts}


def test_janitor_takes_the_leases_of_the_dead(acting: As) -> None:
    artifact, _ = acting("builder").get_or_build(key_of("curate", 11), build)
    leave_dead_lease(acting("builder"), artifact.manifest, "held")
    collect(acting("janitor"), keep_last=0, older_than_s=0)
    assert acting("serving").get(key_of("curate", 11)) is None


def test_janitor_finishes_what_was_decided(acting: As) -> None:
    artifact, _ = acting("builder").get_or_build(key_of("curate", 12), build)
    name = manifest_name(artifact.manifest.address)
    acting("janitor").backend.remove(name)
    leave_dead_lease(acting("builder"), artifact.manifest, "committed")
    collect(acting("janitor"), keep_last=0, older_than_s=3600)
    assert acting("serving").get(key_of("curate", 12)) is not None


def test_janitor_collects_while_there_is_work_in_progress(acting: As, tmp_path: Path) -> None:
    artifact, _ = acting("builder").get_or_build(key_of("sweep", 13), build)
    folder = tmp_path / "step-00000001"
    folder.mkdir()
    build(folder)
    for key in (artifact.key, "0" * 64):
        name = f"sweep/{key[:16]}/t000"
        WorkArea(acting("trainer").backend, name, f"stage/sweep/{key}").save(folder, "step-00000001")
    collected = collect(acting("janitor"), keep_last=9, older_than_s=0)
    assert collected.work > 0
    assert WorkArea(acting("trainer").backend, f"sweep/{artifact.key[:16]}/t000").newest() is None


def test_janitor_repairs(acting: As) -> None:
    artifact, _ = acting("builder").get_or_build(key_of("curate", 14), build)
    (entry,) = artifact.manifest.files.values()
    acting("builder").backend.set_aside(blob_name(entry.sha256))
    acting("builder").backend.create(blob_name(entry.sha256), b"flipped")
    found = verify(acting("janitor"), repair=True)
    assert {blob_name(entry.sha256), manifest_name(artifact.manifest.address)} <= set(found.set_aside)
    again = verify(acting("janitor"))
    assert (again.broken, again.manifests, again.records) == ([], {}, {})


def test_janitor_takes_a_reference_away(acting: As) -> None:
    artifact, _ = acting("builder").get_or_build(key_of("sweep", 15), build)
    add_ref(acting("promoter").backend, "model", "assistant/15", [artifact.manifest.address])
    assert remove_ref(acting("janitor").backend, "model", "assistant/15")


FORBIDDEN: dict[str, list[Callable[[Store], object]]] = {
    "serving": [
        lambda store: store.get_or_build(key_of("curate", 8), build),
        lambda store: store.backend.create("v1/stage/curate/x/manifest.json", b"{}"),
        lambda store: store.backend.remove("v1/probe/forbidden"),
        lambda store: store.backend.read("v1/verdict/aa/x.json"),
    ],
    "trainer": [
        lambda store: store.get_or_build(key_of("sweep", 8), build),
        lambda store: store.backend.create("v1/stage/sweep/x/manifest.json", b"{}"),
        lambda store: add_ref(store.backend, "model", "assistant/8", []),
        lambda store: collect(store, keep_last=0, older_than_s=0),
    ],
    "builder": [
        lambda store: store.get_or_build(key_of("evaluate", 8), build),
        lambda store: store.backend.create(f"{REFS}/model/x.json", b"{}"),
        lambda store: Shelf(store.backend, VERDICTS).put(digest_bytes(b"x"), {}),
        lambda store: store.backend.remove("v1/pin/forbidden.json"),
    ],
    "evaluator": [
        lambda store: store.get_or_build(key_of("sweep", 8), build),
        lambda store: store.backend.create(f"{REFS}/model/x.json", b"{}"),
        lambda store: store.backend.remove("v1/pin/forbidden.json"),
    ],
    "promoter": [
        lambda store: store.get_or_build(key_of("gate", 8), build),
        lambda store: store.backend.remove("v1/probe/forbidden"),
    ],
    "janitor": [
        lambda store: store.get_or_build(key_of("curate", 9), build_what_is_new),
        lambda store: store.backend.create("v1/stage/curate/x/other.json", b"{}"),
        lambda store: store.backend.create(blob_name("0" * 64), b"{}"),
        lambda store: store.backend.create(f"{REFS}/model/x.json", b"{}"),
        lambda store: store.backend.create("v1/work/x/snapshot.json", b"{}"),
        lambda store: Shelf(store.backend, VERDICTS).put(digest_bytes(b"x"), {}),
    ],
}


@pytest.mark.parametrize(("role", "number"), [(role, n) for role in ROLES for n in range(len(FORBIDDEN[role]))])
def test_role_may_do_nothing_beside_its_work(acting: As, role: str, number: int) -> None:
    acting("builder").backend.create("v1/probe/forbidden", b"here")
    acting("janitor").backend.create("v1/pin/forbidden.json", b"here")
    with pytest.raises(StoreError, match=r"refuses bucket .* \((AccessDenied|403)\)"):
        FORBIDDEN[role][number](acting(role))


@pytest.mark.parametrize("role", [*ROLES, "kms"])
def test_policy_names_calls_one_by_one_and_nothing_outside_the_store(role: str) -> None:
    document = json.loads((POLICIES / f"{role}.json").read_text())
    assert document["Version"] == "2012-10-17"
    for statement in document["Statement"]:
        assert statement["Effect"] == "Allow"
        assert not any("*" in action for action in statement["Action"])
        assert "s3:DeleteObjectVersion" not in statement["Action"]
        for resource in statement["Resource"]:
            inside = resource.startswith("arn:aws:s3:::BUCKET/PREFIX/v1/")
            assert inside or resource in ("arn:aws:s3:::BUCKET", "KMS_KEY_ARN")
