"""One worker of a sweep: loads the quantized base once, then trains segment after segment. Knows no Ray and no rungs.

What crosses its methods is JSON data and paths, never a model or a tensor. Heavy imports stand inside the methods: the
driver names this class to start workers, and must not pay for torch itself.
"""

import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_core.config.train import TrainConfig
from qlora_core.sweep.lock import exclusive_lock

if TYPE_CHECKING:
    from qlora_core.data.dataset import TokenRow
    from qlora_core.training.trainer import Trainer
    from qlora_core.training.trial import Trial

_LEFT_BEHIND_S = 60.0
"""How long a worker of an ended driver may still take to die before its trial is someone else's."""

_LOGGER = logging.getLogger(__name__)


class SweepWorker:
    """Trains trials of one sweep over one base. Used from two threads: `run` and `export` in one, `stop` in another.

    `kept` says where in a store the trials' checkpoints are kept too: the fields of `StoreKeeper`. `residency` are the
    arguments of `load_quantized` on how layers execute; `memory_sharers` workers on CPUs divide a machine's memory.
    `limits` are the fields of `PassLimits`. `original_folder` holds the checkpoint that the base was quantized from,
    `start_folder` the adapter that every trial begins from, `parent_folder` the one that stays under every trial.
    """

    def __init__(
        self,
        quantized_folder: str,
        curated_folder: str,
        trials_dir: str,
        precision: str,
        kept: Mapping[str, Any] | None = None,
        residency: Mapping[str, Any] | None = None,
        memory_sharers: int = 1,
        limits: Mapping[str, Any] | None = None,
        original_folder: str | None = None,
        start_folder: str | None = None,
        parent_folder: str | None = None,
    ) -> None:
        self._quantized_folder = Path(quantized_folder)
        self._curated_folder = Path(curated_folder)
        self._trials_dir = Path(trials_dir)
        self._precision = precision
        self._kept = kept
        self._residency = dict(residency or {})
        self._memory_sharers = memory_sharers
        self._limits = dict(limits or {})
        self._original = None if original_folder is None else Path(original_folder)
        self._start = None if start_folder is None else Path(start_folder)
        self._parent = None if parent_folder is None else Path(parent_folder)
        self._stop = threading.Event()
        self._return = threading.Event()
        self._trainer: Trainer | None = None
        self._rows: dict[str, list[TokenRow]] = {}
        self._packs: list[list[str]] | None = None

    def load(self) -> dict[str, Any]:
        """Load the base and the curated splits, packed if they were packed; returns where: `device` and `pid`."""
        import torch

        from qlora_core.data.dataset import read_split
        from qlora_core.data.packing import read_packs
        from qlora_core.model.base import choose_device

        device = choose_device()
        if device == "cpu":
            # One core per worker: threads of several workers on the same cores slow each other down many times over.
            torch.set_num_threads(1)
        self._rows = {split: read_split(self._curated_folder, split) for split in ("train", "validation")}
        self._packs = read_packs(self._curated_folder)
        self._load_base(self._precision)
        return {"device": device, "pid": os.getpid()}

    def run(self, trials: Sequence[Mapping[str, Any]], until_steps: Sequence[int]) -> list[dict[str, Any]]:
        """Train a pack of trials ({"id", "params", "rungs"} each) from their newest checkpoints up to `until_steps`.

        `rungs` is what is known of a trial so far, a {"step", "loss"} each. Returns for each the fields of
        TrialProgress, with `seconds` of this segment alone: its share of the pack's time.

        Ends as soon as one trial has come to its end, and after `come_back`; the others are `interrupted` and `held`:
        they stay in memory, and the next call is to name them. Ends early after `stop` too, with everything in
        checkpoints and nothing held. A trial that cannot go on has its `error` there. Raises SweepError when another
        process still trains one of them, and LeaseLostError when one on another machine does.
        """
        self._return.clear()
        started = time.monotonic()
        orders = [self._order(trial) for trial in trials]
        with ExitStack() as owned:
            for order in sorted(orders, key=lambda order: order.id):  # one order for all, so that no two wait for ever
                owned.enter_context(self._owned(order.id))
            trainer = self._trainer_for(orders[0].params)
            results = trainer.run(
                orders, list(until_steps), should_stop=self._stop.is_set, should_return=self._return.is_set
            )
        share = (time.monotonic() - started) / len(orders)
        held = trainer.held
        return [{**asdict(progress), "seconds": share, "held": progress.id in held} for progress in results]

    def come_back(self) -> None:
        """Ask a running segment to end soon, its trials held: there are others to train beside them."""
        self._return.set()

    def let_go(self) -> None:
        """Write checkpoints of the trials that are held between calls, and free their slots."""
        if self._trainer is None:
            return
        with ExitStack() as owned:
            for trial_id in sorted(self._trainer.held):
                owned.enter_context(self._owned(trial_id))
            self._trainer.release()

    def export(self, trial: Mapping[str, Any], out: str) -> dict[str, Any]:
        """Write the trial's adapter as a PEFT folder; returns the compute `precision` it was trained in."""
        from qlora_core.model.base import choose_device, choose_precision

        order = self._order(trial)
        with self._owned(order.id):
            self._trainer_for(order.params).export(order, Path(out))
        dtype = choose_precision(order.params.precision, choose_device())
        return {"precision": str(dtype).removeprefix("torch.")}

    def stop(self) -> None:
        """Ask a running segment to write its checkpoint and end."""
        self._stop.set()

    def _owned(self, trial_id: str) -> Any:
        # A worker whose driver was killed may live a moment longer: two writers must never share a checkpoint folder.
        lock = self._trials_dir / f"{trial_id}.lock"
        return exclusive_lock(lock, purpose=f"trial {trial_id} is being trained elsewhere", wait_s=_LEFT_BEHIND_S)

    def _order(self, trial: Mapping[str, Any]) -> "Trial":
        from qlora_core.training.trial import Trial

        scores = {rung["step"]: rung["loss"] for rung in trial.get("rungs", ())}
        return Trial(trial["id"], TrainConfig(**trial["params"]), scores)

    def _trainer_for(self, params: TrainConfig) -> "Trainer":
        if self._trainer is None or params.precision != self._precision:
            self._load_base(params.precision)
        if self._trainer is None:
            raise RuntimeError("the base was loaded and yet there is no trainer")
        return self._trainer

    def _load_base(self, precision: str) -> None:
        from qlora_core.model.base import choose_device, load_quantized
        from qlora_core.sweep.keeper import StoreKeeper
        from qlora_core.training.trainer import PassLimits, Trainer

        if self._trainer is not None:
            self._trainer.release()
        # Let go of the old base first: two do not fit where one does.
        self._trainer = None
        device = choose_device()
        sharers = self._memory_sharers if device == "cpu" else 1  # a GPU belongs to one worker
        base = load_quantized(
            self._quantized_folder, precision=precision, device=device, memory_sharers=sharers, **self._residency
        )
        keeper = StoreKeeper(**self._kept) if self._kept else None
        train, validation = self._rows["train"], self._rows["validation"]
        limits = PassLimits(**self._limits)
        begins = (self._original, self._start, self._parent)
        self._trainer = Trainer(base, train, validation, self._trials_dir, keeper, self._packs, limits, *begins)
        self._precision = precision
        _LOGGER.info("base loaded from %s in %s", self._quantized_folder, precision)
