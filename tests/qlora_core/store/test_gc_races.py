"""Collections that die at every deletion, and collections beside producers and readers, in processes of their own."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qlora_core.store.contents import seal
from qlora_core.store.layout import BLOBS
from qlora_core.store.lease import finish
from qlora_core.store.local import LocalFolder
from qlora_core.store.manifest import Manifest, new_manifest
from qlora_core.store.refs import add_pin
from qlora_core.store.store import Store
from qlora_core.store.work import WorkArea


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(LocalFolder(tmp_path / "store"))


# Every collection runs in a fork of its own: the n-th kills itself after its n-th deletion, then another one finishes.
KILLED = """
import json, os, shutil, signal, sys
from pathlib import Path
from qlora_core.store.gc import collect
from qlora_core.store.local import LocalFolder
from qlora_core.store.store import Store

class Mortal(LocalFolder):
    left = -1
    def remove(self, name, tag=None):
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= 1
        return super().remove(name, tag)

def in_fork(work):
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    return os.waitpid(child, 0)[1]

def collected(root, left):
    store = Store(Mortal(root))
    store.backend.left = left
    collect(store, keep_last=1, older_than_s=0, drop_work_older_than_s=0)

def content(root):
    left_out = ("lock", "tmp", "lease")
    files = (path for path in root.rglob("*") if path.is_file() and path.relative_to(root).parts[1] not in left_out)
    found = {str(path.relative_to(root)): path.stat().st_size for path in files}
    return {**found, "leases": sorted(path.name for path in (root / "v1/lease/stage").rglob("*.json"))}

source, scratch = Path(sys.argv[1]), Path(sys.argv[2])
whole = scratch / "whole"
shutil.copytree(source, whole)
assert in_fork(lambda: collected(whole, -1)) == 0
deaths, differing = 0, []
while True:
    root = scratch / str(deaths)
    shutil.copytree(source, root)
    if in_fork(lambda: collected(root, deaths)) == 0:
        break
    assert in_fork(lambda: collected(root, -1)) == 0
    if content(root) != content(whole):
        differing.append(deaths)
    deaths += 1
print(json.dumps({"deaths": deaths, "differing": differing, "before": content(source), "after": content(whole)}))
"""


def publish(store: Store, stage: str, name: str, inputs: dict[str, str], shared: str) -> Manifest:
    with store.backend.staging() as folder:
        (folder / "result.json").write_text(f"{stage} {name}")
        (folder / "shared.json").write_text(shared)
        files = seal(folder)
        manifest = new_manifest(stage, "1", {"name": name}, inputs, files)
        store.backend.send(folder, files, BLOBS)
    finish(store.backend, manifest)
    return manifest


def test_collection_killed_at_any_deletion_is_finished_by_the_next(store: Store, tmp_path: Path) -> None:
    rows = [publish(store, "curate", str(n), {}, shared=f"{n % 2}") for n in range(3)]
    swept = [publish(store, "sweep", str(n), {"curate": rows[n].digest}, shared="all") for n in range(3)]
    add_pin(store.backend, "keep", [swept[0].address])
    for made in swept:
        with store.leases.attempt(made.address.removeprefix("v1/")):
            pass
    with store.backend.staging() as folder:
        (folder / "state.json").write_text("half")
        WorkArea(store.backend, "sweep/t0", f"stage/sweep/{'5' * 64}").save(folder, "step-1")
    # Without its snapshot, what is young may be somebody's first one on its way.
    for file in (tmp_path / "store" / "v1" / "work").rglob("*"):
        os.utime(file, (time.time() - 7200, time.time() - 7200))
    store.backend.create("v1/quarantine/stage/sweep/x/manifest.json-1234", b"{}")
    command = [sys.executable, "-c", KILLED, str(tmp_path / "store"), str(tmp_path / "scratch")]
    told = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    # Two of six artifacts and what is theirs alone, a lease, a snapshot, the quarantine.
    assert told["deaths"] >= 8
    assert told["differing"] == []
    kept = Store(LocalFolder(tmp_path / "scratch" / "0"))
    for made in (rows[0], rows[2], swept[0], swept[2]):
        assert kept.get_at(made.address) is not None
    assert kept.get_at(swept[1].address) is None
    assert len(told["after"]) < len(told["before"])


RACERS = """
import json, logging, os, random, sys, time
from pathlib import Path
from qlora_core.digest import digest_file
from qlora_core.errors import StoreError
from qlora_core.store.artifact import StageKey
from qlora_core.store.gc import collect
from qlora_core.store.store import open_store

url, role, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
deadline, counts = time.monotonic() + seconds, {"built": 0, "read": 0, "broken": 0, "collected": 0, "removed": 0}

class Corruption(logging.Handler):
    def emit(self, record):
        if "corrupt" in record.getMessage():
            counts["broken"] += 1
            sys.stderr.write(record.getMessage() + chr(10))

logging.getLogger("qlora_core").addHandler(Corruption())

def build(folder):
    for n in range(4):
        (folder / f"{n}.json").write_text(f"shared by all {n}")
    (folder / "own.json").write_text(key.key)

while time.monotonic() < deadline:
    if role == "collect":
        try:
            report = collect(open_store(url, Path("unused")), keep_last=0, older_than_s=0)
        except StoreError as busy:
            assert "being collected already" in str(busy), busy
        else:
            counts["collected"] += 1
            counts["removed"] += len(report.artifacts)
        continue
    key = StageKey("sweep", "1", {"n": random.randrange(3)}, {})
    reader, writer = os.pipe()
    child = os.fork()  # what a process was given stays as long as it lives
    if child == 0:
        artifact, was_there = open_store(url, Path("unused")).get_or_build(key, build)
        entries = artifact.manifest.files.items()
        whole = all(digest_file(artifact.path / path) == entry.sha256 for path, entry in entries)
        counts["read" if was_there else "built"] += 1
        counts["broken"] += not whole
        os.write(writer, json.dumps(counts).encode())
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as told:
        counts.update(json.loads(told.read() or '{"broken": 1}'))
    if os.waitpid(child, 0)[1] or counts["broken"]:
        sys.exit("broken")
print(json.dumps(counts))
"""


NOBODY_WAITS = """
from qlora_core.store.lease import Leases
Leases.wait_while_held = lambda *_: None
"""


def race(store: Store, script: str, seconds: float) -> list["subprocess.Popen[str]"]:
    """Three producers, and a collector last."""
    roles = ["build", "build", "build", "collect"]
    commands = [[sys.executable, "-c", script, store.location, role, str(seconds)] for role in roles]
    pipe = subprocess.PIPE
    return [subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) for command in commands]


def test_producers_beside_collections_always_get_whole_artifacts(store: Store) -> None:
    racers = race(store, RACERS, 3)
    told = [racer.communicate(timeout=60) for racer in racers]
    assert [racer.returncode for racer in racers] == [0] * len(racers), told
    counts = [json.loads(out) for out, _ in told]
    total = {name: sum(each[name] for each in counts) for name in counts[0]}
    assert total["broken"] == 0
    # That there was a race at all: things were built again because they had been collected.
    assert total["built"] > 3
    assert total["removed"] > 0


def test_negative_control_producers_that_do_not_wait_get_broken_ones(store: Store) -> None:
    racers = race(store, NOBODY_WAITS + RACERS, 30)
    while all(racer.poll() is None for racer in racers):
        time.sleep(0.1)
    ended = [racer.returncode for racer in racers]
    for racer in racers:
        racer.kill()
        racer.communicate()
    assert 1 in ended[:-1]
