"""Leases: one holder at a time, whatever dies, stops, wakes or is told late."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from qlora_core.errors import LeaseLostError, StoreUnavailableError
from qlora_core.store.artifact import StageKey
from qlora_core.store.holder import Holder
from qlora_core.store.lease import HeldLease, LeaseRecord, Leases, lease_name, parse_lease
from qlora_core.store.local import LocalFolder
from qlora_core.store.store import open_store

PROGRAMS = Path(__file__).parent / "programs"
NAME = "stage/sweep/x"
KEY = StageKey("sweep", "1", {}, {})
# A holder that cannot be looked at from here, only waited for.
ELSEWHERE = Holder(host="elsewhere", boot="another boot", namespace="pid:[1]", pid=1, started="1")


def write_lease(backend: Any, name: str = NAME, **changes: Any) -> LeaseRecord:
    """A lease as somebody else left it."""
    lease = LeaseRecord(
        token=7, state="held", holder=ELSEWHERE, nonce="n", ttl_s=0.3, since=datetime.now(UTC)
    ).model_copy(update=changes)
    assert backend.create(lease_name(name), lease.to_json())
    return lease


def lease_in(backend: Any, name: str = NAME) -> LeaseRecord:
    record = backend.read(lease_name(name))
    assert record is not None
    return parse_lease(record, name)


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def take(leases: Leases, within_s: float) -> HeldLease | None:
    """Try again until the lease is there, and keep it without a heartbeat."""
    deadline = time.monotonic() + within_s
    while True:
        held = leases._take(NAME, {})
        if held is not None or time.monotonic() > deadline:
            return held
        time.sleep(0.01)


def test_token_grows_with_every_holder(place: Any) -> None:
    tokens = []
    for _ in range(3):
        with place.reader().leases.attempt(NAME) as lease:
            tokens.append(lease.token)
            with place.reader().leases.attempt(NAME) as second:
                assert second is None
    assert tokens == [1, 2, 3]
    assert lease_in(place.store.backend).state == "free"


def test_nobody_is_told_to_live_who_gave_his_lease_back(place: Any) -> None:
    leases = place.reader().leases
    assert leases.live(NAME) is None
    with leases.attempt(NAME, {"base": "b" * 64}):
        assert leases.live(NAME).inputs == {"base": "b" * 64}
    assert leases.live(NAME) is None
    leases.wait_while_held(NAME, "nothing to wait for")


def test_heartbeat_keeps_a_lease_far_beyond_its_time(tmp_path: Path) -> None:
    holder, observer = (Leases(LocalFolder(tmp_path), ttl_s=1.0) for _ in range(2))
    with holder.attempt(NAME) as held:
        assert held is not None
        assert take(observer, within_s=2.2) is None
        held.renew()
    assert take(observer, within_s=0) is not None


def test_silent_holder_elsewhere_loses_the_lease_after_its_time_and_not_before(tmp_path: Path) -> None:
    backend = LocalFolder(tmp_path)
    write_lease(backend)
    leases, started = Leases(backend), time.monotonic()
    held = take(leases, within_s=5)
    assert held is not None
    assert held.token == 8
    assert time.monotonic() - started >= 0.3


@pytest.mark.parametrize("since", [datetime(1970, 1, 1, tzinfo=UTC), datetime(2999, 1, 1, tzinfo=UTC)])
def test_clock_of_the_holder_decides_nothing(tmp_path: Path, since: datetime) -> None:
    backend = LocalFolder(tmp_path)
    write_lease(backend, since=since)
    started = time.monotonic()
    assert take(Leases(backend), within_s=0.1) is None
    assert take(Leases(backend), within_s=5) is not None
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("host", ["elsewhere", os.uname().nodename])
def test_machine_of_the_same_name_is_another_machine(tmp_path: Path, host: str) -> None:
    # Pods and laptops share names, and a process number that is free here says nothing there.
    backend = LocalFolder(tmp_path)
    write_lease(backend, holder=ELSEWHERE.model_copy(update={"host": host, "pid": 999_999}), ttl_s=60.0)
    assert take(Leases(backend), within_s=0.2) is None


def test_number_of_a_dead_process_that_was_given_to_another_holds_nothing(tmp_path: Path) -> None:
    backend = LocalFolder(tmp_path)
    alive = Holder.this_process()
    write_lease(backend, "stage/alive", holder=alive, ttl_s=60.0)
    write_lease(backend, "stage/dead", holder=alive.model_copy(update={"started": "1"}), ttl_s=60.0)
    leases = Leases(backend)
    assert leases.live("stage/alive") is not None
    assert leases.live("stage/dead") is None


def test_who_lost_the_lease_can_do_nothing_with_it(place: Any, key: StageKey, build: Any) -> None:
    manifest = place.store.get_or_build(key, build)[0].manifest
    backend = place.store.backend
    sleeper = take(Leases(backend, ttl_s=0.2), within_s=0)
    assert sleeper is not None
    successor = take(place.reader().leases, within_s=10)
    assert successor is not None
    assert successor.token == sleeper.token + 1
    for use in (sleeper.renew, lambda: sleeper.intend(manifest), sleeper.commit):
        with pytest.raises(LeaseLostError, match=rf"{NAME}.*token 1"):
            use()
    sleeper.release()
    assert lease_in(backend).token == successor.token
    successor.intend(manifest)
    successor.commit()
    assert lease_in(backend).state == "committed"


def test_damaged_lease_is_set_aside_and_its_holder_has_lost_it(
    place: Any, key: StageKey, build: Any, caplog: pytest.LogCaptureFixture
) -> None:
    name = f"stage/{key.stage}/{key.key}"
    backend = place.store.backend
    with caplog.at_level(logging.WARNING), place.store.leases.attempt(name) as held:
        backend.remove(lease_name(name))
        backend.create(lease_name(name), b'{"token": 1')
        _, cached = place.reader().get_or_build(key, build)
        assert not cached
        assert "no sound lease" in caplog.text
        with pytest.raises(LeaseLostError):
            held.commit()
    assert len([entry for entry in place.names() if entry.startswith("v1/quarantine/lease/")]) == 1


class UnreliableFolder(LocalFolder):
    """A folder as over a bad line: it does what it is told, and at times does not say so, or is away."""

    unanswered = 0
    away = False

    def replace(self, name: str, data: bytes, tag: str) -> str | None:
        if self.away:
            raise StoreUnavailableError("the line is down")
        done = super().replace(name, data, tag)
        if self.unanswered:
            self.unanswered -= 1
            return None
        return done


def test_write_whose_answer_was_lost_is_recognised_as_ones_own(tmp_path: Path) -> None:
    backend = UnreliableFolder(tmp_path)
    with Leases(backend).attempt(NAME) as held:
        assert held is not None
        backend.unanswered = 1
        held.renew()
        held.renew()
    assert lease_in(backend).state == "free"


def test_heartbeat_goes_on_after_the_place_was_away(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    backend = UnreliableFolder(tmp_path)
    with caplog.at_level(logging.WARNING), Leases(backend, ttl_s=0.4).attempt(NAME) as held:
        assert held is not None
        backend.away = True
        wait_until(lambda: "could not be renewed, trying again: the line is down" in caplog.text)
        nonce = lease_in(backend).nonce
        backend.away = False
        wait_until(lambda: lease_in(backend).nonce != nonce)


Producer = Callable[..., "subprocess.Popen[str]"]


def build_here(folder: Path) -> None:
    (folder / "result.json").write_text("built here")


def test_killed_producer_is_succeeded_at_once(tmp_path: Path, producer: Producer) -> None:
    process = producer(60.0, "never")
    store = open_store(str(tmp_path / "store"), tmp_path / "cache")
    # Negative control: while it lives, nobody takes its place.
    with store.leases.attempt(f"stage/sweep/{KEY.key}") as lease:
        assert lease is None
    process.kill()
    # Nobody has waited for it yet: it is a zombie, and dead enough.
    started = time.monotonic()
    artifact, cached = store.get_or_build(KEY, build_here)
    assert time.monotonic() - started < 5
    assert not cached
    assert (artifact.path / "result.json").read_text() == "built here"


def test_stopped_producer_cannot_publish_when_it_wakes(tmp_path: Path, producer: Producer) -> None:
    process = producer(1.0, "the sleeper's")
    process.send_signal(signal.SIGSTOP)
    store = open_store(str(tmp_path / "store"), tmp_path / "cache")
    started = time.monotonic()
    artifact, cached = store.get_or_build(KEY, build_here)
    assert not cached
    assert time.monotonic() - started > 0.7
    (tmp_path / "go").touch()
    process.send_signal(signal.SIGCONT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert json.loads(output) == {"cached": True, "result": "built here"}
    found = store.get(KEY)
    assert found is not None
    assert found.manifest == artifact.manifest


def test_decided_publication_is_finished_by_the_next_and_not_built_again(tmp_path: Path, producer: Producer) -> None:
    (tmp_path / "go").touch()
    process = producer(60.0, "decided", "commit")
    assert process.wait(30) == -signal.SIGKILL
    store = open_store(str(tmp_path / "store"), tmp_path / "cache")
    # Negative control: it was killed in time.
    assert store.get(KEY) is None
    assert lease_in(store.backend, f"stage/sweep/{KEY.key}").state == "committed"
    artifact, cached = store.get_or_build(KEY, lambda folder: pytest.fail("built again"))
    assert cached
    assert (artifact.path / "result.json").read_text() == "decided"
    assert list((tmp_path / "store" / "v1" / "tmp").iterdir()) == []


def test_one_of_fifty_takers_wins_an_expired_lease(tmp_path: Path) -> None:
    backend = LocalFolder(tmp_path / "store")
    write_lease(backend)
    command = [sys.executable, PROGRAMS / "takers.py", str(tmp_path), "50", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "winners").read_text().split() == ["8"]


HIDDEN = """
import os, sys
from qlora_core.store.holder import Holder
holder = Holder.model_validate_json(sys.argv[1])
gone = holder.model_copy(update={"pid": int(sys.argv[2])})
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
print(os.path.exists(f"/proc/{holder.pid}/stat"), holder.is_dead, gone.is_dead)
"""


def test_process_that_another_user_may_not_see_is_not_taken_for_dead() -> None:
    unshared = ["unshare", "--mount", "sh", "-c", 'mount -t proc -o hidepid=2 proc /proc && exec "$@"', "sh"]
    if os.getuid() != 0 or shutil.which("unshare") is None or subprocess.run([*unshared, "true"]).returncode:
        pytest.skip("needs a process that may mount /proc anew")
    gone = subprocess.Popen(["true"])
    gone.wait()
    holder = Holder.this_process().model_dump_json()
    done = subprocess.run(
        [*unshared, sys.executable, "-c", HIDDEN, holder, str(gone.pid)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "False", "True"]
