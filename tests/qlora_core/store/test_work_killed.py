"""kill -9 before every single change of the file system: the old snapshot or the new one, and nothing left over."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

_KILLED = """
import json, os, signal, sys
from pathlib import Path
from qlora_core.store.local import LocalFolder
from qlora_core.store.work import WorkArea

root, operation = Path(sys.argv[1]), sys.argv[2]
WRITES = {"os.rename", "os.link", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.utime", "shutil.rmtree"}

def writes(event, arguments):
    return event in WRITES or (event == "open" and arguments[1] is not None and arguments[1][0] in "wax")

def files(folder, text):
    folder.mkdir()
    (folder / "a.json").write_text(text * 99)
    (folder / "b.json").write_text(text)
    return folder

def killed_before(write, act):
    # Whether the child, which ends at its `write`th change of the file system, came to its end before.
    child = os.fork()
    if child == 0:
        left = [write]
        def hook(event, arguments):
            if writes(event, arguments):
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= 1
        sys.addaudithook(hook)
        act()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), status
    return status != 0

old, new = files(root / "old", "old"), files(root / "new", "new")
seen, write = [], 0
while True:
    store = root / f"store{write}"
    WorkArea(LocalFolder(store), "w").save(old, "old")
    act = {
        "save": lambda: WorkArea(LocalFolder(store), "w").save(new, "new"),
        "clear": lambda: WorkArea(LocalFolder(store), "w").clear(),
        "restore": lambda: WorkArea(LocalFolder(store), "w").restore(root / f"restored{write}"),
    }[operation]
    killed = killed_before(write, act)
    area = WorkArea(LocalFolder(store), "w")
    target = root / f"target{write}"
    snapshot = area.restore(target)
    label = snapshot.label if snapshot else None
    if snapshot:
        assert (target / "b.json").read_text() == label and (target / "a.json").read_text() == label * 99
    seen.append(label)
    restored = root / f"restored{write}"
    if restored.exists():
        assert sorted(path.name for path in restored.iterdir()) == ["a.json", "b.json"]
        seen[-1] = "restored"
    # Whatever was left over goes with the next save, or with a clear.
    area.save(new, "next")
    stored = [path for path in (store / "v1").rglob("*") if path.is_file() and "/lock/" not in str(path)]
    assert len(stored) == 3, stored
    WorkArea(LocalFolder(store), "w").clear()
    assert not [path for path in (store / "v1" / "work").rglob("*") if path.is_file()]
    if not killed:
        break
    write += 1
sys.stdout.write(json.dumps(seen))
"""


@pytest.mark.parametrize(
    ("operation", "before", "after"), [("save", "old", "new"), ("clear", "old", None), ("restore", "old", "restored")]
)
def test_kill_9_before_any_write_leaves_the_old_or_the_new(
    tmp_path: Path, operation: str, before: str | None, after: str | None
) -> None:
    command = [sys.executable, "-c", _KILLED, str(tmp_path), operation]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout)
    # One turn from the old to the new, at one of many places.
    turn = seen.index(after)
    assert seen == [before] * turn + [after] * (len(seen) - turn)
    assert turn >= 1 and len(seen) >= 4
