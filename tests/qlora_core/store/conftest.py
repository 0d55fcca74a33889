"""A folder, and buckets on S3 servers on loopback, each with the means to look at and damage what is stored."""

import hashlib
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import boto3
import botocore.loaders
import botocore.session
import pytest
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from moto.server import ThreadedMotoServer
from werkzeug.serving import make_server

from qlora_core.store.artifact import StageKey
from qlora_core.store.layout import blob_name, manifest_name
from qlora_core.store.store import Store, open_store

FILES = {
    "model.safetensors": b"weights, as far as the store can tell " * 200,
    "config.json": b'{"hidden_size": 64}\n',
    "tokenizer/tokenizer.json": b"{}",
}


def build_sample(folder: Path) -> None:
    """A stage that writes `FILES`."""
    for path, content in FILES.items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(content)


def sample_key(seed: int = 0) -> StageKey:
    """A key like any other."""
    return StageKey("quantize", "1", {"blocksize": 64, "seed": seed, "rate": 0.1}, {"base": "b" * 64})


class Place(Protocol):
    """A store with a view from behind."""

    store: Store

    def reader(self) -> Store:
        """The same store as another machine sees it."""
        ...

    def names(self) -> list[str]:
        """Everything stored, relative to the root: records and blobs, and what is left of writing them."""
        ...

    def change_blob(self, sha256: str, content: bytes | None) -> None:
        """Overwrite a blob behind the store's back; None deletes it."""
        ...

    def change(self, path: str, content: bytes | None) -> None:
        """The same for the blob of the sample's file `path`."""
        ...

    def change_manifest(self, edit: Callable[[bytes], bytes]) -> None:
        """Overwrite the sample's manifest."""
        ...


class FolderPlace:
    """The folder backend, looked at with the file system."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store = self.reader()

    def reader(self) -> Store:
        return open_store(f"file://{self.root}", self.root / "unused")

    def names(self) -> list[str]:
        files = sorted(str(path.relative_to(self.root)) for path in self.root.rglob("*") if path.is_file())
        # Folders of links are this machine's, and locks hold nothing.
        return [name for name in files if not name.startswith(("v1/view/", "v1/lock/"))]

    def change(self, path: str, content: bytes | None) -> None:
        self.change_blob(hashlib.sha256(FILES[path]).hexdigest(), content)

    def change_blob(self, sha256: str, content: bytes | None) -> None:
        file = self.root / blob_name(sha256)
        if content is None:
            file.unlink()
        else:
            file.chmod(0o644)
            file.write_bytes(content)

    def change_manifest(self, edit: Callable[[bytes], bytes]) -> None:
        file = self.root / manifest_name(sample_key().address)
        file.write_bytes(edit(file.read_bytes()))


class BucketPlace:
    """The S3 backend, looked at with a client of its own."""

    def __init__(self, url: str, scratch: Path, client: Any) -> None:
        self.url = url
        self._scratch = scratch
        self._client = client
        self._bucket, self._prefix = url.removeprefix("s3://").split("/", 1)
        self._readers = 0
        self.store = self.reader()

    @property
    def newest_cache(self) -> Path:
        return self._scratch / f"cache{self._readers}"

    def reader(self) -> Store:
        self._readers += 1
        return open_store(self.url, self.newest_cache)

    def names(self) -> list[str]:
        listed = self._client.list_objects_v2(Bucket=self._bucket).get("Contents", [])
        return sorted(entry["Key"].removeprefix(f"{self._prefix}/") for entry in listed)

    def change(self, path: str, content: bytes | None) -> None:
        self.change_blob(hashlib.sha256(FILES[path]).hexdigest(), content)

    def change_blob(self, sha256: str, content: bytes | None) -> None:
        key = f"{self._prefix}/{blob_name(sha256)}"
        if content is None:
            self._client.delete_object(Bucket=self._bucket, Key=key)
        else:
            self._client.put_object(Bucket=self._bucket, Key=key, Body=content)

    def change_manifest(self, edit: Callable[[bytes], bytes]) -> None:
        key = f"{self._prefix}/{manifest_name(sample_key().address)}"
        before = self._client.get_object(Bucket=self._bucket, Key=key)["Body"].read()
        self._client.put_object(Bucket=self._bucket, Key=key, Body=edit(before))


class MisbehavingServer:
    """The same S3 server, which can be told to ignore conditions, answer 409, be full, or spoil what it sends."""

    def __init__(self) -> None:
        self._app = DomainDispatcherApplication(create_backend_app)
        self.ignores_conditions = False
        self.conflicts = 0
        self.spoiled_downloads = 0
        self.failing_uploads = False
        self.blobs_received = 0
        self._server = make_server("127.0.0.1", 0, self._respond, threaded=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def _respond(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if "HTTP_IF_NONE_MATCH" in environ:
            if self.ignores_conditions:
                del environ["HTTP_IF_NONE_MATCH"]
            elif self.conflicts:
                self.conflicts -= 1
                start_response("409 Conflict", [("Content-Type", "application/xml")])
                return [b"<Error><Code>ConditionalRequestConflict</Code><Message>try again</Message></Error>"]
        if environ["REQUEST_METHOD"] == "PUT" and "/v1/blob/" in environ["PATH_INFO"]:
            self.blobs_received += 1
            if self.failing_uploads:
                start_response("507 Insufficient Storage", [("Content-Type", "application/xml")])
                return [b"<Error><Code>XMinioStorageFull</Code><Message>the drive is full</Message></Error>"]
        body = b"".join(self._app(environ, start_response))
        if self.spoiled_downloads and environ["REQUEST_METHOD"] == "GET" and "/v1/blob/" in environ["PATH_INFO"]:
            self.spoiled_downloads -= 1
            return [body[:-1] + b"!"]
        return [body]

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """The address of an S3 server on loopback."""
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(scope="session")
def light_session() -> Callable[[], boto3.Session]:
    """boto3.Session as ever, but S3's description is parsed once for all tests."""
    loader, real = botocore.loaders.create_loader(), boto3.Session

    def session() -> boto3.Session:
        inner = botocore.session.get_session()
        inner.register_component("data_loader", loader)
        return real(botocore_session=inner)

    return session


