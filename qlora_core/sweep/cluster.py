"""The workers of a sweep as Ray actors: start, hand out work, notice death, replace, stop.

One long-lived actor per GPU (`num_gpus=1`), or one per CPU slot where there is no GPU. Ray neither restarts actors
nor retries calls here: it cannot know whether a lost call had finished, the checkpoints do. Workers are started while
nodes join and there is work for them, drained when their node is told to drain, and ended when they have been idle, so
that an autoscaler can take their nodes away. With `ray_connection`, the only home of `ray`. Knows nothing of what
workers do: any class with `load()`, `stop()`, `come_back()` and methods that take and return JSON data will serve.
"""

import logging
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from qlora_core.config.compute import ComputeConfig
from qlora_core.errors import LeaseLostError, QloraError, SweepError
from qlora_core.sweep.fair_share import fair_shares
from qlora_core.sweep.pool import Outcome
from qlora_core.sweep.ray_connection import node_is_gone, resources_in_words

MOST_CPU_WORKERS = 4
CPU_ALLOCATOR = {"MALLOC_TRIM_THRESHOLD_": "131072"}
"""Keeps glibc from raising the size from which tensors get pages of their own; else those it frees stay in holes."""

_STARTS_WITHOUT_SUCCESS = 3
_STOP_GRACE_S = 60.0
_WATCH_EVERY_S = 2.0
"""How often nodes are asked for: what a look at them costs is a few milliseconds on the head."""

_WAITS = ("DEPENDENCIES_UNREADY", "PENDING_CREATION")
"""What Ray calls an actor that has no place yet."""

_LOGGER = logging.getLogger(__name__)


@dataclass
class _Slot:
    actor: Any
    phase: str  # starting | loading | idle | busy
    pending: Any = None
    task: Any = None
    node: str | None = None
    draining: bool = False
    idle_since: float = field(default_factory=time.monotonic)
    started: float = field(default_factory=time.monotonic)


