"""The thread that answers: takes what was asked from a bounded queue into a running batch, one token a step.

Requests for different adapters share the batch. Who asks is told by callbacks in this thread. Knows nothing of HTTP or
texts.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

import torch
from transformers import PreTrainedModel

from qlora_core.errors import EngineStoppedError, QueueFullError
from qlora_core.model.adapter_set import AdapterSet
from qlora_core.model.running_batch import RunningBatch
from qlora_core.serving.answer import Answer, Event, Wanted

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Load:
    """How busy the engine is, and the most rows it has ever answered in one step."""

    answering: int
    waiting: int
    largest_batch: int


class Engine:
    """Answers with `model` in a thread of its own, from `start` to `stop`.

    `rows`: most answers in one batch; `waiting`: most that wait for a place in it.
    """

    def __init__(self, model: PreTrainedModel | AdapterSet, *, rows: int, waiting: int) -> None:
        self._batch = RunningBatch(model)
        self._model = model
        self._rows, self._waiting = rows, waiting
        self._queue: deque[Answer] = deque()
        self._running: list[Answer] = []
        self._tasks: deque[Callable[[EngineStoppedError | None], None]] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._largest = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def stop(self, timeout_s: float = 30.0) -> None:
        """End after the present step; answers under way are told so."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    @property
    def alive(self) -> bool:
        """Whether it answers."""
        return self._thread.is_alive() and not self._stopping

    @property
    def load(self) -> Load:
        """How much is being answered and how much waits."""
        return Load(len(self._running), len(self._queue), self._largest)

    def ask(self, wanted: Wanted, listen: Callable[[Event], None]) -> Answer:
        """Queue an answer; `listen` hears of it in the engine's thread, the last event being a `Finish`.

        Raises:
            QueueFullError: too many wait. EngineStoppedError: nobody would answer.
        """
        answer = Answer(wanted, listen)
        with self._changed:
            self._check_alive()
            self._queue = deque(each for each in self._queue if not each.cancelled)
            if len(self._queue) >= self._waiting:
                raise QueueFullError(f"{len(self._queue)} requests wait already, no more than {self._waiting} may")
            self._queue.append(answer)
            self._changed.notify_all()
        return answer

    def between_steps(self, task: Callable[[], T]) -> T:
        """Run `task` in the engine's thread while no step runs, for what changes the model; answers wait meanwhile.

        Raises:
            EngineStoppedError: nobody would run it. What `task` raises; the engine goes on.
        """
        done: Future[T] = Future()

        def run(stopped: EngineStoppedError | None) -> None:
            try:
                if stopped is not None:
                    raise stopped
                done.set_result(task())
            except Exception as error:  # noqa: BLE001 - whoever waits for it is told
                done.set_exception(error)

        with self._changed:
            self._check_alive()
            self._tasks.append(run)
            self._changed.notify_all()
        return done.result()

    def uses(self, adapter: str) -> bool:
        """Whether an answer under way or one that waits is of this adapter; to be asked between steps."""
        with self._changed:
            return any(answer.wanted.adapter == adapter for answer in (*self._running, *self._queue))

    def _check_alive(self) -> None:
        if not self.alive:
            raise EngineStoppedError("the server is stopping; ask again when it has been started")

    def _run(self) -> None:
        try:
            while self._wait():
                self._do_tasks()
                self._turn()
        finally:
            with self._changed:
                self._stopping = True
                left = [*self._running, *self._queue]
                self._queue.clear()
            for answer in left:
                answer.fail("the server was stopped before the answer was whole")
            self._do_tasks(EngineStoppedError("the server was stopped"))

    def _do_tasks(self, stopped: EngineStoppedError | None = None) -> None:
        while True:
            with self._changed:
                if not self._tasks:
                    return
                task = self._tasks.popleft()
            task(stopped)

    def _wait(self) -> bool:
        """Sleep until there is work; False once it is time to stop."""
        with self._changed:
            while not (self._stopping or self._queue or self._running or self._tasks):
                self._changed.wait()
            return not self._stopping

    def _turn(self) -> None:
        """One step for all rows in hand, after new ones were let in."""
        try:
            self._let_go()
            self._let_in()
            if self._running:
                self._hand_out(self._batch.step([answer.last_token for answer in self._running]), self._running)
                self._let_go()
        except (RuntimeError, ValueError) as error:  # torch's, out of memory included, and ours
            logger.exception("a step failed; %d answers are given up", len(self._running))
            self._give_up(f"the model failed on this batch ({type(error).__name__}); see the server's log")

    def _let_in(self) -> None:
        with self._changed:
            new: list[Answer] = []
            while self._queue and len(self._running) + len(new) < self._rows:
                answer = self._queue.popleft()
                if not answer.cancelled:
                    new.append(answer)
            self._running += new
        if new:
            wanted = [answer.wanted for answer in new]
            logits_bv = self._batch.join([each.prompt_ids for each in wanted], [each.adapter for each in wanted])
            self._hand_out(logits_bv, new)
            self._let_go()

    def _hand_out(self, logits_bv: torch.Tensor, answers: list[Answer]) -> None:
        self._largest = max(self._largest, len(self._running))
        finite = logits_bv.float().logsumexp(-1).isfinite().tolist()  # NaN and infinity anywhere show in the sum
        for logits_v, is_finite, answer in zip(logits_bv, finite, answers, strict=True):
            if is_finite:
                answer.take(logits_v)
            else:
                answer.fail(f"logits of {answer.wanted.adapter or 'the base'} are NaN or infinite; do not serve it")

    def _let_go(self) -> None:
        """Rows that have ended, or that nobody listens to, leave the batch."""
        going = [place for place, answer in enumerate(self._running) if not (answer.done or answer.cancelled)]
        if len(going) < len(self._running):
            self._batch.keep(going)
            self._running = [self._running[place] for place in going]

    def _give_up(self, fault: str) -> None:
        for answer in self._running:
            answer.fail(fault)
        self._running = []
        self._batch = RunningBatch(self._model)
