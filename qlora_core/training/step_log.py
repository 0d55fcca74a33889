"""What every optimizer step cost and gave, as lines of JSON beside a trial's checkpoints, for people and dashboards.

A diary, not a state: nothing is ever read back from it. A step that was trained twice, after a roll-back or a killed
worker, stands there twice, the later line being the one that counts. Knows nothing of MLflow or of checkpoints.
"""

import json
import logging
import time
from pathlib import Path
from typing import Any

import torch

from qlora_core.training.trial_run import TrialRun

STEP_LOG = "steps.jsonl"
_PROCESS = Path("/proc/self/status")
_LOGGER = logging.getLogger(__name__)


class StepLog:
    """Appends to `<folder>/<trial id>/steps.jsonl`; a disk that refuses is told once and never stops training."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._folder = folder
        self._device = device
        self._logged: dict[str, tuple[int, float]] = {}
        self._refused = False

    def begin(self, run: TrialRun) -> None:
        """Rates of the run are counted from where it stands now."""
        self._logged[run.trial.id] = (run.counters.tokens, run.counters.seconds)

    def add(self, run: TrialRun, together: int) -> None:
        """The step that the run has just taken, with `together` trials in its pack.

        The line holds the step's entry of the curve; `tokens_per_s`, trained tokens over the trial's share of the
        pack's time; `memory_bytes` of the trial's own adapter, gradients and optimizer state; `process_memory_bytes`,
        which all trials of the pack share: the peak of allocated GPU memory, or resident memory now on a CPU.
        """
        tokens, seconds = self._logged.get(run.trial.id, (0, 0.0))
        self.begin(run)
        spent = run.counters.seconds - seconds
        line = {
            "time": round(time.time(), 3),
            "trial": run.trial.id,
            **run.counters.curve[-1],
            "seconds": round(spent, 6),
            "tokens_per_s": round((run.counters.tokens - tokens) / spent, 1) if spent > 0 else None,
            "pack": together,
            "micro_batch_size": run.micro_batch_size,
            "memory_bytes": run.memory_bytes,
            "process_memory_bytes": self._process_memory_bytes(),
        }
        self._write(run.trial.id, line)

    def _write(self, trial_id: str, line: dict[str, Any]) -> None:
        path = self._folder / trial_id / STEP_LOG
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line, allow_nan=False) + "\n")
        except OSError as error:
            if not self._refused:
                _LOGGER.warning("steps are trained but not written down: %s: %s", path, error.strerror or error)
            self._refused = True

    def _process_memory_bytes(self) -> int | None:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        lines = _PROCESS.read_text(encoding="utf-8").splitlines() if _PROCESS.is_file() else []
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:")), None)
