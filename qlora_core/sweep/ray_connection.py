"""A connection to Ray: to a running cluster by its address, else to a local one that ends with the block; its nodes.

With `cluster`, the only home of `ray`. Knows nothing of workers.
"""

import logging
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from qlora_core.config.compute import ComputeConfig
from qlora_core.errors import SweepError

_OBJECT_STORE_BYTES = 100_000_000
"""Results are small JSON; Ray's own default takes a third of the host's memory."""

_CONNECT_TIMEOUT_S = 10.0
_DEFAULT_TOKEN_FILE = Path("~/.ray/auth_token")
"""Where Ray itself looks for a token."""

_GOING_S, _UNREACHED_S = 1.0, 5.0
"""How long a node may still take connections after its worker has died, or a call to the worker has failed."""

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_LOGGER = logging.getLogger(__name__)


@cache
def _token() -> str:
    # Ray reads its token once per process, so every cluster that this process starts shares one.
    return secrets.token_hex(32)


@contextmanager
def ray_connection(address: str | None, workers: int | None) -> Iterator[None]:
    """A connection to Ray for the block: to the cluster at `address`, else to a local one that ends with the block.

    A local cluster asks for a token that only this process and its children know, because Ray listens on every network
    interface. A process that is connected already keeps its connection, during and after.

    A cluster on another machine is joined with a token only, RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH: whoever reaches a
    cluster without one may run anything on it.

    Raises SweepError when no cluster answers at `address`, when it refuses the token or there is none for one beyond
    this machine, or when it runs another version of Ray or Python.
    """
    settings = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # else every worker under `uv run` resolves the environment anew
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # a CPU worker sees no GPU
    }
    if address is None:
        settings |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": _token()}
    else:
        _check_token(address)
        _check_answers(address)
        settings["RAY_AUTH_MODE"] = "token" if _has_token() else "disabled"
    with _environment(settings):
        import ray

        if ray.is_initialized():
            yield
            return
        try:
            _connect(address, workers)
            yield
        finally:
            ray.shutdown()


def _connect(address: str | None, workers: int | None) -> None:
    """Connect, and leave SIGTERM to whom it belonged: Ray's own handler ends in an abort, after whatever we do."""
    try:
        _start_or_join(address, workers)
    finally:
        handler = signal.getsignal(signal.SIGTERM)  # Python still knows its own; None: it was never Python's
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def _start_or_join(address: str | None, workers: int | None) -> None:
    import ray
    from ray.exceptions import RayError

    # Ray would write worker output to standard output, which belongs to the command's own result.
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    if address is None:
        _start_local(max(local_cores(), workers or 1), common)
        return
    try:
        with _loopback_kept(address):
            ray.init(address=address, **common)
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        ray.shutdown()
        raise _explained(address, error) from error


def _start_local(slots: int, common: Mapping[str, Any]) -> None:
    import ray

    _LOGGER.info("starting a local Ray with %d CPU slots", slots)
    settings = {"num_cpus": slots, "object_store_memory": _OBJECT_STORE_BYTES, **common}
    for last in (False, True):
        try:
            ray.init(address="local", include_dashboard=False, **settings)
        except Exception as error:
            # Ray raises the bare class when its node is not up within 30 s, as on a machine busy with other work.
            ray.shutdown()
            if last:
                raise SweepError(
                    f"Ray did not start on this machine: {error}; see /tmp/ray/session_latest/logs, free some CPU and "
                    "memory, or name a running cluster in compute.ray_address"
                ) from error
            _LOGGER.warning("Ray did not start (%s); trying once more", error)
        else:
            return


@contextmanager
def _loopback_kept(address: str) -> Iterator[None]:
    """Ray takes a loopback address for the machine's own, where a head that is bound to loopback does not listen."""
    from ray._private import ray_constants, services

    host, port = _host_and_port(address)
    if host not in _LOOPBACK or port is None or _refusal(services.get_node_ip_address(), port) is None:
        yield
        return
    kept, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False  # one machine, by its loopback
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = kept


def _check_answers(address: str) -> None:
    # Ray itself would try for minutes.
    host, port = _host_and_port(address)
    if port is not None and (error := _refusal(host, port)) is not None:
        raise _unreachable(address, error) from error


