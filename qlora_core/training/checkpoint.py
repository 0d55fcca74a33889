"""Checkpoints of one trial: written whole or not at all, verified before use, the newest valid one wins.

A checkpoint is a folder `step-<n>` with `adapter.safetensors`, `optimizer.safetensors`, `state.json` and
`manifest.json`; the names sort as the steps do. It is staged under another name, flushed to disk, and renamed as the
last act. Row order and dropout follow from seed and step, so no generator state is needed. No pickle: safetensors and
JSON only. Knows nothing of what the tensors mean.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from qlora_core.digest import canonical_json, digest_file
from qlora_core.errors import TrainingError

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
KEPT_CHECKPOINTS = 2
_FILES = ("adapter.safetensors", "optimizer.safetensors", "state.json")
_MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{8})")
_STAGING = ".staging-"
_CORRUPT = "corrupt-"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: the step it was taken after, and where it lies."""

    step: int
    folder: Path

    def adapter(self) -> dict[str, torch.Tensor]:
        """The adapter's weights."""
        return load_file(self.folder / "adapter.safetensors")

    def optimizer(self) -> dict[str, torch.Tensor]:
        """The optimizer's state."""
        return load_file(self.folder / "optimizer.safetensors")

    def state(self) -> dict[str, Any]:
        """The JSON state: curve, counters, identity."""
        return json.loads((self.folder / "state.json").read_text(encoding="utf-8"))


class CheckpointKeeper(Protocol):
    """Keeps trials' newest checkpoints beyond this machine. Raises only what must end the training."""

    def keep(self, trial_id: str, checkpoint: Checkpoint) -> None:
        """Keep a checkpoint that has just been written, in place of the one kept before."""
        ...

    def bring_back(self, trial_id: str, folder: Path, local: Checkpoint | None) -> bool:
        """Put the kept checkpoint into the trial's `folder` under its own name; False if it is no newer than `local`.

        From then on this process is the one that keeps the trial's checkpoints.
        """
        ...


def save_checkpoint(
    folder: Path,
    step: int,
    adapter: Mapping[str, torch.Tensor],
    optimizer: Mapping[str, torch.Tensor],
    state: Mapping[str, Any],
    *,
    best_step: int | None = None,
) -> Checkpoint:
    """Write the checkpoint of `step` under `folder` and delete all but the newest two and that of `best_step`.

    A crash at any moment leaves the earlier checkpoints as they were, or them and the new one.

    Raises:
        TrainingError: a weight is not finite, or the disk refuses; earlier checkpoints are untouched.
    """
    for name, tensor in adapter.items():
        if not torch.isfinite(tensor).all():
            raise TrainingError(
                f"{name} is not finite after step {step}; lower train.learning_rate. Earlier checkpoints are untouched"
            )
    final = folder / f"step-{step:08d}"
    stage = folder / f"{_STAGING}{step:08d}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_stage(stage, step, adapter, optimizer, state)
        replaced = folder / f"{_STAGING}replaced-{step:08d}"
        if final.exists():  # a roll-back to this step writes it again, with the roll-back in it
            final.rename(replaced)
        stage.rename(final)
        _flush_folder(folder)
        shutil.rmtree(replaced, ignore_errors=True)
        _delete_old(folder, best_step)
    except (OSError, SafetensorError) as error:  # safetensors wraps the disk's errors in its own
        shutil.rmtree(stage, ignore_errors=True)
        raise TrainingError(
            f"checkpoint {final} could not be written: {error}; earlier checkpoints are untouched. Free space or "
            "choose another compute.work_dir, then run the same command again"
        ) from error
    return Checkpoint(step, final)


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint whose files match their manifest; None where there is none.

    A damaged one is logged with file and digests, renamed to `corrupt-…` and passed over. Stages of interrupted writes
    are removed.
    """
    if not folder.is_dir():
        return None
    for stage in folder.glob(f"{_STAGING}*"):
        shutil.rmtree(stage, ignore_errors=True)
    for step, path in _checkpoints(folder):
        fault = _fault(path, step)
        if fault is None:
            return Checkpoint(step, path)
        _set_aside(path, fault)
    return None


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of everything named like a checkpoint, newest first."""
    matches = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted(((int(match[1]), path) for match, path in matches if match), reverse=True)


def _write_stage(
    stage: Path,
    step: int,
    adapter: Mapping[str, torch.Tensor],
    optimizer: Mapping[str, torch.Tensor],
    state: Mapping[str, Any],
) -> None:
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir()
    save_file(dict(adapter), stage / "adapter.safetensors")
    save_file(dict(optimizer), stage / "optimizer.safetensors")
    (stage / "state.json").write_text(json.dumps(state, allow_nan=False), encoding="utf-8")
    for name in _FILES:
        _flush(stage / name)
    (stage / _MANIFEST).write_bytes(_manifest(stage, step))
    _flush(stage / _MANIFEST)
    _flush_folder(stage)


def _manifest(folder: Path, step: int) -> bytes:
    """The one manifest that fits the files as they are: verifying is writing it again and comparing bytes."""
    files = {
        name: {"sha256": digest_file(folder / name), "size_bytes": (folder / name).stat().st_size} for name in _FILES
    }
    return canonical_json({"version": FORMAT_VERSION, "step": step, "files": files})


def _fault(path: Path, step: int) -> str | None:
    """What is wrong with a checkpoint, naming the file; None when it is whole."""
    missing = [name for name in (*_FILES, _MANIFEST) if not (path / name).is_file()]
    if missing:
        return f"{missing[0]} is missing"
    stored = (path / _MANIFEST).read_bytes()
    actual = _manifest(path, step)
    if stored == actual:
        return None
    try:
        listed = json.loads(stored)["files"]
        digests = {name: (listed[name]["sha256"], digest_file(path / name)) for name in _FILES}
    except (ValueError, KeyError, TypeError) as error:
        return f"{_MANIFEST} cannot be read ({error!r})"
    for name, (wanted, found) in digests.items():
        if wanted != found:
            return f"{name} has sha256 {found}, not {wanted} as its manifest says"
    return f"{_MANIFEST} does not describe step {step} of format {FORMAT_VERSION}"


def _set_aside(path: Path, fault: str) -> None:
    attempt = 0
    while (target := path.with_name(f"{_CORRUPT}{path.name}-{attempt}")).exists():
        attempt += 1
    logger.error("checkpoint %s is passed over: %s; kept as %s", path, fault, target.name)
    path.rename(target)
    _flush_folder(path.parent)


def _delete_old(folder: Path, best_step: int | None) -> None:
    for step, path in _checkpoints(folder)[KEPT_CHECKPOINTS:]:
        if step == best_step:
            continue
        # Renamed first, so that a crash while deleting leaves no half checkpoint under a checkpoint's name
        doomed = folder / f"{_STAGING}old-{step:08d}"
        path.rename(doomed)
        shutil.rmtree(doomed)


def _flush(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def _flush_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
