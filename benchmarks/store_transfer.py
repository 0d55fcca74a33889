"""The artifact store against doing it by hand: a folder against cp and SHA-256, a bucket against boto3's transfers.

The same files, of mixed sizes, by turns in one process. The store's times include all that makes it safe: hashing, the
manifest, durable writes, and the comparison of what is read with what was written; boto3's, with its default settings,
include none of that. Contents are compared first. `python -m benchmarks.store_transfer --size-mb 64` is a quick run.
"""

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3

from qlora_core.digest import digest_file
from qlora_core.store.backend import Backend
from qlora_core.store.contents import list_files, seal
from qlora_core.store.layout import BLOBS, manifest_name
from qlora_core.store.local import LocalFolder
from qlora_core.store.manifest import Manifest, new_manifest, parse_manifest
from qlora_core.store.pool import BlobPool
from qlora_core.store.s3.bucket import S3Bucket

ROUNDS = 3
SIZE_MB = 1024
BUCKET = "benchmark"
# How many, and what share of the whole each: shards of weights, middling files, the small change of a checkpoint.
SIZES = ((2, 0.30), (4, 0.07), (12, 0.008), (100, 0.00024))
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Way:
    """One way to do it: `work` is timed, what `prepare` does is not; it returns what `work` needs."""

    prepare: Callable[[], Any]
    work: Callable[[Any], object]


def measure(size_mb: int = SIZE_MB) -> dict[str, Any]:
    """Median seconds of CPU and wall time of each way, and the other way's time over the store's."""
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        source = scratch / "source"
        _write_files(source, size_mb)
        sizes = [file.stat().st_size for _, file in list_files(source)]
        figures: dict[str, Any] = {"size_bytes": sum(sizes), "files": len(sizes), "rounds": ROUNDS}
        figures["folder"] = _measure_folder(source, scratch)
        with _moto_server(scratch / "moto.log") as endpoint:
            figures["s3"] = _measure_bucket(source, scratch, endpoint)
    return figures


def _measure_folder(source: Path, scratch: Path) -> dict[str, Any]:
    published = LocalFolder(scratch / "published")
    manifest = _publish(published, _staged(published, source))
    _check_equal(source, _read(LocalFolder(scratch / "published"), manifest))

    def fresh_store() -> tuple[LocalFolder, Path]:
        store = LocalFolder(_emptied(scratch / "store"))
        return store, _staged(store, source)

    def copy_and_hash(target: Path) -> None:
        subprocess.run(["cp", "-r", str(source), str(target)], check=True)
        _hash(target)

    medians = _by_turns(
        {
            "publish": Way(fresh_store, lambda made: _publish(*made)),
            "read": Way(lambda: LocalFolder(scratch / "published"), lambda store: _read(store, manifest)),
            "cp_and_sha256": Way(lambda: _emptied(scratch / "copy"), copy_and_hash),
            "sha256": Way(lambda: source, _hash),
        }
    )
    for name in ("published", "store", "copy"):
        shutil.rmtree(scratch / name)
    pairs = {"publish": "cp_and_sha256", "read": "cp_and_sha256", "read ": "sha256"}
    return {"medians": medians, **{f"{by}_over_{way.strip()}": _ratio(medians, by, way) for way, by in pairs.items()}}


def _measure_bucket(source: Path, scratch: Path, endpoint: str) -> dict[str, Any]:
    os.environ.update(AWS_ENDPOINT_URL=endpoint, AWS_ACCESS_KEY_ID="x", AWS_SECRET_ACCESS_KEY="x")
    os.environ.update(AWS_DEFAULT_REGION="us-east-1")
    client = boto3.client("s3")
    client.create_bucket(Bucket=BUCKET)

    def new_machine() -> S3Bucket:
        bucket = S3Bucket(BUCKET, "ours", BlobPool(_emptied(scratch / "pool")))
        bucket.read("v1/pin/none.json")  # connected, as boto3's client is
        return bucket

    def fresh_bucket() -> tuple[S3Bucket, Path]:
        _delete_objects(client, "ours/")
        bucket = new_machine()
        return bucket, _staged(bucket, source)

    def upload(_: None) -> None:
        for path, file in list_files(source):
            client.upload_file(str(file), BUCKET, f"boto3/{path}")

    def download(folder: Path) -> None:
        folder.mkdir()
        for path, _ in list_files(source):
            client.download_file(BUCKET, f"boto3/{path}", str(folder / path))

    manifest = _publish(*fresh_bucket())
    _check_equal(source, _read(new_machine(), manifest))
    upload(None)
    download(_emptied(scratch / "boto3"))
    _check_equal(source, scratch / "boto3")
    medians = _by_turns(
        {
            "publish": Way(fresh_bucket, lambda made: _publish(*made)),
            "upload_file": Way(lambda: _delete_objects(client, "boto3/"), upload),
            "read": Way(new_machine, lambda bucket: _read(bucket, manifest)),
            "download_file": Way(lambda: _emptied(scratch / "boto3"), download),
        }
    )
    return {
        "medians": medians,
        "upload_file_over_publish": _ratio(medians, "upload_file", "publish"),
        "download_file_over_read": _ratio(medians, "download_file", "read"),
    }


