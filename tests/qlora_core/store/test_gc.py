"""Garbage collection keeps what something keeps, and nothing else: each root with its negative control."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from qlora_core.errors import LeaseLostError, StoreError
from qlora_core.store.artifact import StageKey
from qlora_core.store.contents import seal
from qlora_core.store.gc import GcReport, collect
from qlora_core.store.holder import Holder
from qlora_core.store.layout import BLOBS, blob_name, manifest_name
from qlora_core.store.lease import finish, lease_name, parse_lease
from qlora_core.store.local import LocalFolder
from qlora_core.store.manifest import Manifest, new_manifest
from qlora_core.store.refs import add_pin, add_ref, remove_pin, remove_ref
from qlora_core.store.store import GC_LEASE, Store, open_store
from qlora_core.store.sweep import Sweep
from qlora_core.store.work import WorkArea

HOUR = 3600.0
Files = dict[str, str]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(LocalFolder(tmp_path / "store"))


def publish(store: Store, stage: str, name: str, inputs: Files | None = None, shared: str = "shared") -> Manifest:
    """An artifact as another machine makes it: no folder of it is in use here."""
    with store.backend.staging() as folder:
        (folder / "result.json").write_text(f"{stage} {name}")
        (folder / "shared.json").write_text(shared)
        files = seal(folder)
        manifest = new_manifest(stage, "1", {"name": name}, inputs or {}, files)
        store.backend.send(folder, files, BLOBS)
    finish(store.backend, manifest)
    return manifest


def sweep_all(
    store: Store, keep_last: int = 0, older_than_s: float = 0, dry_run: bool = False, drop_work: float | None = None
) -> GcReport:
    return collect(
        store, keep_last=keep_last, older_than_s=older_than_s, drop_work_older_than_s=drop_work, dry_run=dry_run
    )


def is_whole(store: Store, manifest: Manifest) -> bool:
    if store.manifest_at(manifest.address) is None:
        return False
    assert [store.backend.blob_fault(entry, BLOBS) for entry in manifest.files.values()] == [None] * len(manifest.files)
    return True


def names(store: Store) -> list[str]:
    return [listed.name for listed in store.backend.list("v1/") if not listed.name.startswith(("v1/lock/", "v1/tmp/"))]


def test_what_nothing_keeps_goes_with_all_its_blobs(store: Store) -> None:
    made = publish(store, "sweep", "a")
    report = sweep_all(store)
    assert [row["key"] for row in report.artifacts] == [made.key]
    assert (report.blobs, report.freed_bytes, report.kept) == (2, made.size_bytes, 0)
    assert names(store) == [lease_name(GC_LEASE)]


def test_blob_of_an_artifact_that_stays_stays(store: Store) -> None:
    kept, other = publish(store, "sweep", "kept"), publish(store, "sweep", "other")
    add_pin(store.backend, "keep", [kept.address])
    assert sweep_all(store).blobs == 1
    assert is_whole(store, kept)
    assert not is_whole(store, other)


def pinned(store: Store, manifest: Manifest) -> Iterator[None]:
    add_pin(store.backend, "keep", [manifest.address])
    yield
    remove_pin(store.backend, "keep")


def referred_to(store: Store, manifest: Manifest) -> Iterator[None]:
    add_ref(store.backend, "model", "assistant/1", [manifest.address])
    yield
    remove_ref(store.backend, "model", "assistant/1")


def taken_as_an_input(store: Store, manifest: Manifest) -> Iterator[None]:
    with store.leases.attempt(f"stage/evaluate/{'e' * 64}", {"sweep": manifest.digest}):
        yield


def being_built_again(store: Store, manifest: Manifest) -> Iterator[None]:
    with store.leases.attempt(manifest.address.removeprefix("v1/")):
        yield


def about_to_be_published_from(store: Store, manifest: Manifest) -> Iterator[None]:
    files = manifest.files
    follower = new_manifest("evaluate", "1", {}, {"sweep": manifest.digest}, files)
    with store.leases.attempt(follower.address.removeprefix("v1/")) as lease:
        assert lease is not None
        lease.intend(follower)
        yield


def worked_on(store: Store, manifest: Manifest) -> Iterator[None]:
    lease = f"stage/evaluate/{'f' * 64}"
    with store.backend.staging() as folder:
        (folder / "state.json").write_text("half")
        area = WorkArea(store.backend, "evaluate/t0", lease, {"sweep": manifest.digest})
        area.save(folder, "step-3")
    yield
    area.clear()


def read_here(store: Store, manifest: Manifest) -> Iterator[None]:
    reader = subprocess.Popen(
        [sys.executable, "-c", READER, store.location, manifest.address], stdout=subprocess.PIPE, stdin=subprocess.PIPE
    )
    assert reader.stdout is not None
    assert reader.stdout.readline()
    yield
    reader.communicate()


READER = """
import sys
from pathlib import Path
from qlora_core.store.store import open_store
artifact = open_store(sys.argv[1], Path("unused")).get_at(sys.argv[2])
print(artifact.path, flush=True)
sys.stdin.read()
"""
ROOTS = [pinned, referred_to, taken_as_an_input, being_built_again, about_to_be_published_from, worked_on, read_here]


@pytest.mark.parametrize("root", ROOTS, ids=lambda root: root.__name__)
def test_root_keeps_an_artifact_and_what_it_was_made_from(
    store: Store, root: Callable[[Store, Manifest], Iterator[None]]
) -> None:
    source = publish(store, "curate", "source")
    middle = publish(store, "quantize", "middle", {"curate": source.digest})
    kept = publish(store, "sweep", "kept", {"quantize": middle.digest, "base": "b" * 64})
    holding: AbstractContextManager[None] = contextmanager(root)(store, kept)
    with holding:
        assert sweep_all(store).artifacts == ()
        assert all(is_whole(store, each) for each in (source, middle, kept))
    # Negative control: without the root all of it goes.
    assert len(sweep_all(store).artifacts) == 3
    assert names(store) == [lease_name(GC_LEASE)]


def test_newest_of_each_stage_stay(store: Store) -> None:
    made = [publish(store, stage, str(n)) for n in range(3) for stage in ("curate", "sweep")]
    assert len(sweep_all(store, keep_last=2).artifacts) == 2
    assert [is_whole(store, each) for each in made] == [False, False, True, True, True, True]


def test_young_artifacts_and_blobs_stay(store: Store) -> None:
    made = publish(store, "sweep", "a")
    orphan = publish(store, "sweep", "b", shared="of b alone")
    store.backend.remove(manifest_name(orphan.address))
    report = sweep_all(store, older_than_s=HOUR)
    assert (report.artifacts, report.blobs, report.young_blobs) == ((), 0, 2)
    assert is_whole(store, made)
    assert sweep_all(store).blobs == 4


def test_blobs_of_a_publication_under_way_stay_without_a_manifest(store: Store) -> None:
    made = publish(store, "sweep", "a")
    with store.leases.attempt(made.address.removeprefix("v1/")) as lease:
        assert lease is not None
        lease.intend(made)
        store.backend.remove(manifest_name(made.address))
        assert sweep_all(store).blobs == 0
        lease.commit()
        finish(store.backend, made)
    assert is_whole(store, made)


def test_decided_publication_of_a_dead_producer_is_carried_out(store: Store) -> None:
    made = publish(store, "sweep", "a")
    store.backend.remove(manifest_name(made.address))
    leave_dead_lease(store, made, state="committed")
    assert sweep_all(store, older_than_s=HOUR, dry_run=True).kept == 1
    assert sweep_all(store, older_than_s=HOUR).kept == 1
    assert is_whole(store, made)


DEAD = """
import os, signal, sys
from pathlib import Path
from qlora_core.store.manifest import Manifest
from qlora_core.store.store import open_store
store = open_store(sys.argv[1], Path("unused"))
manifest = Manifest.model_validate_json(sys.argv[2])
with store.leases.attempt(manifest.address.removeprefix("v1/")) as lease:
    lease.intend(manifest)
    if sys.argv[3] == "committed":
        lease.commit()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def leave_dead_lease(store: Store, manifest: Manifest, state: str) -> None:
    command = [sys.executable, "-c", DEAD, store.location, manifest.model_dump_json(), state]
    assert subprocess.run(command).returncode == -9


