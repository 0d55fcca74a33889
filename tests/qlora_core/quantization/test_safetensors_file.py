"""The streamed file against the format's own library, and against damage and a full disk."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from qlora_core.errors import ModelError
from qlora_core.quantization.checkpoint import read_safetensors_header
from qlora_core.quantization.safetensors_file import StreamedFile, digest_tensor, read_back


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_no_space_left_is_an_os_error_of_the_writer() -> None:
    with pytest.raises(OSError, match="No space left"), StreamedFile(Path("/dev/full"), ["a"]) as file:
        file.add("a", torch.zeros(1 << 16))
        file.finish()


def test_written_bytes_that_change_on_disk_are_noticed(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(300, dtype=torch.float32), "odd": torch.ones(3, dtype=torch.uint8)}
    path = tmp_path / "one.safetensors"
    with StreamedFile(path, tensors) as file:
        for name, tensor in tensors.items():
            file.add(name, tensor)
        file.finish()
    meant = {name: digest_tensor(tensor) for name, tensor in tensors.items()}
    read_back(path, meant)
    with safe_open(path, framework="pt") as found:
        assert all(torch.equal(found.get_tensor(name), tensor) for name, tensor in tensors.items())
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ModelError, match="odd reads back differently"):
        read_back(path, meant)


def test_file_that_was_never_finished_is_no_safetensors_file(tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    with StreamedFile(path, ["a"]) as file:
        file.add("a", torch.ones(64))
    with pytest.raises(ModelError, match="truncated or damaged"):
        read_safetensors_header(path)
