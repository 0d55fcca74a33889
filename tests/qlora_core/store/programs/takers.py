"""`python takers.py ROOT COUNT SECONDS`: processes that all try to take one lease until it is taken, and keep it.

Each that got it writes the token into ROOT/winners.
"""

import sys
import time
from pathlib import Path

from forks import at_once

from qlora_core.store.lease import Leases
from qlora_core.store.local import LocalFolder


def main(root: Path, count: int, seconds: float) -> None:
    """Let them go together."""
    end = time.monotonic() + seconds

    def take(number: int) -> None:
        leases = Leases(LocalFolder(root / "store"))
        while time.monotonic() < end:
            with leases.attempt("stage/sweep/x") as lease:
                if lease is None:
                    time.sleep(0.01)
                    continue
                with (root / "winners").open("a") as winners:
                    winners.write(f"{lease.token}\n")
                # Until all others have given up; what keeps it is the heartbeat.
                time.sleep(max(0.0, end + 0.3 - time.monotonic()))

    if any(at_once(count, take)):
        sys.exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
