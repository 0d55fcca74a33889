"""Keeps the checkpoints of a sweep's trials in the artifact store, so that a trial goes on wherever it is taken up.

A store that fails costs that protection and never the training, which has its checkpoints on this machine: that is said
once, and a later checkpoint is tried again. A checkpoint there that is further than one from here, and that nobody here
has seen, is never replaced. Only one thing ends a trial here: that somebody else has taken it over.
Knows nothing of what is in a checkpoint.
"""

import logging
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_core.errors import LeaseLostError, StoreError
from qlora_core.store.backend import Backend
from qlora_core.store.store import open_store
from qlora_core.store.work import WorkArea, clear_work
from qlora_core.sweep.lock import DRIVER_LOCK, OTHER_DRIVER_S, exclusive_lock

if TYPE_CHECKING:
    from qlora_core.training.checkpoint import Checkpoint

_QUIET_PER_WAIT = 10.0
"""After a failure the store is left alone so many times as long as that took: an outage takes a tenth of the time."""

_LOGGER = logging.getLogger(__name__)


@dataclass
class StoreKeeper:
    """A `CheckpointKeeper` over a store. Made of plain JSON data, since each worker process opens the store itself.

    `store` are the arguments of `open_store`; `name` is the work that the trials belong to, such as `sweep/<key>`;
    `lease` and `inputs` are as in `store.work.Snapshot`.
    """

    store: Mapping[str, Any]
    name: str
    lease: str
    inputs: Mapping[str, str]
    _backend: Backend | None = field(default=None, init=False)
    _areas: dict[str, WorkArea] = field(default_factory=dict, init=False)
    _told: set[str] = field(default_factory=set, init=False)
    _settled: set[str] = field(default_factory=set, init=False)
    _behind: set[str] = field(default_factory=set, init=False)
    _quiet_until: float = field(default=0.0, init=False)

    def keep(self, trial_id: str, checkpoint: "Checkpoint") -> None:
        """Send a checkpoint that has just been written; the one sent before goes."""
        if self._is_quiet:
            return
        with self._failure_told(trial_id):
            area = self._area(trial_id)
            if self._is_settled(trial_id, area, checkpoint):
                area.save(checkpoint.folder, checkpoint.folder.name)

    def bring_back(self, trial_id: str, folder: Path, local: "Checkpoint | None") -> bool:
        """Fetch the trial's checkpoint into `folder` if it is newer than `local`, and take the trial over."""
        # The trial may have been elsewhere since this process had it, and that must not count against it.
        self._areas.pop(trial_id, None)
        self._settled.discard(trial_id)
        if self._is_quiet:
            return False
        with self._failure_told(trial_id):
            area = self._area(trial_id)
            snapshot = area.take()
            is_newer = snapshot is not None and (local is None or _step(snapshot.label) > local.step)
            restored = area.restore(folder / snapshot.label) if snapshot is not None and is_newer else None
            # Only now: what was not fetched is not known, and may be further than what this process has.
            self._settled.add(trial_id)
            if restored is not None:
                _LOGGER.info("trial %s: %s is back from %s", trial_id, restored.label, self.store["url"])
                return True
        return False

    @property
    def _is_quiet(self) -> bool:
        return time.monotonic() < self._quiet_until

    def _area(self, trial_id: str) -> WorkArea:
        if self._backend is None:
            self._backend = open_store(**self.store).backend
        if trial_id not in self._areas:
            self._areas[trial_id] = WorkArea(self._backend, f"{self.name}/{trial_id}", self.lease, self.inputs)
        return self._areas[trial_id]

    def _is_settled(self, trial_id: str, area: WorkArea, checkpoint: "Checkpoint") -> bool:
        """Whether what the store has was seen here, or is no further than `checkpoint`, which may replace it then."""
        if trial_id in self._settled:
            return True
        # A look takes nothing over: whoever is further may be at work at this moment.
        for look in (area.newest, area.take):
            found = look()
            if found is not None and _step(found.label) > checkpoint.step:
                if trial_id not in self._behind:
                    self._behind.add(trial_id)
                    _LOGGER.warning(
                        "trial %s: %s has %s of it, which could not be fetched as it began and stays there; until this "
                        "machine has come as far, its checkpoints are on this machine alone",
                        trial_id,
                        self.store["url"],
                        found.label,
                    )
                return False
        self._settled.add(trial_id)
        return True

    @contextmanager
    def _failure_told(self, trial_id: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        except LeaseLostError:
            raise
        except StoreError as error:
            now = time.monotonic()
            self._quiet_until = now + _QUIET_PER_WAIT * (now - started)
            if trial_id not in self._told:
                self._told.add(trial_id)
                _LOGGER.warning(
                    "trial %s trains on with its checkpoints on this machine alone, until the store works again: %s",
                    trial_id,
                    error,
                )
        else:
            self._told.discard(trial_id)


def _step(label: str) -> int:
    """The step that a checkpoint's name tells."""
    digits = label.rpartition("-")[2]
    return int(digits) if digits.isdecimal() else -1


def discard_work(work_dir: Path, backend: Backend) -> None:
    """Remove what a sweep has left once its result is stored, in the store and then here; no folder: no effect.

    Raises SweepError while a driver works in this folder.
    """
    if not work_dir.is_dir():
        return
    with exclusive_lock(work_dir / DRIVER_LOCK, purpose="this sweep still runs", wait_s=OTHER_DRIVER_S):
        clear_work(backend, work_name(work_dir))
        # Last, so that what is left of an interrupted removal is found again.
        shutil.rmtree(work_dir)


def work_name(work_dir: Path) -> str:
    """What a sweep in this folder is called among the work in a store."""
    return f"sweep/{work_dir.name}"
