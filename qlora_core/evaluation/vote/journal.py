"""A study's file: SQLite, append-only. Triggers refuse every update and deletion, so what a rater did is never lost.

Knows rows and transactions, not what events mean.
"""

import json
import os
import secrets
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

from qlora_core.errors import EvaluationError

BUSY_TIMEOUT_S = 60.0
FORM = 1
EventKind = Literal["reserve", "vote", "skip", "undo", "exclude", "import"]
TABLES = ("study", "items", "events")
SCHEMA = """
CREATE TABLE study (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE items (position INTEGER PRIMARY KEY, item_id TEXT NOT NULL UNIQUE, pair TEXT NOT NULL);
CREATE TABLE events (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    at REAL NOT NULL,
    kind TEXT NOT NULL CHECK (kind IN ('reserve', 'vote', 'skip', 'undo', 'exclude', 'import')),
    rater TEXT NOT NULL,
    request_id TEXT,
    body TEXT NOT NULL,
    UNIQUE (rater, request_id)
);
""" + "".join(
    f"CREATE TRIGGER {table}_no_{verb.lower()} BEFORE {verb} ON {table} "
    f"BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END;\n"
    for table in TABLES
    for verb in ("UPDATE", "DELETE")
)


class Event(NamedTuple):
    """One thing that happened. `at` in seconds since 1970; `request_id` null where no client asked for it."""

    seq: int
    at: float
    kind: EventKind
    rater: str
    request_id: str | None
    body: Mapping[str, Any]


class Journal:
    """A study's file, shared by threads and processes: every call opens a connection of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path, facts: Mapping[str, Any], items: Sequence[tuple[str, Mapping[str, Any]]]) -> "Journal":
        """Make the file with its facts and items, whole or not at all. Raises EvaluationError where it exists."""
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        unfinished.touch(mode=0o600)  # answers and votes are the owner's
        try:
            _fill(unfinished, {"form": FORM, **facts}, items)
            os.link(unfinished, path)
        except FileExistsError as error:
            raise EvaluationError(f"{path} exists; continue it without new pairs or name another --study") from error
        finally:
            unfinished.unlink()
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
        return cls(path)

    def read(self) -> tuple[dict[str, Any], list[tuple[str, dict[str, Any]]]]:
        """The facts and the items, in order. Raises EvaluationError where the file is no study."""
        try:
            with self._connection() as connection:
                facts = {key: json.loads(value) for key, value in connection.execute("SELECT key, value FROM study")}
                items = connection.execute("SELECT item_id, pair FROM items ORDER BY position").fetchall()
        except sqlite3.DatabaseError as error:
            raise EvaluationError(f"{self.path} is not a study of votes ({error}); name another --study") from error
        if facts.get("form") != FORM:
            raise EvaluationError(f"{self.path} has form {facts.get('form')}, this version reads {FORM}")
        return facts, [(item_id, json.loads(pair)) for item_id, pair in items]

    def events_after(self, seq: int) -> list[Event]:
        """What happened after event `seq` (0: everything), oldest first."""
        with self._connection() as connection:
            return _events_after(connection, seq)

    @contextmanager
    def transaction(self) -> Iterator["Transaction"]:
        """The only writer for the length of the block; what it appended is on disk when the block ends, or nothing."""
        with self._connection() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield Transaction(connection)
            except BaseException:
                connection.execute("ROLLBACK")
                raise
            connection.execute("COMMIT")

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        if not self.path.is_file():
            raise EvaluationError(f"{self.path} is not there; start a study with: qlora vote serve PAIRS.jsonl")
        with closing(sqlite3.connect(self.path, timeout=BUSY_TIMEOUT_S, isolation_level=None)) as connection:
            connection.execute("PRAGMA synchronous = FULL")  # a vote told to be kept survives a power cut
            yield connection


class Transaction:
    """Reading and appending while no other process can write."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def events_after(self, seq: int) -> list[Event]:
        """What happened after event `seq`, this transaction's own included."""
        return _events_after(self._connection, seq)

    def append(self, kind: EventKind, rater: str, body: Mapping[str, Any], request_id: str | None = None) -> None:
        """Add one event. A request_id that this rater used before raises sqlite3.IntegrityError."""
        self._connection.execute(
            "INSERT INTO events (at, kind, rater, request_id, body) VALUES (?, ?, ?, ?, ?)",
            (time.time(), kind, rater, request_id, json.dumps(body, ensure_ascii=False)),
        )


def _events_after(connection: sqlite3.Connection, seq: int) -> list[Event]:
    query = "SELECT seq, at, kind, rater, request_id, body FROM events WHERE seq > ? ORDER BY seq"
    rows = connection.execute(query, (seq,))
    return [Event(seq, at, kind, rater, key, json.loads(body)) for seq, at, kind, rater, key, body in rows]


def _fill(path: Path, facts: Mapping[str, Any], items: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.executescript(f"BEGIN;\n{SCHEMA}")
        connection.executemany(
            "INSERT INTO study VALUES (?, ?)", [(key, json.dumps(value)) for key, value in facts.items()]
        )
        connection.executemany(
            "INSERT INTO items VALUES (?, ?, ?)",
            [(n, item_id, json.dumps(pair, ensure_ascii=False)) for n, (item_id, pair) in enumerate(items)],
        )
        connection.execute("COMMIT")
