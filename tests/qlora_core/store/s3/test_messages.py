"""What a user reads when a bucket cannot be used: the place, the cause, the next step; never a secret."""

import logging
import socket
import time
import traceback
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qlora_core.errors import ConfigError, StoreError, StoreUnavailableError
from qlora_core.store.pool import BlobPool
from qlora_core.store.s3.bucket import S3Bucket


@pytest.fixture
def strict_credentials(moto: Any) -> Iterator[None]:
    """For one test the server checks who is asking."""

    def reset(unchecked_requests: str) -> None:
        url, headers = f"{moto.endpoint}/moto-api/reset-auth", {"Content-Type": "text/plain"}
        with urllib.request.urlopen(urllib.request.Request(url, unchecked_requests.encode(), headers, method="POST")):
            pass

    reset("0")
    yield
    reset("inf")


def unused_url() -> str:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{unused.getsockname()[1]}"


def test_nothing_is_sent_or_written_before_something_is_asked_for(moto: Any, tmp_path: Path) -> None:
    proxy = moto.behind_proxy()
    bucket = S3Bucket(moto.bucket, "team", BlobPool(tmp_path / "pool"))
    assert bucket.location == f"s3://{moto.bucket}/team"
    assert proxy.log == []
    assert not (tmp_path / "pool").exists()


def test_wrong_credentials_name_bucket_and_source_but_no_secret(
    moto: Any, strict_credentials: None, send: Any, caplog: pytest.LogCaptureFixture
) -> None:
    bucket = moto.machine()
    with caplog.at_level(logging.INFO):
        for use in (
            bucket.check,
            lambda: bucket.read("v1/pin/x.json"),
            lambda: bucket.create("v1/pin/x.json", b"{}"),
            lambda: send(bucket, {"a.json": b"{}"}),
        ):
            with pytest.raises(StoreError) as caught:
                use()
            message = str(caught.value)
            assert not isinstance(caught.value, StoreUnavailableError)
            assert bucket.location in message
            assert "the environment (AWS_ACCESS_KEY_ID)" in message
            assert "s3:PutObject" in message
            assert "example-secret" not in message + "".join(traceback.format_exception(caught.value))
    assert "example-secret" not in caplog.text


def test_no_credentials_at_all_says_what_to_set(moto: Any) -> None:
    moto.environ.delenv("AWS_ACCESS_KEY_ID")
    moto.environ.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StoreError, match=r"s3://.*set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        moto.machine().check()


def test_unknown_profile_is_named(moto: Any) -> None:
    moto.environ.setenv("AWS_PROFILE", "nightly-typo")
    with pytest.raises(StoreError, match=r"nightly-typo.*AWS_PROFILE"):
        moto.machine().check()


def test_missing_bucket_is_named_with_the_next_step(place: Any, send: Any, tmp_path: Path) -> None:
    bucket = S3Bucket("no-such-bucket", "x", BlobPool(tmp_path / "pool"))
    for use in (
        bucket.check,
        lambda: bucket.read("v1/pin/x.json"),
        lambda: bucket.create("v1/pin/x.json", b"{}"),
        lambda: list(bucket.list("v1/pin/")),
        lambda: send(bucket, {"a.json": b"{}"}),
    ):
        with pytest.raises(StoreError, match=r"there is no bucket 'no-such-bucket'; create it"):
            use()


def test_impossible_bucket_name_is_a_store_error(moto: Any, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="mend `store`"):
        S3Bucket("no such bucket", "x", BlobPool(tmp_path)).check()


@pytest.mark.parametrize("prefix", ["a//b", "../b", "a\\b"])
def test_impossible_prefix_is_a_config_error(prefix: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not understood"):
        S3Bucket("bucket", prefix, BlobPool(tmp_path))


def test_key_without_its_encryption_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="set encryption to aws:kms"):
        S3Bucket("bucket", "x", BlobPool(tmp_path), encryption="AES256", kms_key_id="alias/artifacts")


def test_endpoint_that_refuses_connections_fails_soon_and_is_named(moto: Any) -> None:
    url = unused_url()
    moto.environ.setenv("AWS_ENDPOINT_URL", url)
    started = time.monotonic()
    with pytest.raises(StoreUnavailableError, match=rf"{url}.*check AWS_ENDPOINT_URL"):
        moto.machine().check()
    assert time.monotonic() - started < 5


def test_endpoint_that_is_no_url_is_named(moto: Any) -> None:
    moto.environ.setenv("AWS_ENDPOINT_URL", "minio:9000")
    with pytest.raises(StoreError, match=r"minio:9000.*mend AWS_ENDPOINT_URL"):
        moto.machine().check()


def test_endpoint_that_is_no_s3_server_is_an_error(moto: Any, tmp_path: Path) -> None:
    proxy = moto.behind_proxy()
    proxy.plan = lambda *request: "404"
    bucket = moto.machine()
    with pytest.raises(StoreError, match=rf"{proxy.url}.*404"):
        bucket.create("v1/pin/x.json", b"{}")
    with pytest.raises(StoreError, match=rf"{proxy.url}.*404"):
        list(bucket.list("v1/pin/"))


@pytest.mark.parametrize(
    "endpoint", ["http://me:hunter2@127.0.0.1:{port}", "me:hunter2@minio:9000", "http://me:hun/hunter2@x"]
)
def test_password_in_the_endpoint_is_never_shown(moto: Any, endpoint: str) -> None:
    port = unused_url().rpartition(":")[2]
    moto.environ.setenv("AWS_ENDPOINT_URL", endpoint.format(port=port))
    bucket = moto.machine(deadline_s=0.2)
    for use in (bucket.check, lambda: bucket.read("v1/pin/x.json")):
        with pytest.raises(StoreError) as caught:
            use()
        shown = str(caught.value) + "".join(traceback.format_exception(caught.value))
        assert "hunter2" not in shown
        assert bucket.location in shown
