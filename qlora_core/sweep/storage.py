"""Where studies are kept: SQLite in a file, or any database that SQLAlchemy has a driver for. Knows no trials.

SQLite keeps a write-ahead log and flushes it at checkpoints only, so that a write costs no disk seek. Killing a process
loses nothing; a power cut may lose the last writes and never the file, and checkpoints carry what these said.
"""

import itertools
import sqlite3
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import RDBStorage
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from qlora_core.errors import SweepError

_LOCK_WAIT_S = 60.0
_OPENED = "opened"


def file_url(path: Path) -> str:
    """The URL of a SQLite file."""
    return f"sqlite:///{path}"


def shown(url: str) -> str:
    """The URL as it may be shown: the file of a plain SQLite URL, and of others all but a password."""
    try:
        parsed = make_url(url)
    except ArgumentError:
        return url
    return str(parsed.database) if parsed.drivername == "sqlite" else parsed.render_as_string(hide_password=True)


def open_study_in(url: str, name: str, directions: int) -> optuna.Study:
    """The study `name` of `directions` objectives, all to be small; begun where there is none. It can be written.

    Raises SweepError, naming the URL, where the database cannot be reached, read or written, has no driver here, or
    would be gone with the process.
    """
    # Optuna's own lines repeat ours.
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        storage = RDBStorage(url, engine_kwargs=_engine_options(url))
        study = optuna.create_study(
            storage=storage,
            study_name=name,
            directions=[optuna.study.StudyDirection.MINIMIZE] * directions,
            load_if_exists=True,
            pruner=optuna.pruners.NopPruner(),
        )
        study.set_user_attr(_OPENED, datetime.now(UTC).isoformat(timespec="seconds"))
    except ImportError as error:
        raise SweepError(f"sweep.storage {shown(url)} needs a driver that is not installed: {error}") from error
    except (SQLAlchemyError, sqlite3.Error, OSError, optuna.exceptions.OptunaError, ValueError) as error:
        raise SweepError(
            f"cannot open the study {shown(url)} for writing: {_reason(error)}; check that it is a database that "
            "may be written, or move it away to start anew"
        ) from error
    return study


def read_study(url: str, name: str) -> optuna.Study | None:
    """The study for looking at, also while a driver writes to it; None where there is none.

    Raises SweepError where the database cannot be read.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    parsed = make_url(url)
    if parsed.drivername.startswith("sqlite") and not Path(str(parsed.database)).is_file():
        return None
    try:
        return optuna.load_study(study_name=name, storage=RDBStorage(url, engine_kwargs=_engine_options(url)))
    except KeyError:
        return None
    except ImportError as error:
        raise SweepError(f"sweep.storage {shown(url)} needs a driver that is not installed: {error}") from error
    except (SQLAlchemyError, sqlite3.Error, OSError, optuna.exceptions.OptunaError, ValueError) as error:
        raise SweepError(f"cannot read the study {shown(url)}: {_reason(error)}") from error


def rename_study(url: str, name: str, wanted: str) -> str:
    """Give a study another name, with a number behind it where that is taken; returns the name."""
    import sqlalchemy

    engine = sqlalchemy.create_engine(url, **_engine_options(url))
    try:
        with engine.begin() as connection:
            names = {row[0] for row in connection.execute(sqlalchemy.text("SELECT study_name FROM studies"))}
            free = next(
                n for n in itertools.chain([wanted], (f"{wanted}-{k}" for k in itertools.count(2))) if n not in names
            )
            change = sqlalchemy.text("UPDATE studies SET study_name = :new WHERE study_name = :old")
            connection.execute(change, {"new": free, "old": name})
    finally:
        engine.dispose()
    return free


def close_study(study: optuna.Study) -> None:
    """Let go of the database."""
    storage: Any = study._storage
    storage = getattr(storage, "_backend", storage)
    storage.remove_session()
    storage.engine.dispose()


def _engine_options(url: str) -> dict[str, Any]:
    parsed = make_url(url)
    if parsed.drivername != "sqlite" or parsed.query:
        return {"pool_pre_ping": True}
    if parsed.database in (None, "", ":memory:"):
        raise SweepError(f"sweep.storage {url} keeps the study in memory, where it ends with the process; name a file")
    path = Path(str(parsed.database))
    return {"creator": lambda: _connect(path)}


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=_LOCK_WAIT_S, check_same_thread=False)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")
    return connection


def _reason(error: BaseException) -> str:
    """What the database itself said, under whatever Optuna and SQLAlchemy wrapped it in."""
    while (cause := error.__cause__) is not None:
        error = cause
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
