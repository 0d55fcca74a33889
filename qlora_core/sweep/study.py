"""The durable state of a sweep: an Optuna study in SQLite at `work_dir/study.db`, or where `sweep.storage` says.

Only the driver writes it. A trial's record is written in one transaction before its state is told, and everything else
(which rung it is due at, who survives) is recomputed from the records. So a driver may be killed between any two
writes: the next one opens the same study, finds each trial with what it had reported, and repeats no finished work.
Trials keep their ids: `t000` is Optuna's trial 0. Finalists' extra runs follow after the last trial. Knows no workers.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState, create_trial

from qlora_core.config.sweep import SweepConfig
from qlora_core.config.train import TrainConfig
from qlora_core.errors import SweepError
from qlora_core.sweep.record import TrialRecord
from qlora_core.sweep.space import PointDrawer, drawn_values, make_sampler, suggest
from qlora_core.sweep.storage import close_study, file_url, open_study_in, rename_study, shown

STUDY = "sweep"
"""Name of the study in a file of its own."""

_IDENTITY = "identity"
_DRAWN = "drawn"
_RECORD = "record"
_DISPATCH = "dispatch"
_EXTRA = "extra"
_STATES = {
    TrialState.RUNNING: "waiting",
    TrialState.WAITING: "waiting",
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}
_OUTCOMES = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
_LOGGER = logging.getLogger(__name__)


class SweepStudy:
    """Trials and their records. Made by `open_study`."""

    def __init__(self, study: optuna.Study, sweep: SweepConfig, train: TrainConfig) -> None:
        self._study = study
        self._sweep = sweep
        self._train = train
        self._drawer = None if sweep.method == "tpe" else PointDrawer(sweep)
        self._ids: dict[int, int] = {}
        self._told: dict[int, set[int]] = {}
        self._finished: set[int] = set()
        self._drawn: list[TrialRecord] | None = None

    @property
    def drawn(self) -> int:
        """How many trials have been drawn."""
        return len(self._known())

    def records(self, count: int) -> list[TrialRecord]:
        """The first `count` trials in the order drawn, drawing those that are missing; the same objects every time."""
        known = self._known()
        for number in range(len(known), count):
            known.append(self._record(self._draw(number)))
        return known[:count]

    def extras(self) -> list[TrialRecord]:
        """The runs that finalists were given beside the trials, in the order added."""
        trials = self._study.get_trials(deepcopy=False)
        return [self._record(trial) for trial in trials if _EXTRA in trial.user_attrs]

    def add_extra(self, of: TrialRecord, role: str, seed: int) -> TrialRecord:
        """One more run of a trial's settings, from another seed: `role` is "seed" or "check"."""
        template = create_trial(
            state=TrialState.RUNNING, user_attrs={_EXTRA: {"of": of.id, "role": role, "seed": seed}, _DRAWN: True}
        )
        number = len(self._known()) + len(self.extras())
        return self._record(self._store(template, number), params=of.params)

    def save(self, record: TrialRecord) -> None:
        """Keep the record, whole or not at all."""
        self._storage.set_trial_user_attr(self._ids[record.number], _RECORD, record.stored())

    def note_dispatch(self, record: TrialRecord) -> None:
        """Keep who trains the record's trial now, and up to which rung it was let go on."""
        self._storage.set_trial_user_attr(self._ids[record.number], _DISPATCH, record.dispatched())

    def tell(self, record: TrialRecord) -> None:
        """Show Optuna the record's state once it is finished and, where its sampler learns from them, its rungs."""
        if record.number in self._finished:
            return
        told = self._told[record.number] if self._sweep.method == "tpe" else {*record.rung_losses}
        for step, loss in record.rung_losses.items():
            if step not in told:
                self._storage.set_trial_intermediate_value(self._ids[record.number], step, loss)
                told.add(step)
        if record.state in _OUTCOMES:
            values = record.values(self._sweep.objectives) if record.state != "failed" else None
            self._storage.set_trial_state_values(self._ids[record.number], _OUTCOMES[record.state], values)
            self._finished.add(record.number)

    @property
    def _storage(self) -> optuna.storages.BaseStorage:
        return self._study._storage

    def _known(self) -> list[TrialRecord]:
        if self._drawn is None:
            trials = [t for t in self._study.get_trials(deepcopy=False) if _EXTRA not in t.user_attrs]
            # Where a driver died while drawing, what is drawn stays, and the rest is drawn as it would have been.
            self._drawn = [
                self._record(trial if trial.user_attrs.get(_DRAWN) else self._finish_drawing(trial)) for trial in trials
            ]
        return self._drawn

    def _draw(self, number: int) -> FrozenTrial:
        if self._drawer is not None:
            template = self._drawer.draw(number, self._known())
            template.user_attrs = {_DRAWN: True}
            return self._store(template, number)
        self._study.sampler = make_sampler(self._sweep, number)
        return self._suggest(self._study.ask())

    def _store(self, template: FrozenTrial, number: int) -> FrozenTrial:
        template._trial_id = self._storage.create_new_trial(self._study._study_id, template)
        template.number = number
        return template

    def _finish_drawing(self, trial: FrozenTrial) -> FrozenTrial:
        self._study.sampler = make_sampler(self._sweep, trial.number)
        return self._suggest(optuna.Trial(self._study, trial._trial_id))

    def _suggest(self, trial: optuna.Trial) -> FrozenTrial:
        for name, values in sorted(self._sweep.space.items()):
            if self._sweep.method != "grid":
                self._study.sampler = make_sampler(self._sweep, trial.number, name)
            suggest(trial, name, values)
        trial.set_user_attr(_DRAWN, True)
        return self._storage.get_trial(trial._trial_id)

    def _record(self, trial: FrozenTrial, params: Mapping[str, Any] | None = None) -> TrialRecord:
        self._ids[trial.number] = trial._trial_id
        self._told[trial.number] = set(trial.intermediate_values)
        if trial.state.is_finished():
            self._finished.add(trial.number)
        extra = trial.user_attrs.get(_EXTRA)
        if extra is not None and params is None:
            params = next(record.params for record in self._known() if record.id == extra["of"])
        return _record_of(trial, params or self._train.model_dump(mode="json"))


