"""The durable state of a sweep: an Optuna study in SQLite at `work_dir/study.db`. Only the driver opens it.

A trial's record is written in one transaction before its state is told, and everything else (which rung it is due at,
who survives) is recomputed from the records. So a driver may be killed between any two writes: the next one opens the
same study, finds each trial with what it had reported, and repeats no finished work. Trials keep their ids: `t000` is
Optuna's trial 0. Knows nothing of workers.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from qlora_core.config.sweep import SweepConfig
from qlora_core.config.train import TrainConfig
from qlora_core.errors import SweepError
from qlora_core.sweep.record import TrialRecord
from qlora_core.sweep.space import drawn_values, make_sampler, suggest

_STUDY = "sweep"
_IDENTITY = "identity"
_DRAWN = "drawn"
_RECORD = "record"
_STATES = {
    TrialState.RUNNING: "waiting",
    TrialState.WAITING: "waiting",
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}
_LOGGER = logging.getLogger(__name__)


class SweepStudy:
    """Trials and their records. Made by `open_study`."""

    def __init__(self, study: optuna.Study, sweep: SweepConfig, train: TrainConfig) -> None:
        self._study = study
        self._sweep = sweep
        self._train = train

    def records(self, count: int) -> list[TrialRecord]:
        """The first `count` trials in the order drawn, drawing those that are missing."""
        for number in range(count):
            trials = self._study.get_trials(deepcopy=False)
            if number >= len(trials):
                self._draw(number)
            elif not trials[number].user_attrs.get(_DRAWN):
                self._finish_drawing(number, trials[number])
        return [self._record(trial) for trial in self._study.get_trials(deepcopy=False)[:count]]

    def save(self, record: TrialRecord) -> None:
        """Keep the record, whole or not at all."""
        self._storage.set_trial_user_attr(self._trial_id(record), _RECORD, record.stored())

    def tell(self, record: TrialRecord) -> None:
        """Show Optuna the record's rungs and, once it is finished, its state: samplers learn from these."""
        trial = self._storage.get_trial(self._trial_id(record))
        if trial.state.is_finished():
            return
        for step, loss in record.rung_losses.items():
            if step not in trial.intermediate_values:
                self._storage.set_trial_intermediate_value(trial._trial_id, step, loss)
        # A grid sampler would stop the study's own loop at its last point, and there is no such loop here.
        self._study.sampler = optuna.samplers.RandomSampler(seed=0)
        if record.state == "complete":
            self._study.tell(trial.number, record.loss)
        elif record.state in ("pruned", "failed"):
            self._study.tell(trial.number, state=TrialState.PRUNED if record.state == "pruned" else TrialState.FAIL)

    @property
    def _storage(self) -> optuna.storages.BaseStorage:
        return self._study._storage

    def _trial_id(self, record: TrialRecord) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._study._study_id, int(record.id[1:]))

    def _draw(self, number: int) -> None:
        self._study.sampler = make_sampler(self._sweep, number)
        self._suggest(self._study.ask())

    def _finish_drawing(self, number: int, trial: FrozenTrial) -> None:
        # The driver died while drawing: parameters already drawn stay, the others are drawn as they would have been.
        self._study.sampler = make_sampler(self._sweep, number)
        self._suggest(optuna.Trial(self._study, trial._trial_id))

    def _suggest(self, trial: optuna.Trial) -> None:
        for name, values in sorted(self._sweep.space.items()):
            if self._sweep.method != "grid":
                self._study.sampler = make_sampler(self._sweep, trial.number, name)
            suggest(trial, name, values)
        trial.set_user_attr(_DRAWN, True)

    def _record(self, trial: FrozenTrial) -> TrialRecord:
        params = {**self._train.model_dump(mode="json"), **drawn_values(trial.params)}
        record = TrialRecord(id=f"t{trial.number:03d}", params=params)
        if _RECORD in trial.user_attrs:
            record.restore(trial.user_attrs[_RECORD])
        record.state = _STATES[trial.state]
        return record


@contextmanager
def open_study(path: Path, sweep: SweepConfig, train: TrainConfig, identity: Mapping[str, Any]) -> Iterator[SweepStudy]:
    """Open the study at `path`, or begin it. `identity` is all that its results depend on, as JSON data.

    Raises SweepError when the file cannot be opened as a study, or when it belongs to a sweep with another identity:
    results of two different sweeps are never mixed.
    """
    # Optuna's own lines repeat ours.
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        storage = optuna.storages.RDBStorage(f"sqlite:///{path}", engine_kwargs={"connect_args": {"timeout": 60}})
        study = optuna.create_study(
            storage=storage,
            study_name=_STUDY,
            direction="minimize",
            load_if_exists=True,
            pruner=optuna.pruners.NopPruner(),
        )
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        raise SweepError(
            f"cannot open the study {path}: {error}; make its folder writable, or move the file away to start anew"
        ) from error
    try:
        _check_identity(study, path, identity)
        yield SweepStudy(study, sweep, train)
    finally:
        storage.remove_session()
        storage.engine.dispose()


def _check_identity(study: optuna.Study, path: Path, identity: Mapping[str, Any]) -> None:
    known = study.user_attrs.get(_IDENTITY)
    if known is None:
        study.set_user_attr(_IDENTITY, dict(identity))
        return
    changed = sorted(name for name in {*known, *identity} if known.get(name) != identity.get(name))
    if changed:
        raise SweepError(
            f"{path} holds another sweep (different: {', '.join(changed)}); give this one another work folder, "
            "or move the file away to start anew"
        )
    _LOGGER.info("continuing the sweep in %s with %d trials", path, len(study.get_trials(deepcopy=False)))


def set_aside(path: Path) -> Path:
    """Move a study away whose every trial failed, so that the same command tries again; returns its new place."""
    kept = path.with_name(f"{path.stem}-failed{path.suffix}")
    path.replace(kept)
    return kept


def best_record(records: Sequence[TrialRecord]) -> TrialRecord | None:
    """The complete trial with the lowest loss, the one drawn first among equals; None when none is complete."""
    complete = [record for record in records if record.state == "complete" and record.loss is not None]
    return min(complete, key=lambda record: (record.loss, int(record.id[1:])), default=None)
