"""Many pieces of work on a few threads, drawn one after the other from an endless supply. Knows nothing of the work."""

from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from qlora_core.store.s3.patience import Patience


def run_all(tasks: Iterable[Callable[[], object]], *, at_once: int, patience: Patience) -> None:
    """Run every task, `at_once` at a time; no more than twice as many are drawn before they are needed.

    The first error ends those under way, by giving up `patience`, and is raised.
    """
    threads = ThreadPoolExecutor(max_workers=at_once, thread_name_prefix="s3")
    pending: set[Future[object]] = set()
    try:
        for task in tasks:
            pending.add(threads.submit(task))
            if len(pending) >= 2 * at_once:
                pending = _settled(pending, FIRST_COMPLETED)
        while pending:
            pending = _settled(pending, FIRST_COMPLETED)
    except BaseException:
        patience.give_up()
        raise
    finally:
        threads.shutdown(wait=True, cancel_futures=True)


def _settled(pending: set[Future[object]], until: str) -> set[Future[object]]:
    done, left = wait(pending, return_when=until)
    for future in done:
        future.result()
    return left
