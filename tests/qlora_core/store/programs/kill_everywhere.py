"""`python kill_everywhere.py ROOT`: kill -9 a process before each thing it does to the disk, and look what is left.

Each round is a process that is killed at one boundary more than the one before, until one comes to its end. Another
series lets the kernel kill it in the middle of a write, when a file grows beyond so many bytes. Prints JSON.
"""

import itertools
import json
import os
import resource
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from forks import fork, kill, status_of
from samples import builder_of, fault_of, files_of, key_of, lease_state, left_over, opened

from qlora_core.store.layout import blob_name

NEIGHBOUR, SUBJECT = 1, 2
RECORD = "v1/pin/best.json"
OLD, NEW = b"old " * 100, b"new " * 200
CHANGES = {"os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.utime", "shutil.rmtree"}
# These are no audit events: they are seen as calls.
WRITES = {"write", "flush", "fsync"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass
class Report:
    """What a series of kills showed."""

    boundaries: int = 0
    states: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0
    faults: list[str] = field(default_factory=list)


def kill_at(boundary: int) -> None:
    """From now on this process counts what it does to the disk, and is killed before the `boundary`th thing."""
    counted = itertools.count(1)
    counting = threading.Lock()

    def count() -> None:
        with counting:
            if next(counted) == boundary:
                kill(os.getpid())

    def on_event(event: str, arguments: tuple[Any, ...]) -> None:
        if event in CHANGES or (event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING):
            count()

    def on_call(_frame: FrameType, event: str, function: Any) -> None:
        if event == "c_call" and function.__name__ in WRITES:
            count()

    sys.addaudithook(on_event)
    threading.setprofile(on_call)
    sys.setprofile(on_call)


def kill_beyond(size_bytes: int) -> None:
    """From now on this process is killed by the kernel when a file of its grows beyond so many bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, size_bytes))


class Build:
    """A first build beside an artifact that shares a blob with it."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files

    def prepare(self, root: Path) -> None:
        """What was there before."""
        opened(root).get_or_build(key_of(NEIGHBOUR), builder_of(files_of(NEIGHBOUR)))

    def act(self, root: Path) -> None:
        """What is killed."""
        opened(root).get_or_build(key_of(SUBJECT), builder_of(self.files))

    def faults(self, root: Path, report: Report) -> Iterator[str]:
        """What is wrong afterwards."""
        state = lease_state(root, key_of(SUBJECT))
        report.states[state] += 1
        store = opened(root)
        if left := left_over(root, "tmp"):
            yield f"left in tmp: {left}"
        found = store.get(key_of(SUBJECT))
        if fault := fault_of(found, self.files):
            yield f"a reader was given something else: {fault}"
        yield from self.faults_of_the_next(root, report, must_be_there=state == "committed" or found is not None)
        if fault := fault_of(opened(root).get(key_of(NEIGHBOUR)), files_of(NEIGHBOUR)):
            yield f"the neighbour: {fault}"
        if opened(root).get(key_of(NEIGHBOUR)) is None:
            yield "the neighbour is gone"
        if left := left_over(root, "tmp"):
            yield f"the next one left in tmp: {left}"
        yield from self.faults_of_quarantine(root)

    def faults_of_the_next(self, root: Path, report: Report, *, must_be_there: bool) -> Iterator[str]:
        """Whether another producer succeeds at once."""
        started = time.monotonic()
        artifact, cached = opened(root).get_or_build(key_of(SUBJECT), builder_of(self.files))
        report.slowest_s = max(report.slowest_s, time.monotonic() - started)
        if fault := fault_of(artifact, self.files):
            yield f"the next producer was given something else: {fault}"
        if must_be_there and not cached:
            yield "built again although its publication was decided"

    def faults_of_quarantine(self, root: Path) -> Iterator[str]:
        """A kill spoils nothing."""
        if left := left_over(root, "quarantine"):
            yield f"found corrupt: {left}"


class Mend(Build):
    """A build in the place of a spoiled artifact, which is found out and set aside on the way."""

    def prepare(self, root: Path) -> None:
        """An artifact with one spoiled blob."""
        super().prepare(root)
        artifact, _ = opened(root).get_or_build(key_of(SUBJECT), builder_of(self.files))
        blob = root / "store" / blob_name(artifact.manifest.files["weights.safetensors"].sha256)
        blob.chmod(0o644)
        blob.write_bytes(b"spoiled")

    def faults_of_quarantine(self, root: Path) -> Iterator[str]:
        """Only what was spoiled, and the manifest that asked for it."""
        files = [path for path in (root / "store" / "v1" / "quarantine").rglob("*") if path.is_file()]
        blobs = [path for path in files if "/quarantine/blob/" in path.as_posix()]
        if len(blobs) != 1 or blobs[0].read_bytes() != b"spoiled":
            yield f"in quarantine: {blobs}"


class Read(Build):
    """A reader that makes its folder of links."""

    def prepare(self, root: Path) -> None:
        """An artifact whose folder of links went."""
        super().prepare(root)
        super().act(root)
        shutil.rmtree(root / "store" / "v1" / "view")

    def act(self, root: Path) -> None:
        """Read."""
        opened(root).get(key_of(SUBJECT))

    def faults_of_the_next(self, root: Path, report: Report, *, must_be_there: bool) -> Iterator[str]:
        """It is there whatever happens, and nothing is left of the links that were not finished."""
        yield from super().faults_of_the_next(root, report, must_be_there=True)
        if parts := list((root / "store" / "v1" / "view").rglob("*.part")):
            yield f"left of links: {parts}"


class Swap(Build):
    """A record that is replaced, and another that is created and removed."""

    def prepare(self, root: Path) -> None:
        """The record as it was."""
        opened(root).backend.create(RECORD, OLD)

    def act(self, root: Path) -> None:
        """Replace, create, remove."""
        backend = opened(root).backend
        record = backend.read(RECORD)
        assert record and backend.replace(RECORD, NEW, record.tag)
        assert backend.create("v1/pin/other.json", NEW)
        assert backend.remove("v1/pin/other.json")

    def faults(self, root: Path, report: Report) -> Iterator[str]:
        """Old or new, whole; and the next writer is not kept out."""
        backend = opened(root).backend
        if left := left_over(root, "tmp"):
            yield f"left in tmp: {left}"
        record, other = backend.read(RECORD), backend.read("v1/pin/other.json")
        if record is None or record.data not in (OLD, NEW):
            yield f"the record is {record}"
        if other is not None and other.data != NEW:
            yield f"the other record is {other}"
        report.states["old" if record and record.data == OLD else "new"] += 1
        started = time.monotonic()
        if not record or not backend.replace(RECORD, OLD, record.tag):
            yield "the next writer was refused"
        report.slowest_s = max(report.slowest_s, time.monotonic() - started)


def series(root: Path, scenario: Build, arm: Callable[[int], None], steps: Iterator[int], death: int) -> Report:
    """Rounds until one comes to its end alive."""
    report = Report()
    for step in steps:
        home = root / str(step)
        scenario.prepare(home)

        def act(home: Path = home, step: int = step) -> None:
            arm(step)
            scenario.act(home)

        status = status_of(fork(act))
        if status not in (0, -death):
            report.faults.append(f"{step}: it ended with {status}")
        report.faults += [f"{step}: {fault}" for fault in scenario.faults(home, report)]
        shutil.rmtree(home)
        if status == 0:
            break
        report.boundaries += 1
    return report


def main(root: Path) -> None:
    """Every scenario at every boundary, and builds with torn writes."""
    files = files_of(SUBJECT)
    reports = {
        type(scenario).__name__: series(root, scenario, kill_at, itertools.count(1), signal.SIGKILL)
        for scenario in (Build(files), Mend(files), Read(files), Swap(files))
    }
    # So many short files that the lease, and the manifest more than that, are what grows longest.
    many = files_of(SUBJECT, size_bytes=64) | {f"logs/{number}.json": b"{}" for number in range(20)}
    reports["Torn"] = series(root, Build(many), kill_beyond, iter(range(0, 40_000, 131)), signal.SIGXFSZ)
    json.dump({name: vars(report) for name, report in reports.items()}, sys.stdout)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
