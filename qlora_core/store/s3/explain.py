"""What S3 and the way to it say, in words: the place, the cause, the next step; never a secret.

Knows the codes of AWS and of servers like it. Does not know what is being stored.
"""

import re
from collections.abc import Callable
from urllib.parse import urlsplit

import botocore.exceptions as faults
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError

from qlora_core.errors import StoreError, StoreUnavailableError

_REFUSED = frozenset(
    {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "401", "403"}
    | {"AllAccessDisabled", "InvalidClientTokenId", "RequestTimeTooSkewed", "TokenRefreshRequired", "Forbidden"}
)
_WRONG_REGION = frozenset({"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"})
_CONFLICT = frozenset({"ConditionalRequestConflict", "OperationAborted"})
_DAMAGED = frozenset({"BadDigest", "XAmzContentChecksumMismatch", "XAmzContentSHA256Mismatch"})
_OVERLOADED = frozenset({"SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "TooManyRequests"})
_TOO_SLOW = frozenset({"RequestTimeout", "RequestTimeoutException"})
_PASSING_STATUS = frozenset({429, 500, 502, 503, 504})
_NO_CREDENTIALS = (
    faults.NoCredentialsError,
    faults.PartialCredentialsError,
    faults.CredentialRetrievalError,
    faults.ProfileNotFound,
    faults.TokenRetrievalError,
    faults.SSOError,
)
# Rather too much than too little: an endpoint that is not understood is shown, and may be anything.
_USER_AND_PASSWORD = re.compile(r"""[^\s"'/@:]*:(?!//)[^\s"']*@|(?<=://)[^\s"'/@]*@""")

# What an S3 client raises, beside what the operating system does.
S3_FAULTS = (faults.ClientError, faults.BotoCoreError, ResponseParserError, HTTPError, ConnectionError, TimeoutError)


class SlowBodyError(HTTPError):
    """An answer whose bytes come so slowly that another try is better."""


def code_of(error: Exception) -> str:
    """The S3 error code of an answer; empty where there was no answer."""
    if not isinstance(error, faults.ClientError):
        return ""
    # Answers to HEAD have no body: their code is the HTTP status.
    return str(error.response.get("Error", {}).get("Code", "unknown"))


def is_conflict(error: Exception) -> bool:
    """Whether another conditional write of the same key was under way; this one had no effect."""
    return code_of(error) in _CONFLICT


def is_worth_another_try(error: Exception) -> bool:
    """Whether the same request may be answered otherwise in a moment."""
    if isinstance(error, faults.ClientError):
        passing = _CONFLICT | _DAMAGED | _OVERLOADED | _TOO_SLOW
        return code_of(error) in passing or _status(error) in _PASSING_STATUS
    return _is_of_the_network(error)


class Explainer:
    """Words for the faults of one bucket. `credentials_method` says where boto3 found the credentials, if it did."""

    def __init__(self, bucket: str, location: str, credentials_method: Callable[[], str | None]) -> None:
        self._bucket = bucket
        self._location = location
        self._credentials_method = credentials_method
        self._server: str | None = None

    def connected_to(self, endpoint_url: str) -> None:
        """From now on the server is named too. Raises ValueError for what is no URL."""
        url = urlsplit(endpoint_url)
        try:
            port = f":{url.port}" if url.port else ""
        except ValueError:
            raise ValueError(f"Invalid endpoint: {endpoint_url}") from None
        self._server = f"{url.scheme}://{url.hostname}{port}"

    @property
    def place(self) -> str:
        """The bucket and prefix, and the server once it is known, without user and password."""
        return self._location if self._server is None else f"{self._location} at {self._server}"

    def error(self, action: str, cause: Exception) -> StoreError:
        """The error to raise for `cause`, itself the cause unless its text holds a password."""
        kind = StoreUnavailableError if _may_pass(cause) else StoreError
        error = kind(f"cannot {action} {_without_password(self._explain(cause))}")
        if _without_password(str(cause)) == str(cause):
            error.__cause__ = cause
        error.__suppress_context__ = True
        return error

    def _explain(self, cause: Exception) -> str:
        if isinstance(cause, _NO_CREDENTIALS):
            return (
                f"{self._location}: {cause}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or run "
                "where a role gives credentials"
            )
        if isinstance(cause, faults.ClientError):
            return self._explain_answer(cause)
        if isinstance(cause, faults.ParamValidationError):
            return f"{self._location}: {cause}; mend `store`"
        if isinstance(cause, ValueError):
            return f"{self._location}: {cause}; mend AWS_ENDPOINT_URL, which must be like https://host:9000"
        return f"{self.place}: {cause}; check AWS_ENDPOINT_URL, the network and the server, then try again"

    def _explain_answer(self, cause: faults.ClientError) -> str:
        code = code_of(cause)
        message = cause.response.get("Error", {}).get("Message", "no message")
        if code == "NoSuchBucket":
            return f"{self.place}: there is no bucket {self._bucket!r}; create it, or mend `store`"
        if code in _WRONG_REGION or _status(cause) == 301:
            return f"{self.place}: the bucket is in another region ({code}); set AWS_REGION to the bucket's region"
        if code in _REFUSED:
            return (
                f"{self.place}: the server refuses bucket {self._bucket!r} to {self._credentials} ({code}); check "
                "them, the clock, and that their policy allows s3:ListBucket and s3:ListBucketMultipartUploads on the "
                "bucket, and s3:GetObject, s3:PutObject, s3:DeleteObject, s3:AbortMultipartUpload and "
                "s3:ListMultipartUploadParts on what is in it"
            )
        if code in _CONFLICT:
            return f"{self.place}: the same name is being written by others without end; run the same command again"
        if code in _DAMAGED:
            return (
                f"{self.place}: the bytes that arrived do not have their digest ({code}); a file changed after it was "
                "hashed, or the network damages what it carries; run the same command again"
            )
        return f"{self.place}: the server answers {code} ({message}); look at the server's log, then try again"

    @property
    def _credentials(self) -> str:
        method = self._credentials_method() or "nowhere"
        where = {
            "env": "the environment (AWS_ACCESS_KEY_ID)",
            "shared-credentials-file": "the shared credentials file",
            "config-file": "the AWS config file",
        }.get(method, f"boto3's source {method!r}")
        return f"the credentials from {where}"


def _may_pass(cause: Exception) -> bool:
    """Whether the same command may work later: no answer, or a fault or overload on the server's side."""
    if isinstance(cause, faults.ClientError):
        return is_worth_another_try(cause) or (_status(cause) >= 500 and _status(cause) != 501)
    return _is_of_the_network(cause)


def _is_of_the_network(cause: Exception) -> bool:
    return isinstance(
        cause,
        faults.HTTPClientError
        | faults.ConnectionError
        | faults.ResponseStreamingError
        | faults.IncompleteReadError
        | ResponseParserError
        | HTTPError
        | ConnectionError
        | TimeoutError,
    )


def _status(error: faults.ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _without_password(text: str) -> str:
    return _USER_AND_PASSWORD.sub("", text)
