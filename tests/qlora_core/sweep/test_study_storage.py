"""Where studies are kept: any URL, refused at once where it cannot be written, put aside, read beside a writer."""

import sqlite3
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from qlora_core.config.sweep import SweepConfig
from qlora_core.config.train import TrainConfig
from qlora_core.errors import SweepError
from qlora_core.sweep.record import TrialRecord
from qlora_core.sweep.status import sweep_status
from qlora_core.sweep.study import SweepStudy, open_study, set_aside

SWEEP = SweepConfig(space={"lora_rank": [4, 8]})


def finish(study: SweepStudy, record: TrialRecord, loss: float) -> None:
    record.loss, record.state, record.rungs = loss, "complete", [{"step": 2, "loss": loss}]
    record.steps, record.tokens, record.seconds = 2, 100, 36.0
    study.save(record)
    study.tell(record)


def test_a_url_keeps_studies_of_several_sweeps_apart(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/shared.db"
    with open_study(url, SWEEP, TrainConfig(), {"data": "a"}, "first") as study:
        finish(study, study.records(2)[0], 1.5)
    with open_study(url, SWEEP, TrainConfig(), {"data": "b"}, "second") as study:
        assert [record.state for record in study.records(2)] == ["waiting", "waiting"]
    with open_study(url, SWEEP, TrainConfig(), {"data": "a"}, "first") as study:
        assert [record.loss for record in study.records(2)] == [1.5, None]


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("sqlite:////proc/nowhere/study.db", r"cannot open the study /proc/nowhere/study\.db for writing"),
        ("sqlite:///:memory:", "in memory"),
        ("postgresql+nodriver://host/db", r"postgresql\+nodriver://host/db"),
        ("nonsense://host/db", "nonsense://host/db"),
    ],
)
def test_a_url_that_cannot_be_written_is_named_at_once(url: str, said: str) -> None:
    with pytest.raises(SweepError, match=said), open_study(url, SWEEP, TrainConfig(), {}, "s"):
        pass


def test_a_database_that_can_only_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    with open_study(path, SWEEP, TrainConfig(), {}):
        pass
    sqlite3.connect(path).execute("PRAGMA journal_mode=DELETE").close()
    url = f"sqlite:///file:{path}?mode=ro&uri=true"
    with pytest.raises(SweepError, match=r"study\.db.*readonly"), open_study(url, SWEEP, TrainConfig(), {}):
        pass


@pytest.mark.parametrize(
    ("storage", "said"), [("postgresql://user:secret@host/db", "PGPASSWORD"), ("study.db", "SQLAlchemy URL")]
)
def test_a_password_or_no_url_in_the_config_is_refused(storage: str, said: str) -> None:
    with pytest.raises(ValidationError, match=said) as refused:
        SweepConfig(storage=storage)
    assert said == "SQLAlchemy URL" or "no password belongs in a config" in str(refused.value)


def test_a_study_put_aside_makes_room_and_is_kept(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/shared.db"
    places = []
    for _ in range(2):
        with open_study(url, SWEEP, TrainConfig(), {}, "key") as study:
            assert study.drawn == 0
            finish(study, study.records(2)[0], 1.0)
        places.append(set_aside(url, "key", "done"))
    assert places == [f"study key-done in {tmp_path}/shared.db", f"study key-done-2 in {tmp_path}/shared.db"]
    assert sweep_status(url, "key-done-2", None)["counts"]["complete"] == 1


def test_status_reads_beside_the_writer(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    assert sweep_status(path, "sweep", None)["state"] == "not begun"
    with open_study(path, SWEEP, TrainConfig(), {}) as study:
        first, second = study.records(2)
        finish(study, first, 1.25)
        second.worker, second.reached = "worker-3", 1
        study.note_dispatch(second)
        status = sweep_status(path, "sweep", price_per_gpu_hour=10.0)
    assert status["counts"] == {"waiting": 1, "complete": 1, "pruned": 0, "failed": 0}
    assert [(row["id"], row["worker"]) for row in status["trials"]] == [("t000", None), ("t001", "worker-3")]
    assert status["best"] == "t000"
    assert status["cost"]["cost"] == 0.1  # 36 s of an hour at 10
    assert {row["params"]["lora_rank"] for row in status["trials"]} == {4, 8}


@pytest.mark.parametrize(
    "settings", [{"method": "random"}, {"method": "tpe", "trials": 4}, {"trials": 3}, {"method": "cmaes"}]
)
def test_an_empty_search_space_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"the search space is empty|cmaes searches ranges"):
        SweepConfig(**settings)