class Cluster:
    """At most `most` workers of one class, inside a `ray_connection`. A context manager: leaving it stops them."""

    def __init__(self, worker_class: type, arguments: Mapping[str, Any], compute: ComputeConfig, *, most: int) -> None:
        self._worker_class = worker_class
        self._arguments = dict(arguments)
        self._compute = compute
        self._most = most
        self._expected = most
        self._slots: dict[str, _Slot] = {}
        self._started = 0
        self._failed_starts = 0
        self._options: dict[str, Any] = {}
        self._up_since_none = time.monotonic()
        self._next_look = 0.0
        self._ended_s = 0.0
        self._fleet = secrets.token_hex(4)
        self._told_of_others = False

    def __enter__(self) -> "Cluster":
        import ray

        resources = ray.cluster_resources()
        gpus = int(resources.get("GPU", 0))
        wants = self._compute.gpus
        if wants == "required" and not gpus and self._compute.ray_address is None:
            raise SweepError(
                f"compute.gpus is required, and this machine has {resources_in_words(resources)}; check the driver "
                "with `qlora doctor`, name a cluster in compute.ray_address, or set compute.gpus: auto"
            )
        self._options = _actor_options(gpu=wants == "required" or (wants == "auto" and gpus > 0))
        count, room = self._limit(resources), self._room(resources)
        if count > room:
            _LOGGER.warning("%d workers wanted, room for %d: the others wait for nodes to join", count, room)
        _LOGGER.info("starting %d %s workers", count, "GPU" if self._options["num_gpus"] else "CPU")
        for _ in range(count):
            self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def worker_seconds(self) -> float:
        """How long workers have been held so far, idle or not, all together."""
        now = time.monotonic()
        return self._ended_s + sum(now - slot.started for slot in self._slots.values() if slot.phase != "starting")

    def idle(self) -> list[str]:
        """Workers that wait for work, in the order started."""
        return [name for name, slot in self._slots.items() if slot.phase == "idle" and not slot.draining]

    def submit(self, worker: str, task: Any, method: str, *arguments: Any) -> None:
        """Call a method of an idle worker; its end comes out of `wait` as an Outcome with `task`."""
        slot = self._slots[worker]
        slot.phase, slot.task = "busy", task
        slot.pending = getattr(slot.actor, method).remote(*arguments)

    def recall(self, worker: str) -> None:
        """Ask a busy worker to end its call soon, with its trials kept where they are."""
        self._slots[worker].actor.come_back.remote()

    def expect(self, workers: int) -> None:
        """Say for how many workers there is work; those beyond end once they have been idle for a while."""
        self._expected = max(1, workers)

    def drain(self, worker: str) -> None:
        """Let a worker write its checkpoints and end; what it was doing comes out of `wait` as interrupted."""
        slot = self._slots[worker]
        if slot.draining:
            return
        slot.draining = True
        if slot.phase == "busy":
            slot.actor.stop.remote()
            return
        if slot.phase == "idle":
            _wait_for([slot.actor.let_go.remote()])
        self._end(worker)

    def wait(self, timeout_s: float) -> list[Outcome]:
        """What ended within `timeout_s`; empty when nothing did. Dead workers are replaced on the way.

        Raises SweepError when no worker comes up within the start time-out, when a worker cannot load, or when workers
        keep dying before they are ready, and LeaseLostError when a worker finds its work in somebody else's hands.
        """
        import ray

        self._look_at_nodes()
        pending = {slot.pending: name for name, slot in self._slots.items() if slot.pending is not None}
        if pending:
            done, _ = ray.wait(list(pending), num_returns=1, timeout=timeout_s)
            # Whatever else has ended by now comes along.
            done, _ = ray.wait(list(pending), num_returns=len(pending), timeout=0) if done else (done, [])
        else:
            done = []
            time.sleep(0 if self.idle() else min(timeout_s, 0.1))
        outcomes = [outcome for ref in done if (outcome := self._settle(pending[ref])) is not None]
        self._check_start()
        return outcomes

    def replace(self, worker: str) -> None:
        """End a worker, whatever it does, and start a new one in its place."""
        self._end(worker)
        self._start()

    def stop(self) -> None:
        """Let workers write the checkpoints of what they train or hold (a minute at most), then end all."""
        busy = [slot for slot in self._slots.values() if slot.phase == "busy"]
        idle = [slot for slot in self._slots.values() if slot.phase == "idle"]
        try:
            for slot in busy:
                slot.actor.stop.remote()
            if busy:
                _LOGGER.info("stopping %d workers; their checkpoints are kept", len(busy))
            _wait_for([slot.pending for slot in busy] + [slot.actor.let_go.remote() for slot in idle])
        finally:
            for name in list(self._slots):
                self._end(name)

    def _limit(self, resources: Mapping[str, float]) -> int:
        return min(self._most, self._compute.workers or max(1, self._room(resources)))

    def _room(self, resources: Mapping[str, float]) -> int:
        if self._options["num_gpus"]:
            return int(resources.get("GPU", 0))
        cpus = int(resources.get("CPU", 0))
        return cpus if self._compute.workers else min(cpus, MOST_CPU_WORKERS)

    def _look_at_nodes(self) -> None:
        """Start workers that there is work and room for, drain those of leaving nodes, end those idle for long."""
        now = time.monotonic()
        if now < self._next_look:
            return
        import ray

        self._next_look = now + _WATCH_EVERY_S
        leaving = _draining_nodes()
        for name in [name for name, slot in self._slots.items() if slot.node in leaving]:
            _LOGGER.info("the node of %s is to be drained; its trials go on elsewhere", name)
            self.drain(name)
        spare = len(self._slots) - self._expected
        for name in reversed(self.idle()):
            if spare > 0 and now - self._slots[name].idle_since > self._compute.idle_worker_s:
                _LOGGER.info("%s has been idle for %g s and ends", name, self._compute.idle_worker_s)
                self._end(name)
                spare -= 1
        resources = ray.cluster_resources()
        wanted = min(self._limit(resources), self._expected)
        share = self._share(resources, wanted)
        self._leave_to_others(share)
        for _ in range(share - len(self._slots)):
            self._start()

    def _share(self, resources: Mapping[str, float], wanted: int) -> int:
        """How many of `wanted` workers this sweep may have beside the others on the cluster."""
        import ray

        others = self._other_sweeps()
        if not others:
            return wanted
        own = ray.get_runtime_context().get_job_id()
        slots = int(resources.get("GPU" if self._options["num_gpus"] else "CPU", 0))
        share = fair_shares(slots, {**others, own: wanted})[own]
        if share < wanted and not self._told_of_others:
            self._told_of_others = True
            _LOGGER.info("%d other sweeps share %d slots; this one has %d of them", len(others), slots, share)
        return share

    def _leave_to_others(self, share: int) -> None:
        """Let go of workers beyond the share, if others wait for them: those that do least first, then the youngest."""
        cheap = {"starting": 0, "loading": 1, "idle": 2, "busy": 3}
        staying = [name for name, slot in reversed(self._slots.items()) if not slot.draining]
        surplus = len(staying) - max(share, 0)
        if surplus <= 0 or not self._other_sweeps(waiting=True):
            return
        for name in sorted(staying, key=lambda name: cheap[self._slots[name].phase])[:surplus]:
            _LOGGER.info("%s leaves its slot to another sweep; its trials go on here", name)
            self.drain(name)

    def _other_sweeps(self, *, waiting: bool = False) -> dict[str, int]:
        """By job, how many workers other sweeps have or wait for; with `waiting`, only how many they wait for."""
        import ray
        from ray._private.state import state

        own = ray.get_runtime_context().get_job_id()
        found: dict[str, int] = {}
        for phase in _WAITS if waiting else (*_WAITS, "ALIVE"):
            for actor in state.actor_table(None, None, phase).values():
                job = actor["JobID"]
                if job != own and actor["Name"].startswith(self._kind):
                    found[job] = found.get(job, 0) + 1
        return found

    @property
    def _kind(self) -> str:
        return f"qlora-{'gpu' if self._options['num_gpus'] else 'cpu'}-"

    def _start(self) -> None:
        import ray

        name = f"worker-{self._started}"
        self._started += 1
        # By this name other sweeps on the cluster know it for what it is.
        options = {**self._options, "name": f"{self._kind}{self._fleet}-{name}"}
        actor = ray.remote(self._worker_class).options(**options).remote(**self._arguments)
        self._slots[name] = _Slot(actor, "starting", actor.__ray_call__.remote(_own_node))

    def _end(self, worker: str) -> None:
        import ray

        slot = self._slots.pop(worker)
        if slot.phase != "starting":
            self._ended_s += time.monotonic() - slot.started
        ray.kill(slot.actor, no_restart=True)

    def _settle(self, name: str) -> Outcome | None:
        import ray
        from ray.exceptions import RayError, RayTaskError

        slot = self._slots[name]
        phase, slot.phase, slot.idle_since = slot.phase, "idle", time.monotonic()
        ref, slot.pending = slot.pending, None
        try:
            result: Any = ray.get(ref)
        except RayTaskError as error:
            return self._refused(name, phase, error.cause)
        except RayError as error:
            return self._died(name, phase, error)
        if phase == "starting":
            slot.phase, slot.node, slot.started = "loading", result, time.monotonic()
            slot.pending = slot.actor.load.remote()
        elif phase == "loading":
            self._failed_starts = 0
            _LOGGER.info("%s is ready (%s)", name, ", ".join(f"{key} {value}" for key, value in result.items()))
        else:
            if slot.draining:
                self._end(name)
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
        if self._slots[name].draining:
            self._end(name)
        elif not isinstance(cause, QloraError):
            # An error nobody foresaw may leave a GPU context or memory behind that would fail the next trial too.
            self.replace(name)
        return Outcome(name, task, error=text)

    def _died(self, name: str, phase: str, error: Exception) -> Outcome | None:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        text = lines[0] if lines else type(error).__name__
        slot = self._slots[name]
        preempted = slot.draining or node_is_gone(slot.node, error)
        _LOGGER.warning("%s %s while %s: %s", name, "lost its node" if preempted else "died", phase, text)
        if phase != "busy" and not preempted:
            self._failed_starts += 1
            if self._failed_starts >= _STARTS_WITHOUT_SUCCESS:
                raise SweepError(
                    f"{self._failed_starts} workers in a row died before they were ready: {text}; "
                    "check memory and the logs in Ray's session folder (/tmp/ray/session_latest/logs)"
                ) from error
        self.replace(name)
        return Outcome(name, slot.task, error=text, died=True, preempted=preempted) if phase == "busy" else None

    def _check_start(self) -> None:
        if any(slot.phase != "starting" for slot in self._slots.values()):
            self._up_since_none = time.monotonic()
        elif time.monotonic() - self._up_since_none > self._compute.worker_start_timeout_s:
            import ray

            if others := self._other_sweeps():
                _LOGGER.info("%d other sweeps hold the cluster; waiting for a slot", len(others))
                self._up_since_none = time.monotonic()
                return
            raise SweepError(
                f"no worker came up within {self._compute.worker_start_timeout_s:g} s; each needs "
                f"{_needs(self._options)}, and the cluster has {resources_in_words(ray.cluster_resources())}; "
                "free or add resources, or raise compute.worker_start_timeout_s"
            )


def _wait_for(calls: list[Any]) -> None:
    import ray

    if calls:
        ray.wait(calls, num_returns=len(calls), timeout=_STOP_GRACE_S)


def _own_node(worker: Any) -> str:
    """Runs in a worker: on which node it is."""
    import ray

    return ray.get_runtime_context().get_node_id()


def _draining_nodes() -> set[str]:
    from ray._private.state import state

    return set(state.get_draining_nodes())


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
