"""Which folders may be registered, and that a folder's identity follows its bytes."""

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_core.errors import RegistryError
from qlora_core.registry.adapter_files import adapter_files, adapter_sha256


def test_whole_adapter_is_accepted(write_adapter: Callable[[int], Path]) -> None:
    folder = write_adapter(0)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert "adapter_model.safetensors" in adapter_files(folder)
    assert len(adapter_sha256(folder)) == 64


@pytest.mark.parametrize("name", ["adapter_model.bin", "optimizer.pt", "setup.py", "weights"])
def test_other_file_types_are_refused_by_name(write_adapter: Callable[[int], Path], name: str) -> None:
    folder = write_adapter(0)
    (folder / name).write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(RegistryError, match=name):
        adapter_files(folder)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "qlora.json"])
def test_pickle_under_an_allowed_name_is_refused(write_adapter: Callable[[int], Path], name: str) -> None:
    folder = write_adapter(0)
    (folder / name).write_bytes(pickle.dumps({"weights": [1.0, 2.0]}))
    with pytest.raises(RegistryError, match=name):
        adapter_files(folder)


def test_link_and_missing_file_are_refused(write_adapter: Callable[[int], Path]) -> None:
    folder = write_adapter(0)
    (folder / "README.md").symlink_to("/etc/hostname")
    with pytest.raises(RegistryError, match=r"README\.md.*link"):
        adapter_files(folder)
    (folder / "README.md").unlink()
    (folder / "golden.json").unlink()
    with pytest.raises(RegistryError, match=r"lacks golden\.json"):
        adapter_files(folder)


def test_one_changed_byte_changes_the_identity(write_adapter: Callable[[int], Path]) -> None:
    folder = write_adapter(0)
    before = adapter_sha256(folder)
    data = bytearray((folder / "adapter_model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "adapter_model.safetensors").write_bytes(data)
    assert adapter_sha256(folder) != before
