"""Requests to one bucket: tried again while that makes sense, ended in bounded time, their faults explained.

The home of boto3. Credentials, region and endpoint come from its own chain (AWS_ENDPOINT_URL names another server).
It does not know what the objects are.
"""

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, NoReturn

import boto3
import botocore.exceptions as faults
from boto3.s3.transfer import TransferConfig
from botocore.config import Config

from qlora_core.store.s3.body import FileSlice
from qlora_core.store.s3.explain import S3_FAULTS, Explainer, code_of, is_conflict, is_worth_another_try
from qlora_core.store.s3.outcome import OUTCOMES, Outcome, Refused
from qlora_core.store.s3.patience import Patience

REQUESTS_AT_ONCE = 8
_ATTEMPTS = 8
_COPY = TransferConfig(multipart_threshold=256 << 20, multipart_chunksize=256 << 20, max_concurrency=4)
_ABOUT_OBJECTS = (Outcome.MISSING, Outcome.CHANGED)
# The only requests that may be answered so; anywhere else a 404 says that this is no S3 server.
_EXPECTED: dict[str, tuple[Outcome, ...]] = {
    "get_object": (*_ABOUT_OBJECTS, Outcome.OTHER_SIZE),
    "head_object": _ABOUT_OBJECTS,
    "put_object": (Outcome.CHANGED,),
    "put_object if it matches": _ABOUT_OBJECTS,
    "delete_object": _ABOUT_OBJECTS,
    "copy": _ABOUT_OBJECTS,
    "upload_part": (Outcome.UPLOAD_ENDED,),
    "list_parts": (Outcome.UPLOAD_ENDED,),
    "complete_multipart_upload": (Outcome.UPLOAD_ENDED,),
    "abort_multipart_upload": (Outcome.UPLOAD_ENDED,),
}
_ACTIONS = {
    "put_object": "write to",
    "create_multipart_upload": "write to",
    "upload_part": "write to",
    "complete_multipart_upload": "write to",
    "abort_multipart_upload": "write to",
    "delete_object": "remove objects from",
    "copy": "move objects in",
}


class S3Client:
    """One bucket. Connects when something is asked for; for use by many threads.

    `connect_timeout_s` and `read_timeout_s` bound the silence of one try, `deadline_s` that of an operation.
    """

    def __init__(
        self,
        bucket: str,
        location: str,
        *,
        connect_timeout_s: float,
        read_timeout_s: float,
        deadline_s: float,
        attempts: int = _ATTEMPTS,
    ) -> None:
        self._bucket = bucket
        self._connect_timeout_s = connect_timeout_s
        self.read_timeout_s = read_timeout_s
        self._deadline_s = deadline_s
        self._attempts = attempts
        self._explainer = Explainer(bucket, location, self._credentials_method)

    @property
    def place(self) -> str:
        """The bucket and the server for messages."""
        return self._explainer.place

    def patience(self) -> Patience:
        """The patience of an operation that begins now."""
        return Patience(self._deadline_s, self._attempts)

    def ask(self, operation: str, patience: Patience | None = None, /, **parameters: Any) -> dict[str, Any]:
        """One request of boto3's client, by name. Raises Refused for an outcome, else StoreError in words."""
        patience = patience or self.patience()
        body = parameters.get("Body")

        def request() -> dict[str, Any]:
            if isinstance(body, FileSlice):
                body.rewind()
            return getattr(self._boto, operation)(Bucket=self._bucket, **parameters)

        wanted = f"{operation} if it matches" if "IfMatch" in parameters else operation
        answer = self._tried(operation, request, patience, _EXPECTED.get(wanted) or _EXPECTED.get(operation, ()))
        if "Body" not in answer:
            patience.moved()
        return answer

    def copy(self, source: str, target: str, etag: str, settings: Mapping[str, str]) -> None:
        """Copy an object of any size within the bucket if it still has `etag`."""
        extra = {"CopySourceIfMatch": etag, **settings}
        origin = {"Bucket": self._bucket, "Key": source}

        def request() -> dict[str, Any]:
            self._boto.copy(origin, self._bucket, target, ExtraArgs=extra, Config=_COPY)
            return {}

        self._tried("copy", request, self.patience(), _EXPECTED["copy"])

    def fail(self, action: str, cause: Exception) -> NoReturn:
        """Raise the error in words."""
        raise self._explainer.error(action, cause)

    def _tried(
        self, operation: str, request: Callable[[], dict[str, Any]], patience: Patience, expected: tuple[Outcome, ...]
    ) -> dict[str, Any]:
        uncertain, attempt = False, 0
        while True:
            try:
                return request()
            except S3_FAULTS as error:
                attempt += 1
                outcome = OUTCOMES.get(code_of(error))
                if outcome is not None and outcome in expected:
                    raise Refused(outcome, uncertain=uncertain) from error
                if not is_worth_another_try(error) or not patience.pause(attempt):
                    self.fail(_ACTIONS.get(operation, "read"), error)
                uncertain = uncertain or not is_conflict(error)

    @cached_property
    def _boto(self) -> Any:
        config = Config(
            # One way of trying again, which knows how much has got through, is enough: `_tried`.
            retries={"mode": "standard", "total_max_attempts": 1},
            connect_timeout=self._connect_timeout_s,
            read_timeout=self.read_timeout_s,
            max_pool_connections=REQUESTS_AT_ONCE + 2,
            # Every body comes with its SHA-256, in a signed header; hashing it once more to sign it adds nothing.
            s3={"payload_signing_enabled": False},
            request_checksum_calculation="when_required",
            # What is read is compared with the manifest, and old servers send no checksums.
            response_checksum_validation="when_required",
        )
        try:
            client = self._session.client("s3", config=config)
            self._explainer.connected_to(client.meta.endpoint_url)
        except (ValueError, faults.BotoCoreError) as error:
            self.fail("connect to", error)
        return client

    @cached_property
    def _session(self) -> Any:
        try:
            return boto3.Session()
        except faults.BotoCoreError as error:
            self.fail("connect to", error)

    def _credentials_method(self) -> str | None:
        credentials = self._session.get_credentials()
        return credentials.method if credentials else None
