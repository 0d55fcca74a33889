"""Append-only record of every judge call, in SQLite. Knows keys, outcomes and costs, not endpoints or prompts.

One row per attempt. Only scored verdicts are ever served; failures are kept and billed, and asked again by a later run.
A row is committed as soon as its answer is there, so a killed process pays for at most the calls it had in flight.
"""

import logging
import sqlite3
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol

from qlora_core.errors import JudgeError
from qlora_core.evaluation.pairwise import Judgement

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 2
BUSY_TIMEOUT_S = 30.0
KEYS_PER_QUERY = 500

SCHEMA = """
CREATE TABLE IF NOT EXISTS attempts (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    key TEXT NOT NULL,
    created_s REAL NOT NULL,
    slot TEXT CHECK (slot IN ('first', 'second', 'tie')),
    reason TEXT,
    raw TEXT,
    finish_reason TEXT,
    model TEXT,
    input_tokens INTEGER,
    output_tokens INTEGER,
    cost_usd REAL NOT NULL,
    latency_s REAL NOT NULL,
    first_points REAL,
    second_points REAL
);
CREATE INDEX IF NOT EXISTS attempts_by_key ON attempts (key);
CREATE TRIGGER IF NOT EXISTS attempts_are_final BEFORE UPDATE ON attempts
BEGIN SELECT RAISE(ABORT, 'attempts are never changed'); END;
CREATE TRIGGER IF NOT EXISTS attempts_are_kept BEFORE DELETE ON attempts
BEGIN SELECT RAISE(ABORT, 'attempts are never deleted'); END;
"""


class Attempt(NamedTuple):
    """One call and what came of it: `judgement`, the text behind it, the usage the server reported and its price."""

    judgement: Judgement
    raw: str | None = None
    finish_reason: str | None = None
    model: str | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    cost_usd: float = 0.0
    latency_s: float = 0.0


class Served(NamedTuple):
    """A scored judgement and the model snapshot that gave it (None where the server named none)."""

    judgement: Judgement
    model: str | None


class SharedVerdicts(Protocol):
    """Where scored verdicts are kept for other machines: JSON documents under keys, the first one stays."""

    def put(self, digest: str, document: Mapping[str, Any], /) -> None:
        """Keep a verdict."""
        ...

    def get_many(self, digests: Iterable[str], /) -> dict[str, dict[str, Any]]:
        """The verdicts that are there."""
        ...


class VerdictCache:
    """The record in one file (None: in memory, for one run). Safe for several threads and processes at once.

    Scored verdicts are also given to `shared`, and looked for there; costs and failures stay in the file.
    """

    def __init__(self, path: Path | None, shared: SharedVerdicts | None = None) -> None:
        self._shared = shared
        self._lock = threading.Lock()
        self._where = str(path) if path is not None else "memory"
        try:
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(
                path if path is not None else ":memory:", timeout=BUSY_TIMEOUT_S, check_same_thread=False
            )
            self._prepare()
        except (OSError, sqlite3.DatabaseError) as error:
            raise JudgeError(
                f"the verdict cache {self._where} cannot be used ({error}); check the folder's rights, "
                "or move the file away to start a new one"
            ) from error

    def __enter__(self) -> "VerdictCache":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; what was recorded stays."""
        with self._lock:
            self._connection.close()

    def scored(self, keys: Iterable[str]) -> dict[str, list[Served]]:
        """The scored judgements of each key that has one, here or else among the shared ones: the earliest first."""
        keys = list(keys)
        found: dict[str, list[Served]] = {}
        select = "SELECT key, slot, reason, first_points, second_points, model FROM attempts WHERE slot IS NOT NULL AND"
        for key, slot, reason, first, second, model in self._by_key(select, keys):
            points = None if first is None else (first, second)
            found.setdefault(key, []).append(Served(Judgement(slot, reason, points), model))
        if self._shared is not None:
            for key, document in self._shared.get_many(set(keys) - found.keys()).items():
                points = document.get("points")
                judgement = Judgement(document["slot"], document["reason"], tuple(points) if points else None)
                found[key] = [Served(judgement, document.get("model"))]
        return found

    def last_reason(self, key: str) -> str | None:
        """The reason of the latest attempt at a key; None where there is none."""
        rows = self._by_key("SELECT reason FROM attempts WHERE", [key])
        return rows[-1][0] if rows else None

    def open_notes(self, keys: Iterable[str], prefix: str) -> dict[str, list[str]]:
        """What follows `prefix` in the reason of each key's latest attempt, with the keys; others are left out."""
        latest = dict(self._by_key("SELECT key, reason FROM attempts WHERE", keys))
        found: dict[str, list[str]] = {}
        for key, reason in latest.items():
            if reason is not None and reason.startswith(prefix):
                found.setdefault(reason.removeprefix(prefix), []).append(key)
        return found

    def attempts(self, keys: Iterable[str]) -> int:
        """How many attempts there were at these keys."""
        return len(self._by_key("SELECT id FROM attempts WHERE", keys))

    def spent_usd(self, keys: Iterable[str]) -> float:
        """What all attempts at these keys have cost, failures and earlier runs included."""
        return sum((row[0] for row in self._by_key("SELECT cost_usd FROM attempts WHERE", keys)), 0.0)

    def record(self, attempts: Sequence[tuple[str, Attempt]]) -> None:
        """Append attempts, each with its key, and commit them together: on disk when this returns."""
        now_s = time.time()
        rows = [
            (
                key,
                now_s,
                each.judgement.slot,
                each.judgement.reason,
                *each[1:],
                *(each.judgement.points or (None, None)),
            )
            for key, each in attempts
        ]
        try:
            with self._lock, self._connection:
                self._connection.executemany(
                    "INSERT INTO attempts (key, created_s, slot, reason, raw, finish_reason, model, input_tokens,"
                    " output_tokens, cost_usd, latency_s, first_points, second_points)"
                    " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    rows,
                )
        except sqlite3.DatabaseError as error:
            raise JudgeError(f"the verdict cache {self._where} cannot be written ({error}); check its disk") from error
        for key, attempt in attempts:
            if self._shared is not None and attempt.judgement.slot is not None:
                self._share(self._shared, key, attempt)

    def _share(self, shared: SharedVerdicts, key: str, attempt: Attempt) -> None:
        try:
            shared.put(key, {**attempt.judgement._asdict(), "model": attempt.model})
        except OSError as error:
            # It is paid for and recorded here: an outage of the shared place must not stop the judging.
            logger.warning("a verdict could not be shared with other machines: %s", error)

    def _prepare(self) -> None:
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = FULL")
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        if version == 1:
            for column in ("first_points", "second_points"):
                self._connection.execute(f"ALTER TABLE attempts ADD COLUMN {column} REAL")
        elif version not in (0, SCHEMA_VERSION):
            raise JudgeError(
                f"the verdict cache {self._where} has format {version}, this version reads {SCHEMA_VERSION}; "
                "move the file away to start a new one"
            )
        self._connection.executescript(SCHEMA)
        self._connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        self._connection.commit()

    def _by_key(self, select: str, keys: Iterable[str]) -> list[tuple]:
        wanted = sorted(set(keys))
        rows: list[tuple] = []
        with self._lock:
            for start in range(0, len(wanted), KEYS_PER_QUERY):
                part = wanted[start : start + KEYS_PER_QUERY]
                marks = ", ".join("?" * len(part))
                rows += self._connection.execute(f"{select} key IN ({marks}) ORDER BY id", part).fetchall()
        return rows
