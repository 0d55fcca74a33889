"""Artifacts in an S3 bucket, or in anything that speaks S3 and honours conditional writes. The only user of boto3.

    <prefix>/v1/blob/<aa>/<sha256>                       files by content, immutable
    <prefix>/v1/stage/<stage>/<key>/manifest.json        written last, If-None-Match: *; its presence is the artifact
    <prefix>/v1/quarantine/...                           manifests and blobs that failed verification

Credentials, region and endpoint come from boto3's own chain (AWS_ENDPOINT_URL names another server). Artifacts are read
through copies in a local folder, which are verified like any other. It does not know how stages or keys are made.
"""

import contextlib
import hashlib
import logging
import random
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
import botocore.exceptions as faults
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from botocore.config import Config

from qlora_core.errors import ConfigError, CorruptArtifactError, StoreError, StoreUnavailableError
from qlora_core.progress import progress_bar
from qlora_core.store.backend import read_or_set_aside
from qlora_core.store.contents import mismatch
from qlora_core.store.local import LocalFolder, named_os_errors
from qlora_core.store.manifest import MANIFEST_FILE, FileEntry, Manifest, inside_path, parse_manifest

logger = logging.getLogger(__name__)

_FILES_AT_ONCE = 8
_PARTS_AT_ONCE = 4
_CHUNK_BYTES = 1 << 20
_STREAM_ATTEMPTS = 3
_COPY_ATTEMPTS = 3
_CONFLICT_ATTEMPTS = 6
_TRANSFER = TransferConfig(multipart_threshold=32 << 20, multipart_chunksize=32 << 20, max_concurrency=_PARTS_AT_ONCE)
_MISSING = frozenset({"NoSuchKey", "404", "NotFound"})
_REFUSED = frozenset(
    {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "401", "403"}
    | {"AllAccessDisabled", "InvalidClientTokenId", "RequestTimeTooSkewed", "TokenRefreshRequired", "Forbidden"}
)
_WRONG_REGION = frozenset({"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"})
_NO_CREDENTIALS = (
    faults.NoCredentialsError,
    faults.PartialCredentialsError,
    faults.CredentialRetrievalError,
    faults.ProfileNotFound,
    faults.TokenRetrievalError,
    faults.SSOError,
)


