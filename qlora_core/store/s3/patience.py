"""How long an operation goes on asking a server: pauses between tries, and an end where no byte moves any more."""

import random
import threading
import time

_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 10.0


class Patience:
    """The patience of one operation, shared by all its threads.

    It runs out `deadline_s` seconds after the last byte that got anywhere, and after `attempts` tries of one request.
    """

    def __init__(self, deadline_s: float, attempts: int) -> None:
        self._deadline_s = deadline_s
        self._attempts = attempts
        self._moved_at = time.monotonic()
        self._given_up = threading.Event()

    def moved(self) -> None:
        """Bytes got further than any before them: the deadline starts anew."""
        self._moved_at = time.monotonic()

    def give_up(self) -> None:
        """End the operation in all its threads."""
        self._given_up.set()

    @property
    def is_out(self) -> bool:
        """Whether the operation is to end."""
        return self._given_up.is_set() or time.monotonic() - self._moved_at >= self._deadline_s

    def pause(self, attempt: int) -> bool:
        """Wait before the try after `attempt` failed ones; False if there should be none."""
        if attempt >= self._attempts or self.is_out:
            return False
        # Jitter, so that the many who failed together do not come back together.
        pause_s = random.uniform(0.5, 1.0) * min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** (attempt - 1))
        self._given_up.wait(min(pause_s, self._deadline_s - (time.monotonic() - self._moved_at)))
        return not self.is_out
