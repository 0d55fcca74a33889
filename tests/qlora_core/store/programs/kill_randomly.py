"""`python kill_randomly.py ROOT ROUNDS SEED`: kill -9 producers at random moments, and look what can be read.

Prints a report as JSON; the same for a writer that does without staging, renames and a manifest that is written last:
where that one came to no harm, the kills would have proved nothing.
"""

import hashlib
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from forks import fork, kill, status_of
from samples import builder_of, fault_of, files_of, key_of, lease_state, left_over, opened

SIZE_BYTES = 100_000


class Killer:
    """Kills within the time that the work takes here and now: about half of the processes come to their end."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._longest_s = 0.05

    def finishes(self, work: Callable[[], None]) -> bool:
        """Whether a process said that it had done its work, before it was killed or after it had ended."""
        answer, said = os.pipe()

        def act() -> None:
            work()
            os.write(said, b"!")

        pid = fork(act)
        os.close(said)
        time.sleep(self._chance.uniform(0, self._longest_s))
        kill(pid)
        status_of(pid)
        with os.fdopen(answer, "rb") as stream:
            finished = stream.read() == b"!"
        self._longest_s *= 0.9 if finished else 1.1
        return finished


def kill_producers(root: Path, rounds: int, chance: random.Random) -> dict[str, object]:
    """Producers of a few keys, one after another; every third key is left as its killed producer left it."""
    published: set[int] = set()
    states: Counter[str] = Counter()
    faults: list[str] = []

    def produce(number: int) -> None:
        opened(root).get_or_build(key_of(number), builder_of(files_of(number, SIZE_BYTES)))

    killer = Killer(chance)
    for number in range(rounds):
        if killer.finishes(lambda number=number: produce(number)):
            published.add(number)
        states[lease_state(root, key_of(number))] += 1
        found = opened(root).get(key_of(number))
        if fault := fault_of(found, files_of(number, SIZE_BYTES)):
            faults.append(f"{number}: {fault}")
        if found is None and number in published:
            faults.append(f"{number}: its producer had said that it is there")
        if number % 3:
            produce(number)
            published.add(number)
    for number in sorted(published):
        found = opened(root).get(key_of(number))
        if found is None or fault_of(found, files_of(number, SIZE_BYTES)):
            faults.append(f"{number}: lost in the end")
    if left := left_over(root, "quarantine") + left_over(root, "tmp"):
        faults.append(f"left: {left}")
    return {"states": states, "published": len(published), "faults": faults}


def write_naively(folder: Path, version: int) -> None:
    """In place: the files, then what should be in them."""
    folder.mkdir(parents=True, exist_ok=True)
    digests = {}
    for path, content in files_of(version, SIZE_BYTES).items():
        digests[path] = hashlib.sha256(content).hexdigest()
        (folder / path).parent.mkdir(exist_ok=True)
        with (folder / path).open("wb", buffering=0) as stream:
            for start in range(0, len(content), 256):
                stream.write(content[start : start + 256])
    (folder / "manifest.json").write_text(json.dumps(digests))


def naive_state(folder: Path) -> str:
    """What a reader finds."""
    if not folder.exists():
        return "nothing"
    try:
        digests = json.loads((folder / "manifest.json").read_bytes())
        sound = all(hashlib.sha256((folder / path).read_bytes()).hexdigest() == digests[path] for path in digests)
    except FileNotFoundError:
        return "partial"
    except ValueError:
        return "corrupt"
    return "whole" if sound else "corrupt"


def kill_naive_writers(root: Path, rounds: int, chance: random.Random) -> dict[str, object]:
    """A few artifacts, written over and over in place."""
    killer = Killer(chance)
    states: Counter[str] = Counter()
    for number in range(rounds):
        folder = root / str(number % (rounds // 4))
        killer.finishes(lambda folder=folder, number=number: write_naively(folder, number))
        states[naive_state(folder)] += 1
    return {"states": states}


def main(root: Path, rounds: int, seed: int) -> None:
    """The store first, the control after it."""
    chance = random.Random(seed)
    report = {
        "store": kill_producers(root / "real", rounds, chance),
        "control": kill_naive_writers(root / "naive", rounds, chance),
    }
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