def test_dead_producer_keeps_nothing(store: Store) -> None:
    made = publish(store, "sweep", "a")
    leave_dead_lease(store, made, state="publishing")
    assert len(sweep_all(store).artifacts) == 1
    assert names(store) == [lease_name(GC_LEASE)]


def test_lease_that_the_collector_gave_up_on_cannot_commit(store: Store) -> None:
    made = publish(store, "sweep", "a")
    other = Store(store.backend, lease_ttl_s=0.05)
    with other.leases.attempt(made.address.removeprefix("v1/")) as lease:
        assert lease is not None
        lease.intend(made)
        lease._ended.set()  # its heartbeat stops, as in a process that is stopped
        time.sleep(0.2)
        assert len(sweep_all(store).artifacts) == 1
        with pytest.raises(LeaseLostError):
            lease.commit()


def leave_lease_elsewhere(store: Store, name: str, digest: str) -> Path:
    """A lease whose holder is on another machine, as a file that can be aged."""
    here = Holder.this_process()
    with store.leases.attempt(name, {"input": digest}):
        record = store.backend.read(lease_name(name))
        assert record is not None
        lease = parse_lease(record, name).model_copy(update={"holder": here.model_copy(update={"host": "elsewhere"})})
    free = store.backend.read(lease_name(name))
    assert free is not None
    store.backend.replace(lease_name(name), lease.to_json(), free.tag)
    return Path(store.location) / lease_name(name)


