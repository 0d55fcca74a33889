"""One safetensors file written tensor by tensor, and read back. Knows the format, not what the tensors are.

The header stands before the data, but is known only when all data is: room is kept for it, and it is filled in last,
with spaces up to the room's end, as the format allows. Until then the file begins with zeros, which no reader accepts.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import xxhash

from qlora_core.errors import ModelError
from qlora_core.quantization.checkpoint import read_safetensors_header

_ALIGNMENT = 8
_BLOCK_BYTES = 4 << 20
_LONGEST_SHAPE = 20 * 8  # digits and commas of a shape of up to 8 dimensions
_ENTRY_BYTES = 120 + _LONGEST_SHAPE  # of a header entry, without the name
_DTYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32",
    torch.int64: "I64", torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64",
    torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64",
}  # fmt: skip


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, without a copy; of a strided one, those of a contiguous copy."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def digest_tensor(tensor: torch.Tensor) -> str:
    """XXH3 of the tensor's bytes, 128 bits: tells damage and change at the speed of memory, and nothing of malice."""
    return xxhash.xxh3_128_hexdigest(tensor_bytes(tensor))


class StreamedFile:
    """A new safetensors file at `path`, for tensors of the given names in any order. Use as a context manager.

    A tensor is on its way to the disk when `add` returns, unless its size is no multiple of 8 bytes: those wait for the
    end, the wider dtypes first, so that every tensor is aligned to its dtype, as other writers of the format see to.
    Nothing is written durably before `finish`.
    """

    def __init__(self, path: Path, names: Iterable[str]) -> None:
        self._path = path
        self._entries: dict[str, dict[str, Any]] = {}
        self._waiting: list[tuple[str, torch.Tensor]] = []
        self._room = sum(len(json.dumps(name).encode()) + _ENTRY_BYTES for name in names) + 100
        self._room += -self._room % _ALIGNMENT
        self._end = 0
        self._stream = path.open("wb")
        self._stream.write(b"\0" * (8 + self._room))

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor under a name that is not in the file yet."""
        if tensor.nbytes % _ALIGNMENT:
            self._waiting.append((name, tensor.clone()))
        else:
            self._write(name, tensor)

    def finish(self) -> None:
        """Fill in the header and bring all to disk. OSError where the disk refuses."""
        for name, tensor in sorted(self._waiting, key=lambda item: -item[1].dtype.itemsize):
            self._write(name, tensor)
        header = json.dumps({"__metadata__": {"format": "pt"}, **self._entries}, separators=(",", ":")).encode()
        if len(header) > self._room:
            raise AssertionError(f"the header of {self._path} takes {len(header)} bytes, {self._room} were kept")
        self._stream.seek(0)
        self._stream.write(self._room.to_bytes(8, "little") + header.ljust(self._room))
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def _write(self, name: str, tensor: torch.Tensor) -> None:
        start, self._end = self._end, self._end + tensor.nbytes
        self._stream.write(tensor_bytes(tensor))
        self._entries[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, self._end],
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()


def read_back(path: Path, meant: Mapping[str, str]) -> str:
    """Compare every tensor of a file with the digest of what was meant; returns the digest of the whole file.

    Raises:
        ModelError: the file holds other tensors than those meant, or other bytes.
    """
    stored = read_safetensors_header(path)
    if stored.keys() != meant.keys():
        raise ModelError(f"{path} does not hold the tensors that were written to it; look at that disk, then run again")
    whole = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as stream:
        in_order = sorted(stored, key=lambda name: (stored[name].offset, stored[name].size_bytes))
        whole.update(stream.read(stored[in_order[0]].offset))
        block = memoryview(bytearray(_BLOCK_BYTES))
        for name in in_order:
            part, left = xxhash.xxh3_128(), stored[name].size_bytes
            while left and (count := stream.readinto(block[:left])):
                whole.update(block[:count])
                part.update(block[:count])
                left -= count
            if part.hexdigest() != meant[name]:
                raise ModelError(f"{path}: {name} reads back differently from what was written; look at that disk")
    return whole.hexdigest()
