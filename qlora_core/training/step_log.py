"""What every optimizer step cost and gave, as lines of JSON beside a trial's checkpoints, for people and dashboards.

A diary, not a state: no training ever reads it. A step that was trained twice, after a roll-back or a killed worker,
stands there twice, the later line being the one that counts. Knows nothing of MLflow or of checkpoints.
"""

import json
import logging
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_core.training.step_tail import PACK_LOG, STEP_LOG
from qlora_core.training.trial_run import TrialRun

PACK_LINE_S = 5.0
"""Of how much training a line about the pack tells."""

_PROCESS = Path("/proc/self/status")
_LOGGER = logging.getLogger(__name__)


@dataclass
class _PackWindow:
    tokens: int = 0
    seconds: float = 0.0
    trials: int = 0


class StepLog:
    """Appends to `<folder>/<trial id>/steps.jsonl`, and to `<folder>/<host>-<pid>.packs.jsonl` about its packs.

    A disk that refuses is told once and never stops training.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._folder = folder
        self._device = device
        self._logged: dict[str, tuple[int, float]] = {}
        self._pack_log = folder / f"{socket.gethostname()}-{os.getpid()}{PACK_LOG}"
        self._window = _PackWindow()
        self._pack_lines = 0
        self._refused = False

    def begin(self, run: TrialRun) -> None:
        """Rates of the run are counted from where it stands now."""
        self._logged[run.trial.id] = (run.counters.tokens, run.counters.seconds)

    def add(self, run: TrialRun, together: int) -> None:
        """The step that the run has just taken, with `together` trials in its pack.

        The line holds the step's entry of the curve; `total_steps` and `trained_tokens`, the steps the trial is to take
        and its tokens so far; `tokens_per_s`, trained tokens over the trial's share of the
        pack's time; `memory_bytes` of the trial's own adapter, gradients and optimizer state; `process_memory_bytes`,
        which all trials of the pack share: the peak of allocated GPU memory, or resident memory now on a CPU.
        """
        tokens, seconds = self._logged.get(run.trial.id, (0, 0.0))
        self.begin(run)
        tokens, seconds = run.counters.tokens - tokens, run.counters.seconds - seconds
        line = {
            "time": round(time.time(), 3),
            "trial": run.trial.id,
            **run.counters.curve[-1],
            "total_steps": run.total_steps,
            "trained_tokens": run.counters.tokens,
            "seconds": round(seconds, 6),
            "tokens_per_s": round(tokens / seconds, 1) if seconds > 0 else None,
            "pack": together,
            "micro_batch_size": run.micro_batch_size,
            "memory_bytes": run.memory_bytes,
            "process_memory_bytes": self._process_memory_bytes(),
        }
        self._write(self._folder / run.trial.id / STEP_LOG, line)
        self._add_to_pack(tokens, seconds, together)

    def flush(self) -> None:
        """Write down what is not yet told of the pack: training ends or is interrupted here."""
        window, self._window = self._window, _PackWindow()
        if window.seconds <= 0:
            return
        self._pack_lines += 1
        line = {
            "time": round(time.time(), 3),
            "line": self._pack_lines,
            "trials": window.trials,
            "tokens": window.tokens,
            "seconds": round(window.seconds, 6),
            "tokens_per_s": round(window.tokens / window.seconds, 1),
            "process_memory_bytes": self._process_memory_bytes(),
        }
        self._write(self._pack_log, line)

    def _add_to_pack(self, tokens: int, seconds: float, together: int) -> None:
        """Shares of trials add up to the time of the passes, so their sum is the time of all tokens together."""
        self._window.tokens += tokens
        self._window.seconds += seconds
        self._window.trials = max(self._window.trials, together)
        if self._window.seconds >= PACK_LINE_S:
            self.flush()

    def _write(self, path: Path, line: dict[str, Any]) -> None:
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