@pytest.fixture(scope="session")
def strict_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of another maker's S3 server, which compares what is sent with its digest."""
    program = Path(sys.executable).with_name("ministack")
    if not program.is_file():
        pytest.skip(f"{program} is not here")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    log = tmp_path_factory.mktemp("ministack") / "log"
    env = {**os.environ, "GATEWAY_PORT": str(port), "SERVICES": "s3"}
    with log.open("wb") as output, subprocess.Popen([program], env=env, stdout=output, stderr=output) as server:
        try:
            _wait_until_listening(port, server, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


def _wait_until_listening(port: int, server: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        else:
            return


@pytest.fixture
def lead_boto_to(
    light_session: Callable[[], boto3.Session], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[[str], Any]:
    """A function that leads boto3's own chain to a server, by the environment, and returns a client of it."""

    def lead(endpoint: str) -> Any:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "example-secret-1234")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no-config"))
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no-credentials"))
        monkeypatch.setattr(boto3, "Session", light_session)
        return boto3.Session().client("s3")

    return lead


@pytest.fixture
def s3_client(s3_endpoint: str, lead_boto_to: Callable[[str], Any]) -> Any:
    """A client beside the store's; the environment leads boto3's own chain to the same server."""
    return lead_boto_to(s3_endpoint)


@pytest.fixture
def folder_place(tmp_path: Path) -> FolderPlace:
    """A store in an empty folder that does not exist yet."""
    return FolderPlace(tmp_path / "store")


@pytest.fixture
def bucket_place(s3_client: Any, tmp_path: Path) -> BucketPlace:
    """A store under a prefix of a new bucket."""
    return _new_bucket(s3_client, tmp_path)


@pytest.fixture
def strict_place(strict_endpoint: str, lead_boto_to: Callable[[str], Any], tmp_path: Path) -> BucketPlace:
    """The same on the strict server."""
    return _new_bucket(lead_boto_to(strict_endpoint), tmp_path)


def _new_bucket(client: Any, tmp_path: Path) -> BucketPlace:
    bucket = f"bucket-{hashlib.sha256(str(tmp_path).encode()).hexdigest()[:20]}"
    client.create_bucket(Bucket=bucket)
    return BucketPlace(f"s3://{bucket}/team/models", tmp_path / "caches", client)


@pytest.fixture(params=["folder", "bucket", "strict"])
def place(request: pytest.FixtureRequest) -> Place:
    """Each place in turn."""
    return request.getfixturevalue(f"{request.param}_place")


@pytest.fixture
def misbehaving(bucket_place: BucketPlace, monkeypatch: pytest.MonkeyPatch) -> Iterator[MisbehavingServer]:
    """A server over the same buckets that misbehaves on request; boto3's chain now leads to it."""
    server = MisbehavingServer()
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    yield server
    server.stop()


@pytest.fixture
def build() -> Callable[[Path], None]:
    """The sample stage."""
    return build_sample


@pytest.fixture
def key() -> StageKey:
    """The sample's key."""
    return sample_key()


@pytest.fixture
def files() -> dict[str, bytes]:
    """What the sample stage writes, by path."""
    return dict(FILES)


@pytest.fixture
def producer(tmp_path: Path) -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Starts `programs/producer.py`, and returns when its build has begun; none is left at the end of the test."""
    program = Path(__file__).parent / "programs" / "producer.py"
    started: list[subprocess.Popen[str]] = []

    def start(ttl_s: float, result: str, *more: str) -> "subprocess.Popen[str]":
        command = [sys.executable, program, str(tmp_path), str(ttl_s), result, *more]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        deadline = time.monotonic() + 60
        while not (tmp_path / "building").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()
