"""What a sweep's workers write down about their steps, read while it is being written.

Knows the files' names and that a line is JSON; nothing of what the lines say, and no torch.
"""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

STEP_LOG = "steps.jsonl"
"""A trial's steps, in the trial's folder: see `step_log.StepLog`."""

PACK_LOG = ".packs.jsonl"
"""What the name of a worker's diary of its packs ends in, beside the trials' folders."""

_MOST_BYTES = 4 << 20


class LineTail:
    """The lines that were appended to a file since they were last asked for."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def read(self) -> list[dict[str, Any]]:
        """The new whole lines, a few MB at most; none where there is no file yet.

        A line that is not one JSON object (its writer was killed in the middle of it) is left out.
        """
        try:
            with self._path.open("rb") as stream:
                stream.seek(self._offset)
                block = stream.read(_MOST_BYTES)
        except OSError:
            return []
        whole = block[: block.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [line for text in whole.splitlines() if (line := _parsed(text)) is not None]


class StepTail:
    """New lines of the diaries under `trials_dir`: of trials by id, of packs by worker."""

    def __init__(self, trials_dir: Path) -> None:
        self._folder = trials_dir
        self._tails: dict[Path, LineTail] = {}

    def has_steps(self, trial_id: str) -> bool:
        """Whether a trial's diary was begun."""
        return (self._folder / trial_id / STEP_LOG).is_file()

    def steps(self, trial_id: str) -> list[dict[str, Any]]:
        """Steps of a trial that were taken since this was last asked, in the order taken."""
        return self._read(self._folder / trial_id / STEP_LOG)

    def packs(self) -> dict[str, list[dict[str, Any]]]:
        """By worker, what was written of its packs since this was last asked; workers without news are left out."""
        found = {path.name.removesuffix(PACK_LOG): self._read(path) for path in pack_logs(self._folder)}
        return {worker: lines for worker, lines in found.items() if lines}

    def _read(self, path: Path) -> list[dict[str, Any]]:
        return self._tails.setdefault(path, LineTail(path)).read()


def copy_diaries(trials_dir: Path, trial_ids: Iterable[str], out: Path) -> None:
    """Copy what there is of the diaries into `out`, laid out as in `trials_dir`; a StepTail reads them there, too."""
    for path in [*(trials_dir / trial / STEP_LOG for trial in trial_ids), *pack_logs(trials_dir)]:
        if path.is_file():
            copy = out / path.relative_to(trials_dir)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)


def pack_logs(trials_dir: Path) -> list[Path]:
    """The diaries of packs there, by name."""
    return sorted(trials_dir.glob(f"*{PACK_LOG}"))


def _parsed(text: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) else None
