"""The workers of a sweep as Ray actors: start, hand out work, notice death, replace, stop. The only home of `ray`.

One long-lived actor per GPU (`num_gpus=1`), or one per CPU slot where there is no GPU. Ray neither restarts actors
nor retries calls here: it cannot know whether a lost call had finished, the checkpoints do. Knows nothing of what
workers do: any class with `load()`, `stop()` and methods that take and return JSON data will serve.
"""

import logging
import os
import secrets
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import TracebackType
from typing import Any

from qlora_core.config.compute import ComputeConfig
from qlora_core.errors import LeaseLostError, QloraError, SweepError

_OBJECT_STORE_BYTES = 100_000_000
"""Results are small JSON; Ray's own default takes a third of the host's memory."""

MOST_CPU_WORKERS = 4
CPU_ALLOCATOR = {"MALLOC_TRIM_THRESHOLD_": "131072"}
"""Keeps glibc from raising the size from which tensors get pages of their own; else those it frees stay in holes."""

_STARTS_WITHOUT_SUCCESS = 3
_STOP_GRACE_S = 60.0
_CONNECT_TIMEOUT_S = 10.0
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

    Raises SweepError when no cluster answers at `address`.
    """
    settings = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # else every worker under `uv run` resolves the environment anew
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # a CPU worker sees no GPU
    }
    if address is None:
        settings |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": _token()}
    else:
        _check_answers(address)
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
    import ray
    from ray.exceptions import RayError

    # Ray would write worker output to standard output, which belongs to the command's own result.
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    if address is None:
        _start_local(max(_cores(), workers or 1), common)
        return
    try:
        ray.init(address=address, **common)
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        raise _unreachable(address, error) from error


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


def _check_answers(address: str) -> None:
    # Ray itself would try for minutes.
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise _unreachable(address, error) from error


def _unreachable(address: str, error: Exception) -> SweepError:
    return SweepError(
        f"no Ray cluster answers at compute.ray_address {address!r}: {error}; check address, network and "
        "RAY_AUTH_TOKEN, or leave the key out to use this machine"
    )


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


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cluster_resources(compute: ComputeConfig) -> str:
    """What a sweep would have to work with, in words. Connects, or starts a local Ray and ends it again: seconds."""
    with ray_connection(compute.ray_address, compute.workers):
        import ray

        return _resources(ray.cluster_resources())


@dataclass(frozen=True)
class Outcome:
    """How a call ended: with `result`, or with `error`. `died`: the worker is gone, and how far it came is unknown."""

    worker: str
    task: Any
    result: dict[str, Any] | None = None
    error: str | None = None
    died: bool = False


@dataclass
class _Slot:
    actor: Any
    phase: str  # starting | loading | idle | busy
    pending: Any = None
    task: Any = None


class Cluster:
    """At most `most` workers of one class, inside a `ray_connection`. A context manager: leaving it stops them."""

    def __init__(self, worker_class: type, arguments: Mapping[str, Any], compute: ComputeConfig, *, most: int) -> None:
        self._worker_class = worker_class
        self._arguments = dict(arguments)
        self._start_timeout_s = compute.worker_start_timeout_s
        self._wanted = compute.workers
        self._most = most
        self._slots: dict[str, _Slot] = {}
        self._started = 0
        self._failed_starts = 0
        self._options: dict[str, Any] = {}
        self._up_since_none = time.monotonic()

    def __enter__(self) -> "Cluster":
        import ray

        resources = ray.cluster_resources()
        gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
        count = min(self._most, self._wanted or gpus or max(1, min(cpus, MOST_CPU_WORKERS)))
        self._options = _actor_options(gpu=gpus > 0)
        if count > (gpus or cpus):
            _LOGGER.warning("%d workers wanted, room for %d: the others wait for nodes to join", count, gpus or cpus)
        _LOGGER.info("starting %d %s workers", count, "GPU" if gpus else "CPU")
        for _ in range(count):
            self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def idle(self) -> list[str]:
        """Workers that wait for work, in the order started."""
        return [name for name, slot in self._slots.items() if slot.phase == "idle"]

    def submit(self, worker: str, task: Any, method: str, *arguments: Any) -> None:
        """Call a method of an idle worker; its end comes out of `wait` as an Outcome with `task`."""
        slot = self._slots[worker]
        slot.phase, slot.task = "busy", task
        slot.pending = getattr(slot.actor, method).remote(*arguments)

    def wait(self, timeout_s: float) -> list[Outcome]:
        """What ended within `timeout_s`; empty when nothing did. Dead workers are replaced on the way.

        Raises SweepError when no worker comes up within the start time-out, when a worker cannot load, or when workers
        keep dying before they are ready, and LeaseLostError when a worker finds its work in somebody else's hands.
        """
        import ray

        pending = {slot.pending: name for name, slot in self._slots.items() if slot.pending is not None}
        if pending:
            done, _ = ray.wait(list(pending), num_returns=1, timeout=timeout_s)
            # Whatever else has ended by now comes along.
            done, _ = ray.wait(list(pending), num_returns=len(pending), timeout=0) if done else (done, [])
        else:
            done = []
        outcomes = [outcome for ref in done if (outcome := self._settle(pending[ref])) is not None]
        self._check_start()
        return outcomes

    def replace(self, worker: str) -> None:
        """End a worker, whatever it does, and start a new one in its place."""
        import ray

        ray.kill(self._slots.pop(worker).actor, no_restart=True)
        self._start()

    def stop(self) -> None:
        """Let busy workers write their checkpoints (a minute at most), then end all."""
        import ray

        slots, self._slots = list(self._slots.values()), {}
        busy = [slot for slot in slots if slot.phase == "busy"]
        try:
            for slot in busy:
                slot.actor.stop.remote()
            if busy:
                _LOGGER.info("stopping %d workers; their checkpoints are kept", len(busy))
                ray.wait([slot.pending for slot in busy], num_returns=len(busy), timeout=_STOP_GRACE_S)
        finally:
            for slot in slots:
                ray.kill(slot.actor, no_restart=True)

    def _start(self) -> None:
        import ray

        name = f"worker-{self._started}"
        self._started += 1
        actor = ray.remote(self._worker_class).options(**self._options).remote(**self._arguments)
        self._slots[name] = _Slot(actor, "starting", actor.__ray_ready__.remote())

    def _settle(self, name: str) -> Outcome | None:
        import ray
        from ray.exceptions import RayError, RayTaskError

        slot = self._slots[name]
        phase, slot.phase = slot.phase, "idle"
        ref, slot.pending = slot.pending, None
        try:
            result: Any = ray.get(ref)
        except RayTaskError as error:
            return self._refused(name, phase, error.cause)
        except RayError as error:
            return self._died(name, phase, error)
        if phase == "starting":
            slot.phase, slot.pending = "loading", slot.actor.load.remote()
        elif phase == "loading":
            self._failed_starts = 0
            _LOGGER.info("%s is ready (%s)", name, ", ".join(f"{key} {value}" for key, value in result.items()))
        else:
            return Outcome(name, slot.task, result)
        return None

    def _refused(self, name: str, phase: str, cause: Exception) -> Outcome:
        text = f"{type(cause).__name__}: {cause}"
        if phase != "busy":
            raise SweepError(f"a worker cannot start: {text}") from cause
        if isinstance(cause, LeaseLostError):
            # No fault of this task: whoever took it over has taken over all of them.
            raise cause
        task = self._slots[name].task
        if not isinstance(cause, QloraError):
            # An error nobody foresaw may leave a GPU context or memory behind that would fail the next trial too.
            self.replace(name)
        return Outcome(name, task, error=text)

    def _died(self, name: str, phase: str, error: Exception) -> Outcome | None:
        text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        _LOGGER.warning("%s died while %s: %s", name, phase, text)
        task = self._slots[name].task
        if phase != "busy":
            self._failed_starts += 1
            if self._failed_starts >= _STARTS_WITHOUT_SUCCESS:
                raise SweepError(
                    f"{self._failed_starts} workers in a row died before they were ready: {text}; "
                    "check memory and the logs in Ray's session folder (/tmp/ray/session_latest/logs)"
                ) from error
        self.replace(name)
        return Outcome(name, task, error=text, died=True) if phase == "busy" else None

    def _check_start(self) -> None:
        if any(slot.phase != "starting" for slot in self._slots.values()):
            self._up_since_none = time.monotonic()
        elif time.monotonic() - self._up_since_none > self._start_timeout_s:
            import ray

            raise SweepError(
                f"no worker came up within {self._start_timeout_s:g} s; each needs "
                f"{_needs(self._options)}, and the cluster has {_resources(ray.cluster_resources())}; "
                "free or add resources, or raise compute.worker_start_timeout_s"
            )


def _actor_options(*, gpu: bool) -> dict[str, Any]:
    # Workers read local folders only, so they need no hub; two threads, so that `stop` is heard during `run`.
    variables = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if not gpu:
        variables |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", **CPU_ALLOCATOR}
    return {
        "num_cpus": 1,
        "num_gpus": 1 if gpu else 0,
        "max_restarts": 0,
        "max_task_retries": 0,
        "max_concurrency": 2,
        "runtime_env": {"env_vars": variables},
    }


def _needs(options: Mapping[str, Any]) -> str:
    return "1 GPU and 1 CPU" if options["num_gpus"] else "1 CPU"


def _resources(resources: Mapping[str, float]) -> str:
    return f"{resources.get('GPU', 0):g} GPUs and {resources.get('CPU', 0):g} CPUs"
