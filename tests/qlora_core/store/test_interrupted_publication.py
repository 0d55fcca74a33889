"""A publication that was decided is never lost, whichever request of it fails, its effect had or not."""

import itertools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_core.errors import StoreUnavailableError
from qlora_core.store.artifact import StageKey
from qlora_core.store.exchange import export_artifacts, import_artifacts
from qlora_core.store.lease import lease_name
from qlora_core.store.local import LocalFolder
from qlora_core.store.store import Store

KEY = StageKey("sweep", "1", {}, {"base": "b" * 64})
LEASE = f"stage/sweep/{KEY.key}"
ASKED = {"read", "create", "replace", "remove", "list", "send", "fetch"}
TTL_S = 0.4


class FailingFolder(LocalFolder):
    """A folder whose `at`th request in this thread fails, before or after it has had its effect."""

    def __init__(self, root: Path, at: int, error: type[BaseException], *, has_effect: bool) -> None:
        super().__init__(root)
        self._left, self._error, self._has_effect = at, error, has_effect
        self._thread = threading.get_ident()
        self._inside = False
        self.failed = ""
        self.decided = False

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        return self._counted(name, found) if name in ASKED and not self._inside else found

    def _counted(self, name: str, ask: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            if threading.get_ident() != self._thread:
                return ask(*arguments)
            self._left -= 1
            if self._left == 0:
                self.failed = f"{name} {arguments[0]}"
            if self.failed and self._left == 0 and not self._has_effect:
                raise self._error("on purpose")
            # A backend's requests of itself are part of the one that was asked.
            self._inside = True
            try:
                done = ask(*arguments)
            finally:
                self._inside = False
            if name == "replace" and done and b'"state":"committed"' in arguments[1]:
                self.decided = True
            if self._left == 0:
                raise self._error("on purpose")
            return done

        return counted


def build(folder: Path) -> None:
    (folder / "result.json").write_text("{}")


def is_decided(root: Path) -> bool:
    backend = LocalFolder(root)
    lease = backend.read(lease_name(LEASE))
    is_there = backend.read(f"{KEY.address}/manifest.json") is not None
    return is_there or (lease is not None and b'"state":"committed"' in lease.data)


@pytest.mark.parametrize("has_effect", [False, True], ids=["undone", "done"])
@pytest.mark.parametrize("error", [StoreUnavailableError, KeyboardInterrupt])
@pytest.mark.parametrize("how", ["build", "import"])
def test_what_was_decided_is_there_for_the_next(
    tmp_path: Path, how: str, error: type[BaseException], has_effect: bool
) -> None:
    origin = Store(LocalFolder(tmp_path / "origin"))
    origin.get_or_build(KEY, build)
    export_artifacts(origin, KEY.address, tmp_path / "made.tar")
    seen: list[tuple[str, bool]] = []
    for at in itertools.count(1):
        root = tmp_path / str(at)
        backend = FailingFolder(root, at, error, has_effect=has_effect)
        store = Store(backend, lease_ttl_s=TTL_S)
        try:
            _ = store.get_or_build(KEY, build) if how == "build" else import_artifacts(store, tmp_path / "made.tar")
        except error:
            pass
        except Exception as other:
            raise AssertionError(f"{backend.failed} ended in {other!r}") from other
        if not backend.failed:
            break
        decided = backend.decided
        assert decided == is_decided(root)
        seen.append((backend.failed, decided))
        _, cached = Store(LocalFolder(root), lease_ttl_s=TTL_S).get_or_build(KEY, build)
        assert cached or not decided, backend.failed
        # It was decided as soon as the lease says so, and everything after that is too.
        assert not decided or all(later for _, later in seen[seen.index((backend.failed, decided)) :])
    # Negative control: some failed before it was decided, some after.
    assert {decided for _, decided in seen} == {False, True}
    assert any(failed.startswith("create v1/stage") and decided for failed, decided in seen)


def test_decided_publication_is_finished_at_once_though_its_producer_lives(tmp_path: Path) -> None:
    backend = FailingFolder(tmp_path, 0, KeyboardInterrupt, has_effect=False)
    store = Store(backend, lease_ttl_s=3600)
    with pytest.raises(KeyboardInterrupt):
        store.get_or_build(KEY, lambda folder: _then_fail(folder, backend))
    assert is_decided(tmp_path)
    assert store.find(KEY) is None
    artifact, cached = Store(LocalFolder(tmp_path), lease_ttl_s=3600).get_or_build(KEY, lambda _: pytest.fail("again"))
    assert cached
    assert (artifact.path / "result.json").read_text() == "{}"


def _then_fail(folder: Path, backend: FailingFolder) -> None:
    build(folder)
    # intend, the question after a collection, send, commit, and then the manifest
    backend._left = 5
