"""Make items ahead in a thread (leaf)."""

import queue
import threading
from collections.abc import Iterator


def prefetch(items: Iterator, depth: int = 2) -> Iterator:
    """The same items, made ahead in a thread: at most `depth` wait in memory. Errors arrive where the item would have.

    Closing the returned generator early stops the thread.
    """
    ready: queue.Queue = queue.Queue(depth)
    stopped = threading.Event()
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
            for item in items:
                if not offer((item, None)):
                    return
            offer((end, None))
        except BaseException as error:  # handed to the consumer, which raises it
            offer((end, error))

    thread = threading.Thread(target=produce, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is end:
                return
            yield item
    finally:
        stopped.set()
        thread.join()
