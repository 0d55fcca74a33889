"""One MLflow client per address, quiet and with its database made by one process at a time.

Knows where the SQLite default lives and how MLflow reports trouble; knows nothing of runs, versions or aliases. Only
the driver process connects: several processes writing to a fresh SQLite file damage it for good.
"""

import fcntl
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_core.errors import RegistryError, RegistryUnavailableError
from qlora_core.telemetry import disable_usage_reporting

if TYPE_CHECKING:
    from mlflow import MlflowClient

_QUIET = {
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # Standard output belongs to `--json`.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # MLflow's own default of 7 retries keeps a user waiting for minutes when the server is simply down.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
}
_PASSING_CODES = {"INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED"}
_CREDENTIALS = re.compile(r"//[^/@\s]+@")
_POLL_S = 0.05
_MOST_TOLD = 400
"""Characters of what MLflow says: its first line may be only the heading of what failed."""


def prepare_environment() -> None:
    """Switch MLflow's usage reporting and chatter off; needed before its first import. Variables already set stay."""
    disable_usage_reporting()
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)


def sqlite_file(tracking_uri: str) -> Path | None:
    """The database file of a `sqlite:///` address, absolute; None for every other address."""
    if not tracking_uri.startswith("sqlite:///"):
        return None
    return Path(tracking_uri.removeprefix("sqlite:///").partition("?")[0]).absolute()


def without_credentials(text: str) -> str:
    """`text` with the user and password of every address in it cut out."""
    return _CREDENTIALS.sub("//", text)


@contextmanager
def registry_errors(doing: str) -> Iterator[None]:
    """Turn what MLflow or its database raises inside the block into a RegistryError saying what was being done."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError) as error:
        said = without_credentials(str(error)).partition("[SQL")[0].split("\n")  # a statement holds what it would store
        told = " ".join(line.strip() for line in said if line.strip()).partition("Traceback")[0][:_MOST_TOLD].strip()
        code = getattr(error, "error_code", "INTERNAL_ERROR")  # a database's own errors have none: locked, gone
        kind = RegistryUnavailableError if code in _PASSING_CODES else RegistryError
        raise kind(
            f"MLflow failed while {doing}: {told}; check registry.tracking_uri and its server or file"
        ) from error


@contextmanager
def registry_lock(tracking_uri: str, *, timeout_s: float = 120.0) -> Iterator[None]:
    """Hold the local registry alone; ends with the process, however it ends.

    Only a SQLite registry can be held: for a server this does nothing, and writers rely on reading back what they
    wrote. Not reentrant. Raises RegistryError when another process holds it for longer than `timeout_s`.
    """
    database = sqlite_file(tracking_uri)
    if database is None:
        yield
        return
    database.parent.mkdir(parents=True, exist_ok=True)
    path = database.with_name(database.name + ".lock")
    with path.open("a") as stream:
        deadline = time.monotonic() + timeout_s
        while not _take(stream.fileno()):
            if time.monotonic() > deadline:
                raise RegistryError(
                    f"another process has held the registry for {timeout_s:g} s (lock {path}); "
                    "wait for it to end, or end it, and run the command again"
                )
            time.sleep(_POLL_S)
        yield


def _take(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def connect(tracking_uri: str) -> "MlflowClient":
    """A client for tracking and registry at `tracking_uri`; a missing SQLite database is made, with its folder.

    Sets no global of MLflow's, so that two addresses can be used side by side. Raises RegistryError when there is no
    answer.
    """
    prepare_environment()
    from mlflow import MlflowClient

    with registry_errors(f"opening {without_credentials(tracking_uri)}"), registry_lock(tracking_uri):
        client = MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)
        # Both halves make their tables at first use: that must happen under the lock.
        client.search_experiments(max_results=1)
        client.search_registered_models(max_results=1)
    return client


def find_or_create_experiment(client: "MlflowClient", name: str, work_dir: Path) -> str:
    """The experiment's id. A new one keeps its artifacts under `work_dir` for SQLite, else where the server says.

    Raises RegistryError for an experiment that was deleted: MLflow keeps its name reserved.
    """
    with registry_errors(f"opening experiment {name!r}"):
        found = client.get_experiment_by_name(name)
        if found is not None and found.lifecycle_stage == "active":
            return str(found.experiment_id)
        if found is not None:
            raise RegistryError(
                f"experiment {name!r} was deleted in MLflow; restore it (`mlflow experiments restore -x "
                f"{found.experiment_id}`) or set registry.experiment to another name"
            )
        local = sqlite_file(client.tracking_uri) is not None
        location = (work_dir.absolute() / "mlartifacts").as_uri() if local else None
        return str(client.create_experiment(name, artifact_location=location))
