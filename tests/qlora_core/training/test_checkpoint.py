"""Checkpoints under crashes, damage and kill -9."""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_core.errors import TrainingError
from qlora_core.training import checkpoint as module
from qlora_core.training.checkpoint import newest_checkpoint, save_checkpoint


def _save(folder: Path, step: int) -> None:
    tensors = {"w": torch.full((64,), float(step))}
    save_checkpoint(folder, step, tensors, {"w|exp_avg": -tensors["w"]}, {"step": step, "curve": []})


def _holds(folder: Path, step: int) -> None:
    """The newest checkpoint is that of `step`, whole: all three files of one step."""
    newest = newest_checkpoint(folder)
    assert newest is not None
    assert newest.step == newest.state()["step"] == step
    assert newest.adapter()["w"][0] == step
    assert newest.optimizer()["w|exp_avg"][0] == -step


def test_an_absent_or_empty_folder_has_no_checkpoint(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "none") is None
    assert newest_checkpoint(tmp_path) is None


def test_the_newest_is_used_and_the_last_two_are_kept(tmp_path: Path) -> None:
    for step in (3, 6, 12, 100):
        _save(tmp_path, step)
    _holds(tmp_path, 100)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000012", "step-00000100"]


def test_a_checkpoint_holds_safetensors_and_json_only(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    names = sorted(path.name for path in (tmp_path / "step-00000001").iterdir())
    assert names == ["adapter.safetensors", "manifest.json", "optimizer.safetensors", "state.json"]


def _flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << (place % 8)
    path.write_bytes(content)


def _truncate(path: Path, place: int) -> None:
    path.write_bytes(path.read_bytes()[:place])


def _remove(path: Path, place: int) -> None:
    path.unlink()


@pytest.mark.parametrize("damage", [_flip, _truncate, _remove])
@pytest.mark.parametrize("name", ["adapter.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_a_damaged_checkpoint_is_named_set_aside_and_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: Callable[[Path, int], None]
) -> None:
    for place in random.Random(name).sample(range(40), 3):
        shutil.rmtree(tmp_path)
        _save(tmp_path, 3)
        _save(tmp_path, 6)
        damage(tmp_path / "step-00000006" / name, place)
        caplog.clear()
        _holds(tmp_path, 3)
        assert "step-00000006" in caplog.text and name in caplog.text
        assert [path.name for path in tmp_path.glob("corrupt-*")] == ["corrupt-step-00000006-0"]
        _save(tmp_path, 6)
        _holds(tmp_path, 6)


def test_a_file_of_another_checkpoint_is_damage(tmp_path: Path) -> None:
    _save(tmp_path, 3)
    _save(tmp_path, 6)
    shutil.copy(
        tmp_path / "step-00000003" / "optimizer.safetensors", tmp_path / "step-00000006" / "optimizer.safetensors"
    )
    _holds(tmp_path, 3)


def test_when_all_are_damaged_there_is_none(tmp_path: Path) -> None:
    for step in (3, 6):
        _save(tmp_path, step)
        _flip(tmp_path / f"step-{step:08d}" / "state.json", 2)
    assert newest_checkpoint(tmp_path) is None


class _Crash(BaseException):
    """The process ends here: no handler of the code under test may run on it."""


@pytest.mark.parametrize("point", range(20))
def test_a_crash_at_any_flush_or_rename_leaves_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: int
) -> None:
    for step in (3, 6):
        _save(tmp_path, step)
    calls = 0

    def crashing(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **settings: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == point + 1:
                raise _Crash
            return real(*arguments, **settings)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(module.os, "fsync", crashing(os.fsync))
        patch.setattr(module, "save_file", crashing(module.save_file))
        patch.setattr(Path, "rename", crashing(Path.rename))
        patch.setattr(module.shutil, "rmtree", crashing(shutil.rmtree))
        try:
            _save(tmp_path, 9)
        except _Crash:
            finished = False
        else:
            finished = True
    assert finished == (calls <= point)
    newest = newest_checkpoint(tmp_path)
    assert newest is not None and newest.step in ((9,) if finished else (6, 9))
    _holds(tmp_path, newest.step)
    assert not list(tmp_path.glob("corrupt-*"))
    _save(tmp_path, 12)
    _holds(tmp_path, 12)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_full_disk_is_reported_and_leaves_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _save(tmp_path, 3)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module.os, "fsync", full)
        with pytest.raises(TrainingError, match=r"step-00000006.*No space left.*run the same command again"):
            _save(tmp_path, 6)
    _holds(tmp_path, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="w is not finite after step 4"):
        save_checkpoint(tmp_path, 4, {"w": torch.tensor([1.0, float("nan")])}, {}, {"step": 4})
    assert newest_checkpoint(tmp_path) is None


# Forks children that save without pause, kills each with SIGKILL at a random moment, and counts unusable folders.
_KILLER = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from qlora_core.training.checkpoint import newest_checkpoint, save_checkpoint

torch.set_num_threads(1)
root, kills = Path(sys.argv[1]), int(sys.argv[2])
generator = random.Random(7)

def save_atomically(folder, tensors, step):
    save_checkpoint(folder, step, tensors, tensors, {"step": step})

def save_plainly(folder, tensors, step):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter.safetensors")
    save_file(tensors, folder / "optimizer.safetensors")
    (folder / "state.json").write_text(json.dumps({"step": step}))

def read_atomic(folder):
    newest = newest_checkpoint(folder)
    return newest.state()["step"], newest.adapter()["w"], newest.optimizer()["w"]

def read_plain(folder):
    step = json.loads((folder / "state.json").read_text())["step"]
    return step, load_file(folder / "adapter.safetensors")["w"], load_file(folder / "optimizer.safetensors")["w"]

def usable(read, folder):
    try:
        step, adapter, optimizer = read(folder)
    except (AttributeError, ValueError, OSError, SafetensorError):
        return False
    return bool((adapter == step).all()) and bool((optimizer == step).all())

def save_for_ever(save, folder):
    for step in range(1, 10**6):
        save(folder, {"w": torch.full((100_000,), float(step))}, step)

unusable = {"atomic": 0, "plain": 0}
for kind, save, read in (("atomic", save_atomically, read_atomic), ("plain", save_plainly, read_plain)):
    for attempt in range(kills):
        folder = root / f"{kind}-{attempt}"
        child = os.fork()
        if child == 0:
            save_for_ever(save, folder)
        while not ((folder / "state.json").exists() or list(folder.glob("step-*"))):
            time.sleep(0.001)
        time.sleep(generator.uniform(0.0, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        unusable[kind] += not usable(read, folder)
sys.stdout.write(json.dumps(unusable))
"""


def test_kill_9_while_saving_leaves_a_usable_checkpoint_where_a_plain_writer_is_ruined(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _KILLER, str(tmp_path), "15"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    unusable = json.loads(result.stdout)
    assert unusable["atomic"] == 0
    assert unusable["plain"] > 0  # else the kills came at harmless moments and prove nothing