def test_producer_elsewhere_is_believed_until_its_lease_has_aged(store: Store) -> None:
    made = publish(store, "sweep", "a")
    lease = leave_lease_elsewhere(store, f"stage/evaluate/{'e' * 64}", made.digest)
    _age(lease, 100)
    assert sweep_all(store).kept == 1
    _age(lease, 200)
    assert len(sweep_all(store, dry_run=True).artifacts) == 1
    assert len(sweep_all(store).artifacts) == 1
    assert names(store) == [lease_name(GC_LEASE)]


def test_collector_that_died_elsewhere_is_replaced_once_its_lease_has_aged(store: Store) -> None:
    publish(store, "sweep", "a")
    lease = leave_lease_elsewhere(store, GC_LEASE, "none")
    with pytest.raises(StoreError, match="being collected already"):
        sweep_all(store)
    _age(lease, 200)
    assert len(sweep_all(store).artifacts) == 1


def test_dry_run_says_the_same_and_changes_nothing(store: Store) -> None:
    kept = publish(store, "sweep", "kept")
    for number in range(3):
        publish(store, "curate", str(number), shared=str(number))
    add_pin(store.backend, "keep", [kept.address])
    with store.leases.attempt(f"stage/sweep/{'0' * 64}"):
        pass
    store.backend.set_aside(blob_name(kept.files["shared.json"].sha256))
    before = {name: store.backend.read(name) for name in names(store)}
    expected = sweep_all(store, keep_last=1, dry_run=True)
    assert {name: store.backend.read(name) for name in names(store)} == before
    done = sweep_all(store, keep_last=1)
    assert {**done.to_json(), "dry_run": True} == expected.to_json()
    assert (len(done.artifacts), done.blobs, done.leases, done.leftovers) == (2, 4, 1, 1)


def test_unfinished_work_goes_only_where_an_age_is_given_for_it_and_then_whole(store: Store) -> None:
    lease = f"stage/sweep/{'5' * 64}"
    with store.backend.staging() as folder:
        (folder / "state.json").write_text("half")
        WorkArea(store.backend, "sweep/key/t0", lease).save(folder, "step-3")
    before = names(store)
    for name in before:
        _age(Path(store.location) / name, 1000 * HOUR)
    # Unfinished, and nobody at it: it may be taken up again, after whatever time.
    assert sweep_all(store).work == 0
    assert sweep_all(store, drop_work=1001 * HOUR).work == 0
    with store.leases.attempt(lease):
        assert sweep_all(store, drop_work=0).work == 0
    assert set(before) <= set(names(store))
    assert sweep_all(store, drop_work=999 * HOUR, dry_run=True).work == 1
    assert sweep_all(store, drop_work=999 * HOUR).work == 1
    assert names(store) == [lease_name(GC_LEASE)]


def test_work_of_an_artifact_that_is_there_goes_however_young(store: Store) -> None:
    made = publish(store, "sweep", "a")
    with store.backend.staging() as folder:
        (folder / "state.json").write_text("half")
        WorkArea(store.backend, "sweep/t0", made.address.removeprefix("v1/")).save(folder, "step-3")
    report = sweep_all(store, older_than_s=HOUR)
    assert (report.work, report.kept) == (1, 1)


UNREADABLE = [
    f"v1/lease/stage/sweep/{'1' * 64}.json",
    "v1/pin/keep.json",
    f"v1/ref/model/{'2' * 64}.json",
    "v1/work/sweep/t0/snapshot.json",
    f"v1/stage/sweep/{'3' * 64}/manifest.json",
]


REPAIR = "`qlora store verify --repair` moves"
REMEDIES = {"lease": REPAIR, "work": REPAIR, "stage": REPAIR, "pin": "`qlora store unpin keep`", "ref": "from a backup"}


