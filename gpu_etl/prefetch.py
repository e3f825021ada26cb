"""Make items ahead in threads, and put them away behind (leaf)."""

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor


def prefetch(items: Iterator, depth: int = 2) -> Iterator:
    """The same items, made ahead in a thread: at most `depth` wait in memory. Errors arrive where the item would have.

    Closing the returned generator early stops the thread.
    """
    return side_by_side([items], 1, depth)


def side_by_side(sources: list[Iterator], at_once: int, depth: int = 2) -> Iterator:
    """The items of all sources, of which up to `at_once` are run through at a time, a thread each, in the order given.

    Items of one source keep their order, those of several mix. The first error ends it all.
    """
    ready: queue.Queue = queue.Queue(depth)
    stopped = threading.Event()
    waiting = iter(sources)
    lock = threading.Lock()
    end = object()

    def offer(item) -> bool:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def produce() -> None:
        try:
            while True:
                with lock:
                    source = next(waiting, end)
                if source is end:
                    break
                for item in source:
                    if not offer((item, None)):
                        return
            offer((end, None))
        except BaseException as error:  # handed to the consumer, which raises it
            offer((end, error))

    threads = [
        threading.Thread(target=produce, name="prefetch", daemon=True) for _ in range(min(at_once, len(sources)))
    ]
    for thread in threads:
        thread.start()
    try:
        running = len(threads)
        while running:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is end:
                running -= 1
            else:
                yield item
    finally:
        stopped.set()
        for thread in threads:
            thread.join()


class OneBehind:
    """Runs jobs in a thread, in order, at most one behind its user; for use in `with`, which ends with the last job.

    An error of a job is raised by the next submit(), or at the end; there in place of one that ended the `with` before,
    which it names as its context: what was taken for written is not.
    """

    def __init__(self):
        self._pool = ThreadPoolExecutor(1)
        self._running: Future | None = None

    def submit(self, job: Callable, *arguments) -> None:
        """Run a job, once the one before it is done."""
        self._wait()
        self._running = self._pool.submit(job, *arguments)

    def _wait(self) -> None:
        if self._running is not None:
            self._running.result()

    def __enter__(self) -> "OneBehind":
        return self

    def __exit__(self, kind, error, _) -> None:
        self._pool.shutdown()
        last = self._running.exception() if self._running is not None else None
        if last is not None and last is not error and (kind is None or issubclass(kind, Exception)):
            raise last
