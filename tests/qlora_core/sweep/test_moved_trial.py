"""A trial that is interrupted on one machine goes on on another, which has nothing but the store."""

import fcntl
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from qlora_core.config.train import TrainConfig
from qlora_core.errors import LeaseLostError, SweepError
from qlora_core.store import disk
from qlora_core.store.store import open_store
from qlora_core.store.work import WorkArea
from qlora_core.sweep.keeper import StoreKeeper, discard_work
from qlora_core.sweep.lock import DRIVER_LOCK, exclusive_lock
from qlora_core.sweep.worker import SweepWorker

if TYPE_CHECKING:
    from qlora_core.training.trainer import Trainer
    from qlora_core.training.trial import Trial, TrialProgress

STEPS = 8
NAME = "sweep/0123456789abcdef"
AREA = f"{NAME}/t000"
PARAMS: dict[str, Any] = {
    "lora_rank": 4,
    "lora_dropout": 0.1,
    "learning_rate": 5e-3,
    "max_steps": STEPS,
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "optimizer": "adamw",
    "checkpoint_every_steps": 2,
    "precision": "float32",
}
ORDER = {"id": "t000", "params": PARAMS}
Machine = Callable[..., "Trainer"]


def trial(**changed: Any) -> "Trial":
    from qlora_core.training.trial import Trial

    return Trial("t000", TrainConfig(**{**PARAMS, **changed}))


def kept_in(store: Path) -> dict[str, Any]:
    settings = {"url": str(store), "cache_dir": str(store / "cache")}
    return {"store": settings, "name": NAME, "lease": "stage/sweep/x", "inputs": {"curate": "d" * 64}}


def weights(folder: Path, step: int = STEPS) -> bytes:
    return (folder / "t000" / f"step-{step:08d}" / "adapter.safetensors").read_bytes()


def run(trainer: "Trainer", one: "Trial", until_step: int | None = None, **settings: Any) -> "TrialProgress":
    (progress,) = trainer.run([one], until_step, **settings)
    return progress


def at_step(step: int, act: Callable[[], Any]) -> Callable[[], bool]:
    """What is asked before every step, and acts before the one after `step`."""
    asked = iter(range(STEPS + 1))

    def should_stop() -> bool:
        if next(asked) == step:
            act()
        return False

    return should_stop


@pytest.fixture(scope="module")
def machine(quantized: Path, curated: Path) -> Machine:
    """Makes a trainer over one base: `machine(folder, store)`."""
    import torch

    from qlora_core.data.dataset import read_split
    from qlora_core.model.base import load_quantized
    from qlora_core.training.trainer import Trainer

    torch.set_num_threads(1)
    base = load_quantized(quantized, precision="float32")
    train, validation = read_split(curated, "train"), read_split(curated, "validation")

    def make(folder: Path, store: Path | None = None) -> Trainer:
        return Trainer(base, train, validation, folder, StoreKeeper(**kept_in(store)) if store else None)

    return make


@pytest.fixture(scope="module")
def straight(machine: Machine, tmp_path_factory: pytest.TempPathFactory) -> tuple["TrialProgress", bytes]:
    """The same trial without an interruption: where it ends, and its adapter."""
    folder = tmp_path_factory.mktemp("straight")
    return run(machine(folder), trial()), weights(folder)


def stored_label(store: Path) -> str | None:
    snapshot = WorkArea(open_store(str(store), store / "cache").backend, AREA).newest()
    return snapshot.label if snapshot else None


class _Crash(BaseException):
    """The machine is gone: no handler of the code under test may run on it."""


def crash() -> None:
    raise _Crash


# --- moving on


