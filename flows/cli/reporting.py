"""What a command says and how it ends: one JSON object or text on standard output, all else on standard error.

Knows nothing of the commands themselves.
"""

import json
import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Annotated, Any

import typer

from flows.cli.file_errors import explain_file_error
from qlora_core.errors import QloraError
from qlora_core.telemetry import disable_usage_reporting

IMPORT_POLL_S = 0.01
_LOGGER = logging.getLogger(__name__)
JsonOption = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on standard output.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, e.g. --set train.learning_rate=1e-4."),
]


@dataclass
class Report:
    """Collects a command's result: `data` for scripts, `lines` for people."""

    data: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    exit_code: int = 0

    def say(self, line: str) -> None:
        """Add a line of the readable result."""
        self.lines.append(line)


@contextmanager
def reporting(as_json: bool) -> Iterator[Report]:
    """Run a command's body: expected errors become one clear message and an exit code, Ctrl-C a hint how to go on.

    A file that cannot be used is an expected error too, whoever opened it; QLORA_LOG_LEVEL=DEBUG shows where.

    With `as_json`, standard output is kept for the result: whatever libraries print meanwhile goes to standard error,
    and a failure too leaves one object, `{"error": {"type", "message"}}`.
    """
    disable_usage_reporting()
    _set_up_logging()
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _interrupt)
    report = Report()
    stdout = _claim_stdout() if as_json else None
    failure: dict[str, str] | None = {"type": "Failure", "message": "the command failed; see standard error"}
    try:
        yield report
        failure = None
    except QloraError as error:
        failure = {"type": type(error).__name__, "message": str(error)}
        report.exit_code = error.exit_code
        typer.secho(f"error: {error}", fg="red", err=True)
    except OSError as error:
        message = explain_file_error(error)
        if message is None:
            raise
        _LOGGER.debug("where it happened:", exc_info=True)
        failure = {"type": type(error).__name__, "message": message}
        report.exit_code = 1
        typer.secho(f"error: {message}", fg="red", err=True)
    except KeyboardInterrupt:
        failure = {"type": "Interrupted", "message": "interrupted; run the same command again to go on"}
        report.exit_code = 1
        typer.secho("interrupted: finished stages and checkpoints are kept; the same command goes on", err=True)
    finally:
        if stdout is not None:
            _release_stdout(stdout, report.data if failure is None else {"error": failure})
    if failure is None and not as_json:
        for line in report.lines:
            typer.echo(line)
    if report.exit_code:
        raise typer.Exit(report.exit_code)


def _worth_showing(record: logging.LogRecord) -> bool:
    """Whether a line is for the terminal: not Prefect's own bookkeeping, which its API keeps.

    Nor that it takes an interrupt for a crash: the command says what an interrupt means.
    """
    if not record.name.startswith("prefect") or getattr(record, "library", False):
        return True
    return record.levelno >= logging.WARNING and "aborted by an interrupt signal" not in record.getMessage()


def _claim_stdout() -> int:
    """Keep the real standard output for the result and point descriptor 1 at standard error."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    return kept


def _release_stdout(kept: int, payload: dict[str, Any]) -> None:
    """Give standard output back, with the one object on it."""
    sys.stdout.flush()
    os.dup2(kept, 1)
    os.close(kept)
    os.write(1, json.dumps(payload, ensure_ascii=False, allow_nan=False).encode() + b"\n")


def _interrupt(signum: int, frame: FrameType | None) -> None:
    """A polite kill is treated like Ctrl-C: work stops and what is finished is kept.

    While a module is being imported it waits for the import's end: some libraries swallow what is raised within.
    """
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            signal.signal(signal.SIGALRM, _interrupt)
            signal.setitimer(signal.ITIMER_REAL, IMPORT_POLL_S)
            return
        frame = frame.f_back
    raise KeyboardInterrupt


def _set_up_logging() -> None:
    level = os.environ.get("QLORA_LOG_LEVEL", "INFO").upper()
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_worth_showing)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    for package in ("qlora_core", "tasks", "flows"):
        logging.getLogger(package).setLevel(level)
    if not sys.stderr.isatty():  # bars of the libraries underneath would fill a log with half-drawn lines
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # Libraries talking to each other about their next versions: nothing a user of ours can act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    # On some CPUs it looks for an optional kernel package and warns that there is none: nobody has to act on that.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
