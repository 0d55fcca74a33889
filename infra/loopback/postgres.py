"""A Postgres of the system's packages: where its programs are, whom it runs as, its databases.

Every role has a password of its own (SCRAM), nobody is let in without one, and there is no socket file. Knows nothing
of what the databases are for.
"""

import os
import pwd
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from infra.loopback.service import StackError

_PACKAGED = Path("/usr/lib/postgresql")
"""Debian's place for the programs of each version, which are not on PATH."""

_FALLBACK_USERS = ("postgres", "nobody")
SUPERUSER = "postgres"


def find_program(name: str) -> str | None:
    """The newest packaged program of that name, else the one on PATH; None without."""
    packaged = sorted(_PACKAGED.glob(f"*/bin/{name}"), key=lambda path: int(path.parts[-3]), reverse=True)
    return str(packaged[0]) if packaged else shutil.which(name)


def required_program(name: str) -> str:
    """`find_program`, or StackError saying how to get it."""
    found = find_program(name)
    if found is None:
        raise StackError(f"{name} is not here; install Postgres (Debian, Ubuntu: apt-get install postgresql)")
    return found


def server_user() -> str | None:
    """Whom the server runs as: None for the caller, another user where the caller is root, whom Postgres refuses."""
    if os.geteuid() != 0:
        return None
    known = {entry.pw_name for entry in pwd.getpwall()}
    for name in _FALLBACK_USERS:
        if name in known:
            return name
    raise StackError(f"Postgres does not run as root, and none of {', '.join(_FALLBACK_USERS)} is a user here; add one")


def as_user(user: str | None) -> dict[str, Any]:
    """The arguments of `subprocess` that run a program as that user alone, without root's groups."""
    if user is None:
        return {}
    return {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []}


def make_cluster(data: Path, password: str) -> None:
    """Make the data folder, whose superuser has the password. StackError where the server's user may not reach it."""
    user = server_user()
    data.mkdir(parents=True)
    data.chmod(0o700)
    if user is not None:
        shutil.chown(data, user, pwd.getpwnam(user).pw_gid)
        if _run(["test", "-x", str(data)], user).returncode != 0:
            raise StackError(
                f"user {user} may not enter {data}; name a --dir whose parents everybody may enter, or run this as "
                "another user than root"
            )
    command = [required_program("initdb"), "--pgdata", str(data), "--username", SUPERUSER, "--encoding", "UTF8"]
    command += ["--locale", "C.UTF-8", "--auth", "scram-sha-256", "--no-sync"]
    # Not by standard input: a pipe of root's cannot be opened by name as another user.
    with tempfile.NamedTemporaryFile("w", dir=data.parent, encoding="utf-8") as told:
        told.write(password)
        told.flush()
        if user is not None:
            shutil.chown(told.name, user)
        made = _run([*command, "--pwfile", told.name], user)
    if made.returncode != 0:
        raise StackError(f"initdb failed: {made.stderr.strip()[-500:]}")


def _run(command: list[str], user: str | None) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, text=True, capture_output=True, cwd="/", **as_user(user))


def server_command(data: Path, port: int) -> list[str]:
    """The server in the foreground, on loopback alone. Nothing is synced to disk: the data end with the stack."""
    settings = {
        "listen_addresses": "127.0.0.1",
        "port": port,
        "unix_socket_directories": "",
        "max_connections": 200,
        "fsync": "off",
        "password_encryption": "scram-sha-256",
        "log_statement": "none",
        "log_min_error_statement": "panic",  # a statement may hold a password
    }
    words = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
    return [required_program("postgres"), "-D", str(data), *words]


def make_databases(port: int, password: str, owners: dict[str, tuple[str, tuple[str, ...]]]) -> None:
    """Roles with their databases: `owners` maps a role to (its password, its databases)."""
    import psycopg
    from psycopg import sql

    with psycopg.connect(
        host="127.0.0.1", port=port, user=SUPERUSER, password=password, dbname="postgres", autocommit=True
    ) as connection:
        for role, (role_password, databases) in owners.items():
            make_role = sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}")
            connection.execute(make_role.format(sql.Identifier(role), sql.Literal(role_password)))
            for database in databases:
                names = sql.Identifier(database), sql.Identifier(role)
                connection.execute(sql.SQL("CREATE DATABASE {} OWNER {}").format(*names))
                connection.execute(sql.SQL("REVOKE ALL ON DATABASE {} FROM PUBLIC").format(names[0]))
