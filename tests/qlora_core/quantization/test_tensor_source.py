"""Checkpoints in folders and in stores, on a real S3 server: read tensor by tensor, and quantized alike."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import pytest
import torch
from moto.server import ThreadedMotoServer
from safetensors.torch import load_file

from qlora_core.config.quantize import QuantizeConfig
from qlora_core.errors import ModelError
from qlora_core.quantization.publish import quantize_folder
from qlora_core.quantization.quantize import quantize_checkpoint
from qlora_core.quantization.tensor_source import LocalSource, open_stored_checkpoint
from qlora_core.store.artifact import StageKey
from qlora_core.store.store import open_store

MakeLlama = Callable[..., Path]


def test_file_cut_while_it_is_read_is_an_error_and_no_crash(make_llama: MakeLlama) -> None:
    folder = make_llama()
    source = LocalSource(folder)
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size // 4)
    with pytest.raises(ModelError, match="cut while it was read"):
        for name in source.tensors:
            source.read(name)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """The address of a store on an S3 server on loopback."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "AKIAEXAMPLE",
        "AWS_SECRET_ACCESS_KEY": "example", "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": str(tmp_path / "no-config"), "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "no-credentials"),
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    boto3.client("s3").create_bucket(Bucket="models")
    yield "s3://models/team"
    server.stop()


def put_into_store(source: Path, url: str, cache: Path) -> str:
    store, key = open_store(url, cache), StageKey("base", "1", {}, {})

    def build(out: Path) -> None:
        shutil.copytree(source, out, dirs_exist_ok=True)

    store.get_or_build(key, build)
    return f"{url}/{key.address}"


def test_base_in_a_bucket_is_quantized_by_ranges_without_a_copy_of_it(
    make_llama: MakeLlama, tmp_path: Path, bucket: str
) -> None:
    source = make_llama(shard_size="200KB")
    address = put_into_store(source, bucket, tmp_path / "producer")
    cache = tmp_path / "cache"
    with open_stored_checkpoint(address, cache) as stored:
        local = LocalSource(source)
        assert stored.tensors == local.tensors
        assert all(torch.equal(stored.read(name), local.read(name)) for name in local.tensors)
        assert not list(stored.folder.glob("*.safetensors"))
        report = quantize_checkpoint(stored, tmp_path / "out", QuantizeConfig())
    assert not [path for path in cache.rglob("*") if path.is_file()]
    quantize_checkpoint(source, tmp_path / "local", QuantizeConfig())
    ours, theirs = (load_file(tmp_path / folder / "model.safetensors") for folder in ("out", "local"))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert report["shards"] == 1


def test_base_in_a_folder_of_a_store_is_found_by_its_address(make_llama: MakeLlama, tmp_path: Path) -> None:
    url = f"file://{tmp_path / 'store'}"
    address = put_into_store(make_llama(), url, tmp_path / "unused")
    assert quantize_folder(address, tmp_path / "out", QuantizeConfig())["shards"] == 1
    for wrong, complaint in [(f"{url}/v1/stage/base/{'0' * 64}", "holds no artifact"), (url, "names no artifact")]:
        with pytest.raises(ModelError, match=complaint):
            quantize_folder(wrong, tmp_path / "none", QuantizeConfig())