def _refusal(host: str, port: int, timeout_s: float = _CONNECT_TIMEOUT_S) -> OSError | OverflowError | None:
    """Why nothing takes a connection there; None: something does."""
    try:
        socket.create_connection((host, port), timeout=timeout_s).close()
    except (OSError, OverflowError) as error:
        return error
    return None


def _host_and_port(address: str) -> tuple[str, int | None]:
    host, _, port = address.removeprefix("ray://").rpartition(":")
    return host.strip("[]"), int(port) if port.isdigit() else None


def _has_token() -> bool:
    given = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    return bool(given) or _DEFAULT_TOKEN_FILE.expanduser().is_file()


def _check_token(address: str) -> None:
    host, _ = _host_and_port(address)
    if host and host not in _LOOPBACK and not _has_token():
        raise SweepError(
            f"compute.ray_address {address!r} is beyond this machine and there is no token: start its cluster with "
            "RAY_AUTH_MODE=token and give the token here as RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
        )


def _explained(address: str, error: Exception) -> SweepError:
    told = list(_chain(error))
    if (found := _first_with("Version mismatch", told)) is not None:
        found = " ".join(found.split())
        return SweepError(
            f"the Ray cluster at {address!r} runs other versions than this process: {found}; run the command in the "
            "image that the cluster's nodes run, or rebuild theirs from infra/docker"
        )
    refused = _first_with("AuthToken", told) or _first_with("uthenticat", told) or _first_with("token", told)
    if refused is not None:
        return SweepError(
            f"the Ray cluster at {address!r} refuses the token in RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH): "
            f"{_first_line(refused)}; use the token that its head was started with"
        )
    return _unreachable(address, error)


def _unreachable(address: str, error: Exception) -> SweepError:
    return SweepError(
        f"no Ray cluster answers at compute.ray_address {address!r}: {_first_line(str(error))}; check address, network "
        "and RAY_AUTH_TOKEN, or leave the key out to use this machine"
    )


def _chain(error: BaseException | None) -> Iterator[str]:
    """What was said, and what stood behind it: Ray hides a refused token under a failure to connect."""
    while error is not None:
        yield str(error)
        error = error.__cause__ or error.__context__


def _first_with(word: str, told: Iterable[str]) -> str | None:
    return next((text for text in told if word in text), None)


def _first_line(text: str) -> str:
    return next((line for line in text.strip().splitlines() if line.strip()), "no reason given")


@contextmanager
def _environment(settings: Mapping[str, str]) -> Iterator[None]:
    # What the user has set wins; what we set is gone after the block.
    ours = {name: value for name, value in settings.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


def local_cores() -> int:
    """The CPU slots of a local Ray, unless more workers are asked for: cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cluster_resources(compute: ComputeConfig) -> str:
    """What a sweep would have to work with, in words. Connects, or starts a local Ray and ends it again: seconds."""
    with ray_connection(compute.ray_address, compute.workers):
        import ray

        return resources_in_words(ray.cluster_resources())


def resources_in_words(resources: Mapping[str, float]) -> str:
    """GPUs and CPUs of what Ray calls resources."""
    return f"{resources.get('GPU', 0):g} GPUs and {resources.get('CPU', 0):g} CPUs"


def node_is_gone(node: str | None, error: Exception) -> bool:
    """Whether a worker died because its node did.

    The head calls a node dead once half a minute of its heartbeats are missing, so the node itself is asked: one that
    takes no connections is gone. It may be going just now, and so is asked again for a moment.
    """
    import ray
    from ray.exceptions import ActorUnavailableError

    if getattr(error, "preempted", False):
        return True
    deadline = time.monotonic() + (_UNREACHED_S if isinstance(error, ActorUnavailableError) else _GOING_S)
    while node is not None:
        entry = next((entry for entry in ray.nodes() if entry["NodeID"] == node), None)
        if entry is None or not entry["Alive"]:
            return True
        if _refusal(entry["NodeManagerAddress"], entry["NodeManagerPort"], timeout_s=_GOING_S) is not None:
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.2)
    return False
