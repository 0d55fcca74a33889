"""Proof that a server keeps writers apart: every condition is tried against a probe that must refuse it."""

import contextlib
import secrets

from qlora_core.errors import StoreError
from qlora_core.store.s3.client import S3Client
from qlora_core.store.s3.records import S3Records


def probe_conditions(records: S3Records, client: S3Client) -> None:
    """Write, overwrite, read and remove a probe. Raises StoreError naming the place and what it does wrong."""
    name = f"v1/probe/{secrets.token_hex(8)}"
    try:
        _probe(records, client, name)
    except BaseException:
        # What went wrong is the news; a probe that cannot be removed is not.
        with contextlib.suppress(StoreError):
            records.remove(name)
        raise
    if not records.remove(name) or records.read(name) is not None:
        raise StoreError(f"{client.place} keeps what is removed ({name}); allow s3:DeleteObject, or use another server")


def _probe(records: S3Records, client: S3Client, name: str) -> None:
    first, second, third, fourth = (secrets.token_bytes(64) for _ in range(4))
    stale = records.create(name, first)
    if stale is None:
        raise StoreError(f"{client.place} says that a new name is taken; use another server, or a folder as store")
    if records.create(name, second) is not None:
        raise StoreError(_ignored(client, "If-None-Match: *", "two producers would overwrite each other"))
    tag = records.replace(name, third, stale)
    if tag is None:
        raise StoreError(
            f"{client.place} refuses `If-Match` with the ETag it gave; use another server, or a folder as store"
        )
    if records.replace(name, fourth, stale) is not None:
        raise StoreError(_ignored(client, "If-Match", "two owners would hold one lease"))
    found = records.read(name)
    if found is None or found.data != third or found.tag != tag:
        raise StoreError(
            f"{client.place} gives back other bytes than were written; use another server, or a folder as store"
        )


def _ignored(client: S3Client, header: str, consequence: str) -> str:
    return (
        f"{client.place} ignores the header `{header}`, so that {consequence}; use a server that honours conditional "
        "writes, or a folder as store"
    )
