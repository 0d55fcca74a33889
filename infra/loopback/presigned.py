"""Presigned URLs for the S3 server of this folder: checks the signature in the query, and puts one in the headers.

moto checks signatures in headers alone, and MLflow's server hands its clients presigned URLs to load artifacts with.
Knows Signature Version 4 as botocore computes it; nothing of buckets, policies or what a request asks for.
"""

import hmac
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from botocore.auth import S3SigV4Auth, S3SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

_OF_THE_SIGNATURE = "X-Amz-"


def with_signed_headers(environ: dict[str, Any], key: Credentials, region: str, now: datetime) -> dict[str, Any] | None:
    """The WSGI request with the signature of its query in its headers; None where that is missing, wrong or too old."""
    asked = urlsplit(str(environ.get("REQUEST_URI", "")))
    signed = dict(parse_qsl(asked.query))
    if not _in_time(signed, now) or not hmac.compare_digest(
        signed.get("X-Amz-Signature", ""), _signature(environ, signed, key, region)
    ):
        return None
    query = "&".join(part for part in asked.query.split("&") if not part.startswith(_OF_THE_SIGNATURE))
    request = _request(environ, asked.path, query)
    S3SigV4Auth(key, "s3", region).add_auth(request)
    headers = {f"HTTP_{name.upper().replace('-', '_')}": value for name, value in request.headers.items()}
    return {**environ, **headers, "QUERY_STRING": query, "REQUEST_URI": f"{asked.path}?{query}"}


def _in_time(signed: dict[str, str], now: datetime) -> bool:
    try:
        begin = datetime.strptime(signed["X-Amz-Date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
        return now < begin + timedelta(seconds=int(signed["X-Amz-Expires"]))
    except (KeyError, ValueError):
        return False


def _signature(environ: dict[str, Any], signed: dict[str, str], key: Credentials, region: str) -> str:
    asked = urlsplit(str(environ["REQUEST_URI"]))
    query = "&".join(part for part in asked.query.split("&") if not part.startswith("X-Amz-Signature="))
    request = _request(environ, asked.path, query)
    request.context["timestamp"] = signed["X-Amz-Date"]
    signer = S3SigV4QueryAuth(key, "s3", region)
    return str(signer.signature(signer.string_to_sign(request, signer.canonical_request(request)), request))


def _request(environ: dict[str, Any], path: str, query: str) -> AWSRequest:
    host = environ["HTTP_HOST"]
    url = f"http://{host}{path}" + (f"?{query}" if query else "")
    return AWSRequest(method=environ["REQUEST_METHOD"], url=url, headers={"host": host})
