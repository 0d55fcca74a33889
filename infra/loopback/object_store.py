"""An S3 server of a few lines: moto's, in memory, with the keys of this start and nothing else open.

    S3_SECRET=... python -m infra.loopback.object_store PORT BUCKET KEY_ID_FILE

moto checks every signature and policy once it is told to; what it leaves open (its own control address, other services
of AWS) is shut in front of it. Writes the access key's id, which moto names, into KEY_ID_FILE when it is ready.
For trials and tests: objects are gone with the process.
"""

import json
import os
import re
import sys
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from botocore.credentials import Credentials
from moto import settings
from moto.core.authorization import ActionAuthenticatorMixin
from moto.iam.models import iam_backends
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from moto.s3.models import s3_backends
from werkzeug.serving import make_server

from infra.loopback.presigned import with_signed_headers

ACCOUNT, REGION, USER = "123456789012", "us-east-1", "qlora"
_SIGNED = re.compile(r"AWS4-HMAC-SHA256 Credential=[^/,\s]+/\d{8}/[^/,\s]+/s3/aws4_request")
_REFUSED = b"<Error><Code>AccessDenied</Code><Message>a signed S3 request is needed</Message></Error>"

Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


def only_signed(application: Application, key: Credentials) -> Application:
    """The application for requests that are signed for S3, in a header (which moto checks) or in the query; 403 for all
    others, its control address included."""

    def checked(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        path = str(environ.get("PATH_INFO", "")).lstrip("/")
        asked: dict[str, Any] | None = environ
        if not _SIGNED.match(environ.get("HTTP_AUTHORIZATION", "")):
            asked = with_signed_headers(environ, key, REGION, datetime.now(UTC))
        if asked is None or path.startswith("moto-api"):
            start_response("403 Forbidden", [("Content-Type", "application/xml")])
            return [_REFUSED]
        return application(asked, start_response)

    return checked


def make_key(bucket: str, secret: str) -> str:
    """Make the bucket and one user who may do everything to it and nothing else; returns the access key's id."""
    s3_backends[ACCOUNT]["aws"].create_bucket(bucket, REGION)
    iam = iam_backends[ACCOUNT]["aws"]
    iam.create_user(REGION, USER)
    where = [f"arn:aws:s3:::{bucket}", f"arn:aws:s3:::{bucket}/*"]
    statement = {"Effect": "Allow", "Action": "s3:*", "Resource": where}
    iam.put_user_policy(USER, USER, json.dumps({"Version": "2012-10-17", "Statement": [statement]}))
    key = iam.create_access_key(USER)
    key.secret_access_key = secret
    return key.access_key_id


def main(port: int, bucket: str, key_id_file: Path) -> None:
    """Serve on loopback until the process is ended."""
    secret = os.environ.pop("S3_SECRET")
    key_id = make_key(bucket, secret)
    settings.INITIAL_NO_AUTH_ACTION_COUNT = 0
    ActionAuthenticatorMixin.request_count = 0
    application = only_signed(DomainDispatcherApplication(create_backend_app), Credentials(key_id, secret))
    server = make_server("127.0.0.1", port, application, threaded=True, request_handler=MotoRequestHandler)
    key_id_file.write_text(key_id, encoding="utf-8")
    server.serve_forever()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
