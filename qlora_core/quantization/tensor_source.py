"""Where the tensors of a checkpoint are read from, one at a time: a folder of this machine, or an artifact of a store.

Knows safetensors' layout, not what the tensors are for. Nothing is read ahead and nothing is kept, so that a reader
holds what it asked for and no more.
"""

import mmap
import tempfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch

from qlora_core.digest import digest_bytes, digest_file
from qlora_core.errors import ModelError
from qlora_core.quantization.checkpoint import (
    StoredTensor,
    check_dtypes,
    check_unquantized,
    checkpoint_files,
    header_length,
    join_headers,
    parse_header,
    read_tensors,
    tokenizer_files,
    weight_names,
)
from qlora_core.store.backend import Backend
from qlora_core.store.layout import BLOBS
from qlora_core.store.manifest import PIECE_BYTES, FileEntry, Manifest

_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16,
    "U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip
_PIECES_HELD = 2  # neighbours in a file often share a piece
_LARGEST_SIDE_FILE_BYTES = 256 << 20


class TensorSource(Protocol):
    """A checkpoint whose tensors can be read one by one."""

    @property
    def location(self) -> str:
        """The place as a user would write it."""
        ...

    @property
    def folder(self) -> Path:
        """A folder of this machine with its files other than weights: config, tokenizer, index."""
        ...

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Every tensor by its name in the checkpoint."""
        ...

    @property
    def identity(self) -> Mapping[str, str]:
        """By file name, what stands for the file's content; no path and no time is part of it."""
        ...

    @property
    def is_immutable(self) -> bool:
        """Whether an equal `identity` proves equal weights. If not, it covers the headers of weight files only."""
        ...

    def read(self, name: str) -> torch.Tensor:
        """The tensor, in its stored dtype and shape; its memory goes when it does. Raises ModelError for a dtype."""
        ...


class LocalSource:
    """The checkpoint in a folder, each tensor mapped from its file when it is read.

    Raises ModelError where the folder cannot be quantized (see `check_checkpoint`).
    """

    is_immutable = False

    def __init__(self, folder: Path) -> None:
        check_unquantized(folder)
        self.folder = folder
        self.location = str(folder)
        self.tensors: Mapping[str, StoredTensor] = read_tensors(folder)
        check_dtypes(self.location, self.tensors)
        weights = {tensor.file for tensor in self.tensors.values()}
        files = {**checkpoint_files(folder), **tokenizer_files(folder)}
        self.identity: Mapping[str, str] = {
            name: _header_identity(path) if name in weights else digest_file(path)
            for name, path in sorted(files.items())
        }

    def read(self, name: str) -> torch.Tensor:
        """A private mapping of the tensor's bytes: pages come from the disk as they are touched."""
        stored = self.tensors[name]
        path = self.folder / stored.file
        if not stored.size_bytes:
            return _as_tensor(bytearray(), 0, stored, name)
        start = stored.offset - stored.offset % mmap.ALLOCATIONGRANULARITY
        with path.open("rb") as stream:
            # A page behind the file's end would end the process, with no error to catch.
            if path.stat().st_size < stored.offset + stored.size_bytes:
                raise ModelError(f"{path} was cut while it was read; fetch the file again")
            length = stored.offset - start + stored.size_bytes
            mapped = mmap.mmap(stream.fileno(), length, access=mmap.ACCESS_COPY, offset=start)
        return _as_tensor(mapped, stored.offset - start, stored, name)