def test_trial_of_a_crashed_machine_goes_on_elsewhere_bit_for_bit(
    machine: Machine, straight: tuple[Any, bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with pytest.raises(_Crash):
        run(machine(tmp_path / "a", tmp_path / "store"), trial(), should_stop=at_step(5, crash))
    assert stored_label(tmp_path / "store") == "step-00000004"
    resumed = run(machine(tmp_path / "b", tmp_path / "store"), trial())
    assert f"t000 goes on from {tmp_path}/b/t000/step-00000004" in caplog.text
    assert (resumed.curve, resumed.validation_loss) == (straight[0].curve, straight[0].validation_loss)
    assert weights(tmp_path / "b") == straight[1]
    assert stored_label(tmp_path / "store") == "step-00000008"
    # Negative control: without the store it begins at the beginning.
    caplog.clear()
    run(machine(tmp_path / "c"), trial(), 2)
    assert "goes on from" not in caplog.text


def test_worker_elsewhere_trains_on_and_exports_what_the_first_one_stopped_at(
    quantized: Path, curated: Path, straight: tuple[Any, bytes], tmp_path: Path
) -> None:
    def worker(name: str) -> SweepWorker:
        made = SweepWorker(
            str(quantized), str(curated), str(tmp_path / name), "float32", kept=kept_in(tmp_path / "store")
        )
        made.load()
        return made

    assert worker("a").run([ORDER], [5])[0]["step"] == 5
    (elsewhere,) = worker("b").run([ORDER], [STEPS])
    assert (elsewhere["curve"], elsewhere["validation_loss"]) == (straight[0].curve, straight[0].validation_loss)
    assert weights(tmp_path / "b") == straight[1]
    assert worker("c").export(ORDER, str(tmp_path / "out")) == {"precision": "float32"}
    assert weights(tmp_path / "c") == straight[1]
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_newest_checkpoint_wins_wherever_it_is(
    machine: Machine, straight: tuple[Any, bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    store = tmp_path / "store"
    run(machine(tmp_path / "a", store), trial(), 2)
    run(machine(tmp_path / "b", store), trial(), 4)
    caplog.clear()
    run(machine(tmp_path / "a", store), trial(), 6)
    assert f"goes on from {tmp_path}/a/t000/step-00000004" in caplog.text
    # What is here and as new is not fetched; what is here and damaged is.
    caplog.clear()
    run(machine(tmp_path / "a", store), trial(), 6)
    assert "is back from" not in caplog.text
    (tmp_path / "a" / "t000" / "step-00000006" / "state.json").write_text("{}")
    assert run(machine(tmp_path / "a", store), trial()).curve == straight[0].curve
    assert "step-00000006 is back from" in caplog.text
    assert weights(tmp_path / "a") == straight[1]


def test_checkpoint_tells_how_the_trial_stood_at_earlier_rungs(quantized: Path, curated: Path, tmp_path: Path) -> None:
    worker = SweepWorker(str(quantized), str(curated), str(tmp_path / "a"), "float32", kept_in(tmp_path / "store"))
    worker.load()
    (first,) = worker.run([{**ORDER, "rungs": []}], [2])
    rungs = [{"step": 2, "loss": first["validation_loss"]}]
    (second,) = worker.run([{**ORDER, "rungs": rungs}], [4])
    assert second["validation_loss"] != first["validation_loss"]
    # A driver elsewhere has an empty study, and asks for everything from the beginning.
    elsewhere = SweepWorker(str(quantized), str(curated), str(tmp_path / "b"), "float32", kept_in(tmp_path / "store"))
    elsewhere.load()

    def facts(progress: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in progress.items() if name != "seconds"}

    assert facts(elsewhere.run([{**ORDER, "rungs": []}], [2])[0]) == facts(first)
    assert facts(elsewhere.run([{**ORDER, "rungs": rungs}], [4])[0]) == facts(second)
    # Negative control: where it is not known, the answer is where the trial stands.
    assert elsewhere.run([{**ORDER, "rungs": []}], [3])[0]["step"] == 4


def test_kept_checkpoint_of_other_settings_is_not_used_and_replaced(
    machine: Machine, straight: tuple[Any, bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(machine(tmp_path / "a", tmp_path / "store"), trial(learning_rate=1e-3), 6)
    progress = run(machine(tmp_path / "b", tmp_path / "store"), trial(), 4)
    assert "step-00000006 is not used: learning_rate is 0.001 there and 0.005 here" in caplog.text
    assert progress.curve == straight[0].curve[:4]
    assert stored_label(tmp_path / "store") == "step-00000004"
    run(machine(tmp_path / "b", tmp_path / "store"), trial())
    assert weights(tmp_path / "b") == straight[1]


# --- a store that fails


@contextmanager
def broken(store: Path) -> Iterator[None]:
    """A file in the store's place."""
    store.rename(store.with_name("moved"))
    store.write_text("not a folder")
    try:
        yield
    finally:
        store.unlink()
        store.with_name("moved").rename(store)


@contextmanager
def away(store: Path) -> Iterator[None]:
    """Somebody holds the store's locks and does not move."""
    with ExitStack() as held:
        for number in range(256):
            lock = store / "v1" / "lock" / f"{number:02x}.lock"
            fcntl.flock(held.enter_context(lock.open("a")), fcntl.LOCK_EX)
        yield


@pytest.mark.parametrize(("failing", "told"), [(broken, "a file stands where a folder"), (away, "has been locked for")])
def test_store_that_fails_in_mid_training_is_told_once_and_ends_nothing(
    machine: Machine,
    straight: tuple[Any, bytes],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    failing: Callable[[Path], Any],
    told: str,
) -> None:
    monkeypatch.setattr(disk, "_LOCK_WAIT_S", 0.05)
    store = tmp_path / "store"
    trainer = machine(tmp_path / "a", store)
    run(trainer, trial(checkpoint_every_steps=1), 1)
    outage = failing(store)
    try:
        run(trainer, trial(checkpoint_every_steps=1), 7, should_stop=at_step(2, outage.__enter__))
    finally:
        outage.__exit__(None, None, None)
    warnings = [entry.message for entry in caplog.records if "on this machine alone" in entry.message]
    assert len(warnings) == 1 and "t000" in warnings[0] and told in warnings[0]
    assert stored_label(store) == "step-00000003"
    # The store is back, and so is the protection. It is asked at once where asking costs next to nothing.
    monkeypatch.setattr("qlora_core.sweep.keeper._QUIET_PER_WAIT", 0.0)
    progress = run(machine(tmp_path / "a", store), trial())
    assert (progress.curve, weights(tmp_path / "a")) == (straight[0].curve, straight[1])
    assert stored_label(store) == "step-00000008"


def test_store_that_answers_slowly_that_it_is_away_is_left_alone_for_a_while(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "_LOCK_WAIT_S", 0.5)
    store = tmp_path / "store"
    keeper = StoreKeeper(**kept_in(store))
    run(machine(tmp_path / "a", store), trial(), 2)
    with away(store):
        assert keeper.bring_back("t000", tmp_path / "b" / "t000", None) is False
    # 0.5 s of waiting are 5 s of quiet, for every trial.
    assert keeper.bring_back("t000", tmp_path / "b" / "t000", None) is False
    assert StoreKeeper(**kept_in(store)).bring_back("t000", tmp_path / "b" / "t000", None) is True


@pytest.mark.parametrize("until", [4, STEPS])
def test_later_checkpoint_that_an_outage_hid_is_not_replaced_by_an_earlier_one(
    machine: Machine,
    straight: tuple[Any, bytes],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    until: int,
) -> None:
    monkeypatch.setattr("qlora_core.sweep.keeper._QUIET_PER_WAIT", 0.0)
    store = tmp_path / "store"
    run(machine(tmp_path / "a", store), trial(), 6)
    labels: list[str | None] = []
    outage = broken(store)
    outage.__enter__()
    asked = iter(range(STEPS + 1))

    def should_stop() -> bool:
        if next(asked) == 0:
            outage.__exit__(None, None, None)
        labels.append(stored_label(store))
        return False

    run(machine(tmp_path / "b", store), trial(), until, should_stop=should_stop)
    assert set(labels[:6]) == {"step-00000006"}
    assert "has step-00000006 of it" in caplog.text
    assert stored_label(store) == ("step-00000006" if until == 4 else "step-00000008")
    progress = run(machine(tmp_path / "c", store), trial())
    assert (progress.curve, weights(tmp_path / "c")) == (straight[0].curve, straight[1])


def test_checkpoint_that_could_not_be_put_here_is_not_replaced_by_an_earlier_one(tmp_path: Path) -> None:
    from qlora_core.training.checkpoint import Checkpoint

    store = tmp_path / "store"
    made = {step: tmp_path / "made" / f"step-{step:08d}" for step in (2, 6, 7)}
    for step, folder in made.items():
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(f"{step}")
    StoreKeeper(**kept_in(store)).keep("t000", Checkpoint(6, made[6]))
    keeper, here = StoreKeeper(**kept_in(store)), tmp_path / "b" / "t000"
    (here / "step-00000006").mkdir(parents=True)
    (here / "step-00000006" / "in the way").touch()
    assert keeper.bring_back("t000", here, None) is False
    keeper._quiet_until = 0.0
    keeper.keep("t000", Checkpoint(2, made[2]))
    assert stored_label(store) == "step-00000006"
    keeper.keep("t000", Checkpoint(7, made[7]))
    assert stored_label(store) == "step-00000007"
    # Negative control: what was fetched may be refused, and then an earlier one takes its place.
    (here / "step-00000006" / "in the way").unlink()
    assert keeper.bring_back("t000", here, None) is True
    keeper.keep("t000", Checkpoint(2, made[2]))
    assert stored_label(store) == "step-00000002"


def test_who_is_further_keeps_the_trial_from_one_that_an_outage_left_behind(tmp_path: Path) -> None:
    from qlora_core.training.checkpoint import Checkpoint

    store = tmp_path / "store"
    made = {step: tmp_path / "made" / f"step-{step:08d}" for step in (2, 6, 7)}
    for step, folder in made.items():
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(f"{step}")
    first, behind = StoreKeeper(**kept_in(store)), StoreKeeper(**kept_in(store))
    first.keep("t000", Checkpoint(6, made[6]))
    behind.keep("t000", Checkpoint(2, made[2]))
    first.keep("t000", Checkpoint(7, made[7]))
    assert stored_label(store) == "step-00000007"


def test_trial_that_another_machine_took_over_ends(
    machine: Machine, straight: tuple[Any, bytes], tmp_path: Path
) -> None:
    store = tmp_path / "store"
    first = machine(tmp_path / "a", store)
    other = StoreKeeper(**kept_in(store))
    taking = at_step(3, lambda: other.bring_back("t000", tmp_path / "b" / "t000", None))
    with pytest.raises(LeaseLostError, match=r"t000/snapshot\.json was taken over by another process"):
        run(first, trial(), should_stop=taking)
    assert stored_label(store) == "step-00000002"
    assert run(machine(tmp_path / "b", store), trial()).curve == straight[0].curve
    # A later segment here is a trial taken over anew, and no conflict.
    assert run(first, trial()).curve == straight[0].curve


# --- the end


def test_discarded_work_is_gone_here_and_in_the_store(machine: Machine, tmp_path: Path) -> None:
    work_dir = tmp_path / "sweeps" / NAME.rpartition("/")[2]
    store = open_store(str(tmp_path / "store"), tmp_path).backend
    run(machine(work_dir / "trials", tmp_path / "store"), trial(), 2)
    neighbour = WorkArea(store, f"{NAME}0/t000")
    neighbour.save(work_dir / "trials" / "t000" / "step-00000002", "step-00000002")
    with (
        exclusive_lock(work_dir / DRIVER_LOCK, purpose="driving", wait_s=0),
        pytest.raises(SweepError, match="this sweep still runs"),
    ):
        discard_work(work_dir, store)
    assert stored_label(tmp_path / "store") == "step-00000002"
    for _ in range(2):
        discard_work(work_dir, store)
        assert not work_dir.exists()
        assert {listed.name.rpartition("/")[0].split("/")[3] for listed in store.list("v1/work/")} == {
            "0123456789abcdef0"
        }
    assert neighbour.newest() is not None