@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize("name", UNREADABLE)
def test_record_that_cannot_be_read_stops_it_before_anything_goes(store: Store, name: str, dry_run: bool) -> None:
    publish(store, "sweep", "a")
    store.backend.create(name, b'{"schema_version": 2}')
    before = names(store)
    with pytest.raises(StoreError, match=f"{name}(?s:.)*Nothing is collected(?s:.)*{REMEDIES[name.split('/')[1]]}"):
        sweep_all(store, dry_run=dry_run)
    assert set(names(store)) - {lease_name(GC_LEASE)} == set(before)
    store.backend.remove(name)
    assert len(sweep_all(store).artifacts) == 1


def test_snapshot_that_names_a_lease_outside_the_store_stops_it(store: Store) -> None:
    with store.backend.staging() as folder:
        (folder / "state.json").write_text("half")
        WorkArea(store.backend, "sweep/t0", "../../../escaped").save(folder, "step-3")
    with pytest.raises(StoreError, match="outside the store"):
        sweep_all(store)


def test_second_collector_is_told_that_one_is_at_work(store: Store) -> None:
    with store.leases.attempt(GC_LEASE), pytest.raises(StoreError, match="being collected already"):
        sweep_all(store)


def test_producer_waits_while_garbage_is_collected(store: Store) -> None:
    key = StageKey("sweep", "1", {}, {})
    done = threading.Event()

    def produce() -> None:
        open_store(store.location, Path("unused")).get_or_build(key, lambda out: _write(out / "result.json"))
        done.set()

    with store.leases.attempt(GC_LEASE):
        producer = threading.Thread(target=produce)
        producer.start()
        assert not done.wait(0.4)
        assert store.manifest_at(key.address) is None
    assert done.wait(10)
    assert store.manifest_at(key.address) is not None


def _write(file: Path) -> None:
    file.write_text("{}")


def test_collector_that_was_taken_for_dead_stops(store: Store) -> None:
    made = publish(store, "sweep", "a")
    record_name = manifest_name(made.address)
    with Store(store.backend, lease_ttl_s=0.05).leases.attempt(GC_LEASE) as lease:
        assert lease is not None
        lease._ended.set()
        time.sleep(0.1)
        # A producer has watched the lease for longer than it lives, and goes on.
        watching = threading.Thread(target=store.leases.wait_while_held, args=(GC_LEASE, "a test"))
        watching.start()
        watching.join(10)
        with pytest.raises(LeaseLostError):
            Sweep(store, lease).remove({record_name: None})
    assert is_whole(store, made)


def test_folders_of_links_go_with_their_artifacts(store: Store) -> None:
    made = publish(store, "sweep", "a")
    folder = store.backend.pool.views / made.digest
    with contextmanager(read_here)(store, made):
        assert sweep_all(store).views == 0
        assert folder.is_dir()
    assert sweep_all(store).views == 1
    assert not folder.exists()


def test_staging_of_the_dead_goes_and_of_the_living_stays(store: Store, tmp_path: Path) -> None:
    left = tmp_path / "store" / "v1" / "tmp" / "elsewhere-7-abc"
    with store.backend.staging() as mine:
        (left / "deep").mkdir(parents=True)
        left.with_name(f"{left.name}.lock").touch()
        assert sweep_all(store).leftovers == 0
        assert mine.is_dir()
        assert left.is_dir()
        for path in (left / "deep", left, left.with_name(f"{left.name}.lock")):
            _age(path, 8 * 24 * HOUR)
        assert sweep_all(store).leftovers == 1
        assert mine.is_dir()
    assert not left.exists()


def _age(path: Path, by_s: float) -> None:
    os.utime(path, (time.time() - by_s, time.time() - by_s))


@pytest.mark.parametrize("dry_run", [True, False])
def test_artifact_that_is_kept_and_gone_is_told(store: Store, dry_run: bool, caplog: pytest.LogCaptureFixture) -> None:
    made, there = publish(store, "sweep", "a"), publish(store, "sweep", "b")
    add_pin(store.backend, "keep", [made.address, there.address])
    add_ref(store.backend, "model", "assistant/1", [made.address])
    assert sweep_all(store, dry_run=dry_run).missing == ()
    store.backend.remove(manifest_name(made.address))
    report = sweep_all(store, dry_run=dry_run)
    (told,) = report.missing
    assert made.address in told
    assert "pin keep, model assistant/1" in told
    assert told in caplog.text
    assert report.to_json()["missing"] == [told]
    assert is_whole(store, there)