def _staged(store: Backend, source: Path) -> Path:
    """The files as a stage leaves them: just written, in a staging folder, not on disk yet."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(store.staging())
        # The folder is emptied by being sent, and goes with its store.
        stack.pop_all()
    subprocess.run(["cp", "-r", f"{source}/.", str(folder)], check=True)
    return folder


def _publish(store: Backend, folder: Path) -> Manifest:
    files = seal(folder)
    store.send(folder, files, BLOBS)
    manifest = new_manifest("train", "1", {}, {}, files)
    store.create(manifest_name(manifest.address), manifest.to_json())
    return manifest


def _read(store: Backend, manifest: Manifest) -> Path:
    record = store.read(manifest_name(manifest.address))
    found = parse_manifest(record.data if record else b"", manifest.address)
    store.fetch(found.files.values(), BLOBS)
    folder = store.pool.view(found.digest, found.files)
    if folder is None:
        raise SystemExit("files vanish as they are read")
    return folder


def _hash(folder: Path) -> None:
    for _, file in list_files(folder):
        digest_file(file)


def _check_equal(source: Path, folder: Path) -> None:
    digests = [{path: digest_file(file) for path, file in list_files(place)} for place in (source, folder)]
    if digests[0] != digests[1]:
        raise SystemExit(f"{folder} does not have the files that were stored")


def _by_turns(ways: Mapping[str, Way]) -> dict[str, dict[str, float]]:
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            made = way.prepare()
            os.sync()
            cpu, wall = _cpu_s(), time.perf_counter()
            way.work(made)
            seconds[name].append((_cpu_s() - cpu, time.perf_counter() - wall))
    return {
        name: {"cpu_s": statistics.median(c for c, _ in taken), "wall_s": statistics.median(w for _, w in taken)}
        for name, taken in seconds.items()
    }


def _cpu_s() -> float:
    """CPU time of this process and of those it has waited for, so that cp counts and the server does not."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _ratio(medians: Mapping[str, Mapping[str, float]], other: str, ours: str) -> dict[str, float]:
    return {unit: medians[other][unit] / medians[ours.strip()][unit] for unit in ("cpu_s", "wall_s")}


def _write_files(folder: Path, size_mb: int) -> None:
    chance = random.Random(0)
    folder.mkdir()
    for count, share in SIZES:
        for number in range(count):
            length = int(size_mb * (1 << 20) * share * chance.uniform(0.9, 1.1))
            with (folder / f"{share}-{number}.safetensors").open("wb") as stream:
                for at in range(0, length, _CHUNK_BYTES):
                    stream.write(chance.randbytes(min(_CHUNK_BYTES, length - at)))


def _emptied(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def _delete_objects(client: Any, prefix: str) -> None:
    while found := client.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents"):
        client.delete_objects(Bucket=BUCKET, Delete={"Objects": [{"Key": one["Key"]} for one in found]})


@contextlib.contextmanager
def _moto_server(log: Path) -> Iterator[str]:
    """An S3 server in a process of its own, once it listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # For both ways it keeps things in memory, and memory it has once got: what is measured is not the server.
    limits = {"MALLOC_MMAP_THRESHOLD_": 1 << 32, "MALLOC_TRIM_THRESHOLD_": 1 << 33}
    settings = {"MOTO_S3_DEFAULT_KEY_BUFFER_SIZE": 1 << 31, **limits}
    env = {**os.environ, **{name: str(value) for name, value in settings.items()}}
    command = [str(Path(sys.executable).parent / "moto_server"), "-H", "127.0.0.1", "-p", str(port)]
    with log.open("wb") as stream:
        process = subprocess.Popen(command, env=env, stdout=stream, stderr=subprocess.STDOUT)
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--size-mb", type=int, default=SIZE_MB)
    sys.stdout.write(json.dumps(measure(parser.parse_args().size_mb), indent=1) + "\n")