class S3Bucket:
    """The S3 backend. Nothing is sent before something is asked for.

    `connect_timeout_s` and `read_timeout_s` bound each try of a request; there are four, and two in `check`.
    """

    def __init__(
        self, bucket: str, prefix: str, cache_dir: Path, *, connect_timeout_s: float = 5, read_timeout_s: float = 60
    ) -> None:
        try:
            inside_path(f"{bucket}/{prefix}" if prefix else bucket)
        except ValueError as error:
            raise ConfigError(f"store: 's3://{bucket}/{prefix}' is not understood; give s3://bucket/prefix") from error
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self._cache = LocalFolder(cache_dir / "s3" / bucket / prefix)
        self._connect_timeout_s = connect_timeout_s
        self._read_timeout_s = read_timeout_s
        self._endpoint_url: str | None = None

    @property
    def location(self) -> str:
        """The bucket and prefix as s3://bucket/prefix."""
        return f"s3://{self._bucket}/{self._prefix}".rstrip("/")

    def read_manifest(self, address: str) -> bytes | None:
        """The manifest object's bytes; None where there is no such object."""
        with self._explained("read"):
            try:
                answer = self._client.get_object(Bucket=self._bucket, Key=self._manifest_key(address))
                return answer["Body"].read()
            except faults.ClientError as error:
                if _code(error) in _MISSING:
                    return None
                raise

    def fetch(self, manifest: Manifest) -> Path:
        """A verified local copy: the one from before if it is still sound, else a fresh download."""
        for _ in range(_COPY_ATTEMPTS):
            cached = self._cached(manifest)
            if cached is not None:
                return cached
            with self._cache.staging() as folder:
                self._download(manifest, folder)
                published = self._cache.publish(folder, manifest)
            if published is not None:
                return published
            # Another process put its copy there during the download. If that one is bad, the bucket is not to blame.
        raise StoreError(f"local copies under {self._cache.location} go bad as they are made; look at that disk")

    def staging(self) -> AbstractContextManager[Path]:
        """An empty folder beside the local copies."""
        return self._cache.staging()

    def publish(self, folder: Path, manifest: Manifest) -> Path | None:
        """Upload what the bucket does not hold yet, then put the manifest unless another is there.

        The files then become the local copy, so that the producer does not download what it has just made.
        """
        self._upload(folder, manifest)
        if not self._put_if_absent(self._manifest_key(manifest.address), manifest.to_json()):
            return None
        return self._cached(manifest) or self._cache.publish(folder, manifest) or self.fetch(manifest)

    def repairing(self) -> AbstractContextManager[None]:
        """Lock out the other processes of this machine; other machines are kept apart by ETags."""
        # Not the lock of the copies themselves, which is taken inside this one.
        return self._cache.locked("repair-bucket")

    def set_aside(self, address: str) -> None:
        """Move the manifest to quarantine. Blobs at fault were moved when they were found."""
        self._quarantine(self._manifest_key(address), f"{address.removeprefix('v1/')}/{MANIFEST_FILE}")

    def check(self) -> None:
        """Write, read and remove a probe object, and prove that the server honours conditional writes."""
        self._cache.check()
        client = self._new_client(total_attempts=2, read_timeout_s=min(10, self._read_timeout_s))
        key = f"{self._prefix}v1/probe/{secrets.token_hex(8)}"
        with self._explained("write to"):
            try:
                self._probe(client, key, secrets.token_bytes(64))
            except BaseException:
                # What went wrong is the news; a probe that cannot be removed is not.
                with contextlib.suppress(faults.ClientError, faults.BotoCoreError):
                    client.delete_object(Bucket=self._bucket, Key=key)
                raise
            client.delete_object(Bucket=self._bucket, Key=key)

    def _probe(self, client: Any, key: str, probe: bytes) -> None:
        if not _put_once(client, self._bucket, key, probe):
            raise StoreError(f"{self._place} says a new name is taken already; use another server")
        if client.get_object(Bucket=self._bucket, Key=key)["Body"].read() != probe:
            raise StoreError(f"{self._place} gives back other bytes than were written; use another server")
        if _put_once(client, self._bucket, key, probe):
            raise StoreError(
                f"{self._place} ignores `If-None-Match: *`, so two producers would overwrite each other; use a server "
                "that honours conditional writes, or a folder as store"
            )

    @cached_property
    def _client(self) -> Any:
        return self._new_client(total_attempts=4, read_timeout_s=self._read_timeout_s)

    def _new_client(self, *, total_attempts: int, read_timeout_s: float) -> Any:
        config = Config(
            retries={"mode": "standard", "total_max_attempts": total_attempts},
            connect_timeout=self._connect_timeout_s,
            read_timeout=read_timeout_s,
            max_pool_connections=_FILES_AT_ONCE * _PARTS_AT_ONCE,
        )
        with self._explained("connect to"):
            try:
                client = self._session.client("s3", config=config)
            except ValueError as error:
                raise StoreError(
                    f"{self.location}: {error}; mend AWS_ENDPOINT_URL, which must be like https://host:9000"
                ) from error
        self._endpoint_url = client.meta.endpoint_url
        return client

    @cached_property
    def _session(self) -> Any:
        with self._explained("connect to"):
            return boto3.Session()

    @property
    def _place(self) -> str:
        if self._endpoint_url is None:
            return self.location
        # Without user and password, which an endpoint URL may carry.
        url = urlsplit(self._endpoint_url)
        port = f":{url.port}" if url.port else ""
        return f"{self.location} at {url.scheme}://{url.hostname}{port}"

    def _manifest_key(self, address: str) -> str:
        return f"{self._prefix}{address}/{MANIFEST_FILE}"

    def _blob_key(self, sha256: str) -> str:
        return f"{self._prefix}v1/blob/{sha256[:2]}/{sha256}"

    def _cached(self, manifest: Manifest) -> Path | None:
        """The local copy if it is of this very artifact and sound; any other is set aside."""
        return read_or_set_aside(self._cache, manifest.address, lambda: self._sound_copy(manifest))

    def _sound_copy(self, manifest: Manifest) -> Path | None:
        raw = self._cache.read_manifest(manifest.address)
        if raw is None:
            return None
        digest = parse_manifest(raw, manifest.address).digest
        if digest != manifest.digest:
            raise CorruptArtifactError(
                f"{manifest.address}: the local copy is of {digest}, wanted is {manifest.digest}"
            )
        return self._cache.fetch(manifest)

    def _upload(self, folder: Path, manifest: Manifest) -> None:
        # Equal files are one blob, and are sent once.
        blobs = {entry.sha256: (path, entry) for path, entry in manifest.files.items()}
        total_bytes = sum(entry.size_bytes for _, entry in blobs.values())
        with progress_bar("Uploading", total_bytes) as advance, self._explained("write to"):

            def send(sha256: str) -> None:
                path, entry = blobs[sha256]
                key = self._blob_key(sha256)
                if self._size_of(key) != entry.size_bytes:
                    self._client.upload_file(str(folder / path), self._bucket, key, Config=_TRANSFER)
                advance(entry.size_bytes)

            _in_parallel(send, blobs)

    def _size_of(self, key: str) -> int | None:
        try:
            return self._client.head_object(Bucket=self._bucket, Key=key)["ContentLength"]
        except faults.ClientError as error:
            if _code(error) in _MISSING:
                return None
            raise

    def _put_if_absent(self, key: str, data: bytes) -> bool:
        """Whether `data` was written; False if something is there. Waits while another write is under way."""
        with self._explained("write to"):
            for attempt in range(_CONFLICT_ATTEMPTS):
                try:
                    return _put_once(self._client, self._bucket, key, data)
                except faults.ClientError as error:
                    if _code(error) != "ConditionalRequestConflict":
                        raise
                    time.sleep(random.uniform(0.5, 1.0) * 0.1 * 2**attempt)
        raise StoreError(f"{self._place}: {key} is being written by others without end; run the same command again")

    def _download(self, manifest: Manifest, folder: Path) -> None:
        problems: list[str] = []
        with progress_bar("Downloading", manifest.size_bytes) as advance, self._explained("read"):

            def receive(path: str) -> None:
                entry = manifest.files[path]
                problem = self._download_file(path, entry, folder / path)
                if problem:
                    problems.append(problem)
                advance(entry.size_bytes)

            _in_parallel(receive, manifest.files)
        if problems:
            raise CorruptArtifactError(f"{manifest.address}: {'; '.join(sorted(problems))}")

    def _download_file(self, path: str, entry: FileEntry, target: Path) -> str | None:
        """Fetch one blob; returns what is wrong with it if it is wrong twice in a row, after moving it aside."""
        with named_os_errors("write to", target):
            target.parent.mkdir(parents=True, exist_ok=True)
        key = self._blob_key(entry.sha256)
        try:
            problem, _ = self._stream(path, entry, key, target)
            if problem is None:
                return None
            problem, etag = self._stream(path, entry, key, target)
        except faults.ClientError as error:
            if _code(error) in _MISSING:
                return f"{path} is missing (no {key})"
            raise
        if problem is not None:
            self._quarantine(key, f"blob/{entry.sha256}", etag=etag)
        return problem

    def _stream(
        self, path: str, entry: FileEntry, key: str, target: Path, *, attempts: int = _STREAM_ATTEMPTS
    ) -> tuple[str | None, str]:
        """Fetch one object into `target`; returns its mismatch with `entry`, if any, and its ETag."""
        answer = self._client.get_object(Bucket=self._bucket, Key=key)
        sha256, size_bytes = hashlib.sha256(), 0
        try:
            with named_os_errors("write to", target), target.open("wb") as stream:
                for chunk in answer["Body"].iter_chunks(_CHUNK_BYTES):
                    sha256.update(chunk)
                    size_bytes += len(chunk)
                    stream.write(chunk)
        except faults.BotoCoreError:
            # The connection broke in mid-stream, which boto3 does not try again.
            if attempts == 1:
                raise
            return self._stream(path, entry, key, target, attempts=attempts - 1)
        return mismatch(path, entry, sha256.hexdigest(), size_bytes), answer["ETag"]

    def _quarantine(self, key: str, name: str, *, etag: str | None = None) -> None:
        """Move one object to quarantine, unless it has been replaced or removed by others since `etag` was read."""
        target = f"{self._prefix}v1/quarantine/{name}-{secrets.token_hex(4)}"
        with self._explained("move objects in"):
            try:
                etag = etag or self._client.head_object(Bucket=self._bucket, Key=key)["ETag"]
                source = {"Bucket": self._bucket, "Key": key}
                self._client.copy(source, self._bucket, target, ExtraArgs={"CopySourceIfMatch": etag}, Config=_TRANSFER)
                self._client.delete_object(Bucket=self._bucket, Key=key, IfMatch=etag)
                logger.info("moved %s to %s in %s", key, target, self._place)
            except faults.ClientError as error:
                if _code(error) not in _MISSING | {"PreconditionFailed", "412"}:
                    raise

    @contextlib.contextmanager
    def _explained(self, action: str) -> Iterator[None]:
        """Turn boto3's errors in the block into StoreError: the place, the cause, the next step; never a secret."""
        try:
            yield
        except (faults.ClientError, faults.BotoCoreError, Boto3Error) as error:
            kind = StoreUnavailableError if _may_pass(error) else StoreError
            raise kind(f"cannot {action} {self._explain(error)}") from error

    def _explain(self, error: Exception) -> str:
        cause = error.__context__ if isinstance(error, Boto3Error) and error.__context__ else error
        if isinstance(cause, _NO_CREDENTIALS):
            return (
                f"{self.location}: {cause}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or run "
                "where a role gives credentials"
            )
        if isinstance(cause, faults.ClientError):
            return self._explain_answer(cause)
        if isinstance(cause, faults.ParamValidationError):
            return f"{self.location}: {cause}; mend `store`"
        return f"{self._place}: {cause}; check AWS_ENDPOINT_URL, the network and the server, then try again"

    def _explain_answer(self, error: faults.ClientError) -> str:
        code = _code(error)
        if code == "NoSuchBucket":
            return f"{self._place}: there is no bucket {self._bucket!r}; create it, or mend `store`"
        if code in _WRONG_REGION or error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") == 301:
            return f"{self._place}: the bucket is in another region ({code}); set AWS_REGION to the bucket's region"
        if code in _REFUSED:
            return (
                f"{self._place}: the server refuses bucket {self._bucket!r} to {self._credentials_source} ({code}); "
                "check them, the clock, and that their policy allows s3:ListBucket on the bucket and s3:GetObject, "
                "s3:PutObject, s3:DeleteObject on what is in it"
            )
        message = error.response.get("Error", {}).get("Message", "no message")
        return f"{self._place}: the server answers {code} ({message}); look at the server's log, then try again"

    @property
    def _credentials_source(self) -> str:
        credentials = self._session.get_credentials()
        method = credentials.method if credentials else "nowhere"
        where = {
            "env": "the environment (AWS_ACCESS_KEY_ID)",
            "shared-credentials-file": "the shared credentials file",
            "config-file": "the AWS config file",
        }.get(method, f"boto3's source {method!r}")
        return f"the credentials from {where}"


def _put_once(client: Any, bucket: str, key: str, data: bytes) -> bool:
    """One conditional write: True if written, False if the key exists."""
    try:
        client.put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
    except faults.ClientError as error:
        if _code(error) in ("PreconditionFailed", "412"):
            return False
        raise
    return True


def _code(error: faults.ClientError) -> str:
    # Answers to HEAD have no body: their code is the HTTP status.
    return str(error.response.get("Error", {}).get("Code", "unknown"))


def _in_parallel(work: Callable[[str], None], names: Mapping[str, Any]) -> None:
    """`work` on every name, several at once; the first error cancels what has not begun and is raised."""
    pool = ThreadPoolExecutor(max_workers=_FILES_AT_ONCE, thread_name_prefix="s3")
    try:
        for done in as_completed([pool.submit(work, name) for name in names]):
            done.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _may_pass(error: Exception) -> bool:
    """Whether the same call may work later: no answer, or a fault on the server's side."""
    cause = error.__context__ if isinstance(error, Boto3Error) and error.__context__ else error
    if isinstance(cause, faults.ClientError):
        return cause.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) >= 500
    return isinstance(cause, faults.HTTPClientError | faults.ConnectionError)