def _record_of(trial: FrozenTrial, params: Mapping[str, Any]) -> TrialRecord:
    extra = trial.user_attrs.get(_EXTRA)
    own = {} if extra is None else {"seed": extra["seed"]}
    record = TrialRecord(id=f"t{trial.number:03d}", params={**params, **drawn_values(trial.params), **own})
    if extra is not None:
        record.role, record.of = extra["role"], extra["of"]
    record.restore({**trial.user_attrs.get(_RECORD, {}), **trial.user_attrs.get(_DISPATCH, {})})
    record.state = _STATES[trial.state]
    return record


def read_records(study: optuna.Study) -> list[TrialRecord]:
    """All trials as they stand, and the extra runs of finalists after them; nothing is written or drawn.

    Settings that are not varied are left out of `params`.
    """
    found: dict[str, TrialRecord] = {}
    for trial in study.get_trials(deepcopy=False):
        of = trial.user_attrs.get(_EXTRA, {}).get("of")
        record = _record_of(trial, found[of].params if of is not None else {})
        found[record.id] = record
    return list(found.values())


@contextmanager
def open_study(
    where: Path | str,
    sweep: SweepConfig,
    train: TrainConfig,
    identity: Mapping[str, Any],
    name: str = STUDY,
) -> Iterator[SweepStudy]:
    """Open the study `name` at a path or URL, or begin it. `identity` is all that its results depend on, as JSON data.

    Raises SweepError when it cannot be opened for reading and writing, or when it belongs to a sweep with another
    identity: results of two different sweeps are never mixed.
    """
    if isinstance(where, Path):
        where.parent.mkdir(parents=True, exist_ok=True)
        where = file_url(where)
    study = open_study_in(where, name, len(sweep.objectives))
    try:
        _check_identity(study, shown(where), identity)
        yield SweepStudy(study, sweep, train)
    finally:
        close_study(study)


def _check_identity(study: optuna.Study, place: str, identity: Mapping[str, Any]) -> None:
    known = study.user_attrs.get(_IDENTITY)
    if known is None:
        study.set_user_attr(_IDENTITY, dict(identity))
        return
    changed = sorted(name for name in {*known, *identity} if known.get(name) != identity.get(name))
    if changed:
        raise SweepError(
            f"{place} holds another sweep (different: {', '.join(changed)}); give this one another work folder, "
            "or move the file away to start anew"
        )
    _LOGGER.info("continuing the sweep in %s with %d trials", place, len(study.get_trials(deepcopy=False)))


def set_aside(where: Path | str, name: str, label: str) -> str:
    """Put a study away as failed or done, so that the same sweep begins a new one; returns its new place."""
    if isinstance(where, Path):
        kept = where.with_name(f"{where.stem}-{label}{where.suffix}")
        where.replace(kept)
        return str(kept)
    return f"study {rename_study(where, name, f'{name}-{label}')} in {shown(where)}"
