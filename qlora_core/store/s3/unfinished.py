"""Multipart uploads that were begun and not completed: what a bucket bills and no listing of it shows."""

import logging
from collections.abc import Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from qlora_core.errors import StoreError, StoreUnavailableError
from qlora_core.store.s3.client import S3Client
from qlora_core.store.s3.outcome import Refused
from qlora_core.store.s3.patience import Patience

logger = logging.getLogger(__name__)


def list_uploads(client: S3Client, prefix: str, patience: Patience) -> list[dict[str, Any]]:
    """The unfinished uploads of keys with this prefix, the newest first; each with `Key`, `UploadId`, `Initiated`.

    None on a server that cannot tell, or will not.
    """
    found: list[dict[str, Any]] = []
    markers: dict[str, str] = {}
    try:
        while True:
            page = client.ask("list_multipart_uploads", patience, Prefix=prefix, **markers)
            found += page.get("Uploads", [])
            if not page.get("IsTruncated"):
                break
            markers = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}
    except StoreUnavailableError:
        raise
    except StoreError as error:
        logger.info("unfinished uploads cannot be listed, so none is continued or removed: %s", error)
    return sorted(found, key=lambda upload: upload["Initiated"], reverse=True)


def list_parts(client: S3Client, key: str, upload_id: str, patience: Patience) -> Iterator[dict[str, Any]]:
    """What has arrived of an upload."""
    marker: dict[str, int] = {}
    while True:
        page = client.ask("list_parts", patience, Key=key, UploadId=upload_id, **marker)
        yield from page.get("Parts", [])
        if not page.get("IsTruncated"):
            return
        marker = {"PartNumberMarker": page["NextPartNumberMarker"]}


def abort_upload(client: S3Client, key: str, upload_id: str, patience: Patience) -> bool:
    """Remove an upload and its parts; False if it is gone already, or stays with a warning."""
    try:
        client.ask("abort_multipart_upload", patience, Key=key, UploadId=upload_id)
    except Refused:
        return False
    except StoreError as error:
        logger.warning("an unfinished upload of %s stays and costs storage: %s", key, error)
        return False
    return True


def abort_old_uploads(client: S3Client, prefix: str, older_than_s: float) -> int:
    """Abort the uploads in which nothing has arrived for as long, by the server's clock; returns how many."""
    patience, aborted = client.patience(), 0
    for upload in list_uploads(client, prefix, patience):
        key, upload_id = upload["Key"], upload["UploadId"]
        try:
            moved = [part["LastModified"] for part in list_parts(client, key, upload_id, patience)]
        except Refused:
            continue
        still_s = (_now(client, patience, prefix) - max([upload["Initiated"], *moved])).total_seconds()
        if still_s > older_than_s and abort_upload(client, key, upload_id, patience):
            logger.info("aborted an upload of %s in which nothing has arrived for %.0f hours", key, still_s / 3600)
            aborted += 1
    return aborted


def _now(client: S3Client, patience: Patience, prefix: str) -> datetime:
    answer = client.ask("list_objects_v2", patience, Prefix=prefix, MaxKeys=1)
    told = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
    return parsedate_to_datetime(told) if told else datetime.now(UTC)
