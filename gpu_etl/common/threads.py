"""Make items ahead in threads, do several things at once, and put items away behind."""

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait


def nothing() -> None:
    """What threads begin with where nothing has to be set up."""


def prefetch(items: Iterator, depth: int = 2, initializer: Callable[[], None] = nothing) -> Iterator:
    """The same items, made ahead in a thread: at most `depth` wait in memory. Errors arrive where the item would have.

    Closing the returned generator early stops the thread. initializer: what the thread begins with.
    """
    return side_by_side([items], 1, depth, initializer)


def side_by_side(
    sources: list[Iterator], at_once: int, depth: int = 2, initializer: Callable[[], None] = nothing
) -> Iterator:
    """The items of all sources, of which up to `at_once` are run through at a time, a thread each, in the order given.

    Items of one source keep their order, those of several mix. The first error ends it all. initializer: what each
    thread begins with.
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
            initializer()
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


def in_turn(
    sources: list[Iterator], at_once: int, depth: int = 2, initializer: Callable[[], None] = nothing
) -> Iterator[tuple[int, object]]:
    """(place, item) of all items of the first source, the second, and so on; (place, None) at the end of each.

    The source whose turn it is and the at_once - 1 behind it are run through by a thread each, `depth` items ahead;
    with at_once 1 there is no thread. Errors arrive where the item would have. Closing the returned generator ends the
    threads.
    """
    ahead: deque[Iterator] = deque()
    left = iter(sources)
    try:
        for place in range(len(sources)):
            while len(ahead) < at_once and (source := next(left, None)) is not None:
                ahead.append(source if at_once == 1 else _started(source, depth, initializer))
            for item in ahead[0]:
                yield place, item
            yield place, None
            ahead.popleft().close()
    finally:
        for source in ahead:
            source.close()


def _started(items: Iterator, depth: int, initializer: Callable[[], None]) -> Iterator:
    """prefetch() whose thread runs at once, rather than when the first item is asked for."""
    made = prefetch(_with_head(items), depth, initializer)
    next(made)
    return made


def _with_head(items: Iterator) -> Iterator:
    yield None
    yield from items


def in_order(calls: Iterable[Callable], threads: int, initializer: Callable[[], None] = nothing) -> Iterator:
    """Results of calls, made by several threads at a time, in the order of the calls.

    At most `threads` results wait or are under way; with one thread each call is made here, when it is asked for. An
    error arrives where the result would have. Closing the returned generator ends the threads.
    """
    if threads == 1:
        for call in calls:
            yield call()
        return
    with ThreadPoolExecutor(threads, "in order", initializer) as pool:
        under_way: deque[Future] = deque()
        try:
            for call in calls:
                under_way.append(pool.submit(call))
                if len(under_way) == threads:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            for future in under_way:
                future.cancel()


class Crew:
    """A few threads that do the parts of one job side by side; for use in `with`, or with close()."""

    def __init__(self, threads: int):
        self.threads = threads
        self._pool = ThreadPoolExecutor(threads, "crew") if threads > 1 else None

    def run(self, parts: list[Callable[[], None]]) -> None:
        """Make all these calls; the threads have nothing more to do with them on return. Raises the first error."""
        if self._pool is None or len(parts) == 1:
            for part in parts:
                part()
            return
        futures = [self._pool.submit(part) for part in parts]
        wait(futures)
        failed = [error for future in futures if (error := future.exception())]
        if failed:
            for other in failed[1:]:
                failed[0].add_note(f"meanwhile: {type(other).__name__}: {other}")
            raise failed[0]

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, *_) -> None:
        self.close()


ALONE = Crew(1)


class BackgroundWorker:
    """Runs jobs in a thread, in order, at most one behind its user; for use in `with`, which ends with the last job.

    An error of a job is raised by the next submit(), or at the end; where the body of the `with` ends with an error of
    its own, it is told in a note of that one. initializer: what the thread begins with.
    """

    def __init__(self, initializer: Callable[[], None] = nothing):
        self._pool = ThreadPoolExecutor(1, "behind", initializer)
        self._running: Future | None = None

    def submit(self, job: Callable, *arguments) -> None:
        """Run a job, once the one before it is done."""
        self._wait()
        self._running = self._pool.submit(job, *arguments)

    def _wait(self) -> None:
        if self._running is not None:
            self._running.result()

    def __enter__(self) -> "BackgroundWorker":
        return self

    def __exit__(self, kind, error, _) -> None:
        self._pool.shutdown()
        failed = self._running and self._running.exception()
        if failed is None or failed is error:
            return
        if error is None:
            raise failed
        error.add_note(f"meanwhile, in the background: {type(failed).__name__}: {failed}")
