"""No process of the stack outlives it: not after Ctrl-C, not after SIGKILL of either guard, not a daemon that hid."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import os, sys
from pathlib import Path
from infra.loopback.keeper import Keeper, StopRequestedError, run_kept
from infra.loopback.service import Service, StackError

folder = Path(sys.argv[1])
DAEMON = "if os.fork() == 0:\\n os.setsid()\\n if os.fork() == 0:\\n  open('daemon', 'w').write(str(os.getpid()))"
SERVICE = f"import os, time, signal\\n{DAEMON}\\n  signal.signal(15, signal.SIG_IGN); time.sleep(600)\\n os._exit(0)\\n"
SERVICE += "open('up', 'w').close()\\ntime.sleep(float(os.environ['LIVES']))"

def body(lifeline):
    keeper = Keeper(folder, lifeline)
    command = [sys.executable, "-c", SERVICE]
    ready = lambda: (folder / "up").exists() and (folder / "daemon").exists() and (folder / "daemon").read_text() != ""
    try:
        os.chdir(folder)
        keeper.start([Service("sleeper", command, {**os.environ, "LIVES": sys.argv[2]}, ready, 30)])
        print("ready", flush=True)
        keeper.watch()
    except StopRequestedError:
        return 0
    except StackError as error:
        print(error, file=sys.stderr, flush=True)
        return 1
    finally:
        keeper.stop()

sys.exit(run_kept(body))
"""


class Kept:
    """A front that runs, and every process below it."""

    def __init__(self, folder: Path, lives_s: float) -> None:
        command = [sys.executable, "-c", PROGRAM, str(folder), str(lives_s)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        pipe = subprocess.PIPE
        self.front = subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True, cwd=folder)
        assert self.front.stdout is not None
        assert self.front.stdout.readline() == "ready\n", self.front.communicate()[1]
        self.daemon = psutil.Process(int((folder / "daemon").read_text()))
        self.below = psutil.Process(self.front.pid).children(recursive=True)

    @property
    def keeper(self) -> psutil.Process:
        return next(process for process in self.below if process.ppid() == self.front.pid)

    def all_gone(self, within_s: float = 40.0) -> bool:
        _, alive = psutil.wait_procs([*self.below, self.daemon], timeout=within_s)
        return not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Kept]:
    found = Kept(tmp_path, 600)
    yield found
    for process in [*found.below, found.daemon]:
        if process.is_running():
            process.kill()
    found.front.kill()


def test_the_daemon_has_left_its_parent_and_ignores_sigterm(kept: Kept) -> None:
    # Control: what the guards must find is not a child that a plain kill of the group would reach.
    assert os.getpgid(kept.daemon.pid) != os.getpgid(kept.front.pid)
    kept.daemon.terminate()
    time.sleep(0.5)
    assert kept.daemon.is_running()


def test_ctrl_c_ends_all_of_it(kept: Kept) -> None:
    kept.front.send_signal(signal.SIGINT)
    assert kept.all_gone()
    assert kept.front.wait(timeout=10) == 0


@pytest.mark.parametrize("guard", ["front", "keeper"])
def test_sigkill_of_a_guard_leaves_no_orphan(kept: Kept, guard: str) -> None:
    victim = psutil.Process(kept.front.pid) if guard == "front" else kept.keeper
    victim.kill()
    assert kept.all_gone()
    assert kept.front.wait(timeout=10) == (-signal.SIGKILL if guard == "front" else 1)


def test_service_that_ends_ends_the_stack_and_says_so(tmp_path: Path) -> None:
    kept = Kept(tmp_path, 1.0)
    assert kept.front.wait(timeout=40) == 1
    assert kept.front.stderr is not None
    assert "sleeper ended with code 0" in kept.front.stderr.read()
    assert kept.all_gone()


def test_folder_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    command = [sys.executable, "-m", "infra.loopback", "--dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "is not empty" in done.stderr
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_no_credential_stands_on_a_command_line_or_in_a_repr(tmp_path: Path) -> None:
    program = (
        "import json, sys; from pathlib import Path; from infra.loopback.layout import Layout\n"
        "folder = Path(sys.argv[1]); (folder / 's3-key-id').write_text('AKIA')\n"
        "layout = Layout.make(folder, Path('pairs.jsonl'))\n"
        "layout.credentials\n"
        "services = [layout.cluster(), *layout.servers(), layout.worker()]\n"
        "said = [repr(layout), json.dumps(layout.config()), *(' '.join(s.command) + repr(s) for s in services)]\n"
        "print(json.dumps({'said': said, 'secrets': list(layout.credentials.all().values())}))"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(set(found["secrets"])) == len(found["secrets"]) == 10
    for secret in found["secrets"]:
        assert len(secret) >= 32
        assert not any(secret in text for text in found["said"])