class StoredSource:
    """The checkpoint that an artifact of a store holds, each tensor fetched by the range of its bytes, and verified.

    `folder` receives the files other than weights, and must be empty. Raises ModelError where the artifact is no
    checkpoint that can be quantized, StoreError where the store cannot be read.
    """

    is_immutable = True

    def __init__(self, backend: Backend, manifest: Manifest, folder: Path) -> None:
        self._backend = backend
        self._files = manifest.files
        self._pieces: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self.folder = folder
        self.location = f"{backend.location}/{manifest.address}"
        self._fetch_side_files()
        check_unquantized(folder)
        headers = [self._header(name) for name in weight_names(folder, self.location, self._files)]
        self.tensors: Mapping[str, StoredTensor] = join_headers(folder, self.location, headers)
        check_dtypes(self.location, self.tensors)
        self.identity: Mapping[str, str] = {name: entry.sha256 for name, entry in sorted(self._files.items())}

    def read(self, name: str) -> torch.Tensor:
        """The pieces that hold the tensor, one after the other into its memory."""
        stored = self.tensors[name]
        content = self._range(self._files[stored.file], stored.offset, stored.size_bytes)
        return _as_tensor(content, 0, stored, name)

    def _range(self, entry: FileEntry, offset: int, length: int) -> bytearray:
        content = bytearray(length)
        filled = 0
        while filled < length:
            index, skip = divmod(offset + filled, PIECE_BYTES)
            part = memoryview(self._piece(entry, index))[skip : skip + length - filled]
            content[filled : filled + len(part)] = part
            filled += len(part)
        return content

    def _piece(self, entry: FileEntry, index: int) -> bytes:
        key = (entry.sha256, index)
        if key not in self._pieces:
            start = index * PIECE_BYTES
            length = min(PIECE_BYTES, entry.size_bytes - start)
            self._pieces[key] = self._backend.read_range(entry, start, length, BLOBS)
            while len(self._pieces) > _PIECES_HELD:
                self._pieces.popitem(last=False)
        self._pieces.move_to_end(key)
        return self._pieces[key]

    def _header(self, name: str) -> dict[str, StoredTensor]:
        entry, location = self._files[name], f"{self.location}/{name}"
        prefix = self._range(entry, 0, min(8, entry.size_bytes))
        length = header_length(location, prefix, entry.size_bytes)
        return parse_header(location, self._range(entry, 8, length), entry.size_bytes)

    def _fetch_side_files(self) -> None:
        for name, entry in self._files.items():
            if name.endswith(".safetensors") or entry.size_bytes > _LARGEST_SIDE_FILE_BYTES:
                continue
            target = self.folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(self._backend.read_range(entry, 0, entry.size_bytes, BLOBS))


@contextmanager
def open_stored_checkpoint(address: str, cache_dir: Path) -> Iterator[StoredSource]:
    """The checkpoint of the artifact at `address`: a store, then `/v1/stage/<stage>/<key>`, as `qlora store ls` shows.

    `s3://bucket/prefix/v1/stage/base/<key>` and `file:///folder/v1/stage/base/<key>` are read alike.

    Raises:
        ModelError: no artifact is there, or it is no checkpoint. StoreError: the store cannot be read.
    """
    from qlora_core.store.store import open_store

    url, found, rest = address.rstrip("/").partition("/v1/stage/")
    if not found:
        raise ModelError(f"{address} names no artifact: give STORE/v1/stage/STAGE/KEY, as `qlora store ls` shows them")
    store = open_store(url, cache_dir)
    manifest = store.manifest_at(f"v1/stage/{rest}")
    if manifest is None:
        raise ModelError(f"{store.location} holds no artifact v1/stage/{rest}; `qlora store ls` shows those it holds")
    with tempfile.TemporaryDirectory(prefix="qlora-base-") as folder:
        yield StoredSource(store.backend, manifest, Path(folder))


def _as_tensor(buffer: mmap.mmap | bytearray, offset: int, stored: StoredTensor, name: str) -> torch.Tensor:
    dtype = _DTYPES.get(stored.dtype)
    if dtype is None:
        raise ModelError(f"{stored.file}: tensor {name} is stored as {stored.dtype}; {', '.join(_DTYPES)} can be read")
    if not stored.size_bytes:
        return torch.empty(stored.shape, dtype=dtype)
    content = torch.frombuffer(buffer, dtype=torch.uint8, count=stored.size_bytes, offset=offset)
    if content.data_ptr() % dtype.itemsize:  # the format allows it, the processor need not
        content = content.clone()
    return content.view(dtype).view(stored.shape)


def _header_identity(path: Path) -> str:
    """Digest of a weight file's header and size: not of its content, which would cost a pass over it."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        prefix = stream.read(8)
        raw = stream.read(header_length(str(path), prefix, size))
    return digest_bytes(prefix + raw + size.to_bytes(8, "little"))
