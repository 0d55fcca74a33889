"""What may stand in an adapter folder, and the folder's identity. Knows nothing of MLflow and loads no model."""

import json
from pathlib import Path

from qlora_core.digest import digest_files
from qlora_core.errors import RegistryError

ALLOWED_SUFFIXES = (".safetensors", ".json", ".jinja", ".txt", ".md", ".model")  # .model: sentencepiece vocabulary
REQUIRED_FILES = ("adapter_config.json", "adapter_model.safetensors", "golden.json", "golden.safetensors", "qlora.json")


def adapter_files(folder: Path) -> dict[str, Path]:
    """Every file of an adapter folder by its path inside it, checked.

    Raises RegistryError, naming the file, for anything but safetensors, JSON and text, for a link (its target is not
    part of the folder), for JSON or safetensors that cannot be read, and for a required file that is missing.
    """
    if not folder.is_dir():
        raise RegistryError(f"no adapter folder at {folder}; give the sweep's adapter folder")
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if not path.is_dir()}
    for name, path in files.items():
        _check_file(name, path)
    if missing := [name for name in REQUIRED_FILES if name not in files]:
        raise RegistryError(
            f"adapter folder {folder} lacks {', '.join(missing)}; run the sweep again to export it whole"
        )
    return files


def adapter_sha256(folder: Path) -> str:
    """Identity of a checked adapter folder: names and bytes of all its files, 64 hex digits."""
    return digest_files(adapter_files(folder))


def _check_file(name: str, path: Path) -> None:
    if path.is_symlink():
        raise RegistryError(
            f"adapter file {name!r} is a link; only plain files are registered: copy its target instead"
        )
    if path.suffix not in ALLOWED_SUFFIXES:
        raise RegistryError(
            f"adapter file {name!r} is refused: only {', '.join(ALLOWED_SUFFIXES)} are registered, never pickled "
            "weights or code; remove it or export the adapter as safetensors"
        )
    if path.suffix == ".json":
        _check_json(name, path)
    elif path.suffix == ".safetensors":
        _check_safetensors(name, path)


def _check_json(name: str, path: Path) -> None:
    try:
        json.loads(path.read_bytes())
    except ValueError as error:
        raise RegistryError(f"adapter file {name!r} is not JSON ({error}); export the adapter again") from error


def _check_safetensors(name: str, path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as tensors:
            empty = not list(tensors.keys())
    except SafetensorError as error:
        raise RegistryError(
            f"adapter file {name!r} is no safetensors file ({error}); export the adapter again"
        ) from error
    if empty:
        raise RegistryError(f"adapter file {name!r} holds no tensor; export the adapter again")
