"""Runs tasks on a Dask cluster, and says so where nothing is heard of it: a wait has an end, and the end has words."""

import asyncio
import concurrent.futures
import pickle
import sys
import time
import uuid
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from dask.distributed import Client, Future
from distributed.scheduler import KilledWorker
from tqdm import tqdm

from gpu_etl.common.errors import KeepWorkError

ASK_SECONDS = 10.0  # for an answer of the scheduler
LOOK_SECONDS = 2.0
QUIET_SECONDS = 10.0  # without a beat, after which a worker is spoken of; they beat twice a second, large clusters less
REPEAT_SECONDS = 30.0
WAIT_SECONDS = 0.5
NAMED = 4  # workers in one line
NOBODY = "workers are there, but none has a task of this run, or gives its results"
CANCELLED = (asyncio.CancelledError, concurrent.futures.CancelledError)  # what Dask ends a lost task with
Call = tuple[Callable, tuple]


def ask(client: Client, question: Callable[[], Coroutine], seconds: float = ASK_SECONDS) -> Any:
    """What a coroutine of Dask's returns. Raises OSError (TimeoutError is one) where no answer comes in time."""

    async def limited():
        return await asyncio.wait_for(question(), seconds)

    return client.sync(limited, callback_timeout=seconds + 1)


class _Called:
    """A call whose unpickling is the call: the scheduler, which looks into all that it passes on, needs no module of
    this project then, and a module that a worker lacks is an error of the task like any other."""

    def __init__(self, call: Call):
        self._call = call

    def __reduce__(self) -> Call:
        return self._call


class WorkerMonitor:
    """What is heard of the workers, asked of the scheduler every now and then.

    seconds: how long no task may end and no worker that has one be heard of, before the run ends with an error. work:
    the folder that errors name. known: host and process of workers by address, in words.
    """

    def __init__(self, client: Client, seconds: float, work: Path, known: dict[str, str]):
        self._client, self._seconds, self._work, self._known = client, seconds, work, known
        self._address = client.scheduler.address
        self._quiet, self._repeat, self._interval = (
            min(most, seconds / 4) for most in (QUIET_SECONDS, REPEAT_SECONDS, LOOK_SECONDS)
        )
        self.answer_seconds = min(ASK_SECONDS, seconds / 2)
        self._beats: dict[str, tuple[float, float]] = {}  # by worker: the scheduler's time of the last, ours
        self._said = self._looked = 0.0
        self._run_id, self._runs = uuid.uuid4().hex[:8], 0
        self.heard()

    def keys(self, name: str, count: int) -> list[str]:
        """Keys of so many tasks, which no others have: Dask takes tasks of one key for one task."""
        self._runs += 1
        return [f"{name}-{place}-{self._runs}{self._run_id}" for place in range(count)]

    def heard(self) -> None:
        """Something has happened: the time without life begins anew."""
        self._life = time.monotonic()

    def error(self, words: str) -> KeepWorkError:
        """An error that ends the run and keeps its work."""
        return KeepWorkError(f"{words}; the work in {self._work} is kept: the same command goes on there")

    def gone(self) -> KeepWorkError:
        """The error for a scheduler that has dropped the tasks of this run, as far as it is still there."""
        return self.error(f"the Dask scheduler {self._address} is gone, or has dropped the tasks of this run")

    def look(self, say: Callable[[str], None]) -> None:
        """Ask for beats, where it was not done just now; say what is not heard of. Raises KeepWorkError where there is
        no life for too long, and where the scheduler is gone."""
        if time.monotonic() - self._looked < self._interval:
            return
        if self._client.status != "running":
            raise self.gone()
        words = self._hear()
        now = self._looked = time.monotonic()
        if now - self._life > self._seconds:
            raise self.error(
                f"no task has ended and no worker at one was heard of for {now - self._life:.0f} s: {words or NOBODY}; "
                "end what hangs, and start workers where they are missing"
            )
        if words and now - max(self._said, self._life) > self._repeat:
            say(f"{words}; without life for {self._seconds:g} s (--worker-timeout) the run ends")
            self._said = now

    def _hear(self) -> str:
        """Note which workers beat; returns words for what is wrong, empty where nothing is."""
        scheduler, seconds = self._client.scheduler, self.answer_seconds
        try:
            workers = ask(self._client, lambda: scheduler.identity(n_workers=-1), seconds)["workers"]
            holding = ask(self._client, lambda: scheduler.processing(workers=None), seconds)
        except OSError as error:
            return f"the Dask scheduler {self._address} does not answer ({type(error).__name__})"
        if not workers:
            left = self._named(self._beats)
            return f"no worker is left of {left}" if left else f"{self._address} has no worker"
        now = time.monotonic()
        for address, worker in workers.items():
            if self._beats.get(address, (None, 0))[0] != worker["last_seen"]:
                self._beats[address] = worker["last_seen"], now
        silent = {address for address in workers if now - self._beats[address][1] > self._quiet}
        paused = {address for address in workers if _is_paused(workers[address])}
        if any(holding.get(address) for address in workers if address not in silent | paused):
            self.heard()
        lines = {"not heard of": silent, "paused, its memory is full": paused - silent}
        return ", ".join(f"{words}: {self._named(some, holding)}" for words, some in lines.items() if some)

    def _named(self, addresses, holding=()) -> str:
        """Some workers in words: address, host and process, for how long nothing was heard of them, what they hold."""
        found, now = [], time.monotonic()
        for address in sorted(addresses)[:NAMED]:
            about = [self._known[address]] if address in self._known else []
            about += [f"last heard of {now - self._beats[address][1]:.0f} s ago"]
            keys = [str(key) for key in dict(holding).get(address, ()) if str(key).endswith(self._run_id)]
            tasks = " ".join(key.rpartition("-")[0] for key in keys[:NAMED])
            about += [f"at {tasks}" + (" ..." if len(keys) > NAMED else "")] if keys else []
            found.append(f"{address} ({', '.join(about)})")
        more = len(addresses) - len(found)
        return ", ".join(found) + (f" and {more} more" if more else "")


def _is_paused(worker: dict) -> bool:
    """Whether a worker takes no task any more until there is memory, and is at none."""
    return worker["status"] == "paused" and not worker["metrics"].get("task_counts", {}).get("executing")


class _Run:
    """Calls as tasks: what comes of them, as it comes."""

    def __init__(self, client: Client, watch: WorkerMonitor):
        self._client, self._watch = client, watch
        self._ended: SimpleQueue[Future] = SimpleQueue()
        self._left: dict[str, tuple[int, Future]] = {}  # by key: place and future

    def start(self, name: str, calls: list[Call]) -> None:
        """Give the calls to the scheduler."""
        keys = self._watch.keys(name, len(calls))
        for place, (key, call) in enumerate(zip(keys, calls, strict=True)):
            future = self._client.submit(pickle.loads, pickle.dumps(_Called(call)), key=key)
            self._left[key] = place, future
            future.add_done_callback(self._ended.put)
        self._watch.heard()  # between two runs there is nobody to be heard of

    def wait(self, say: Callable[[str], None]) -> list[tuple[int, Any]]:
        """Places and results of some more calls; none where a moment passed without. Raises what a task raised."""
        futures = []
        with suppress(Empty):
            futures.append(self._ended.get(timeout=WAIT_SECONDS))
            while True:
                futures.append(self._ended.get_nowait())
        for future in futures:
            if future.status == "error":
                raise self._explained(future)
            if future.status == "cancelled":
                raise self._watch.gone()
        found = self._fetch(futures) if futures else []
        self._watch.look(say)
        return found

    def _fetch(self, futures: list[Future]) -> list[tuple[int, Any]]:
        """Places and results of calls that have ended; none where those who hold the results do not answer: then the
        scheduler has them made again, or they are asked again."""
        try:
            results = ask(self._client, lambda: self._client.gather(futures), self._watch.answer_seconds)
        except Exception as error:
            if not isinstance(error, OSError) and all(future.status != "error" for future in futures):
                raise
            for future in futures:
                future.add_done_callback(self._ended.put)
            time.sleep(WAIT_SECONDS)
            return []
        self._watch.heard()
        return [(self._left.pop(future.key)[0], result) for future, result in zip(futures, results, strict=True)]

    def _explained(self, future: Future) -> BaseException:
        """The error of a task, in words where it is the cluster's."""
        error = future.exception()
        if isinstance(error, KilledWorker):
            return self._watch.error(
                f"{future.key}: workers die at this task, the last was {error.last_worker.address}: out of memory? "
                "Their logs tell; give them more memory, or fewer threads"
            )
        if isinstance(error, MemoryError):
            return self._watch.error(f"{future.key}: a worker is out of memory ({error}); give it more of it")
        if isinstance(error, ImportError):
            return self._watch.error(f"{future.key}: a worker that came later cannot run it ({error})")
        return error

    def cancel(self) -> None:
        """Give up what has not ended, as far as the scheduler still hears it."""
        if self._client.status != "running":
            return
        with suppress(OSError, RuntimeError, *CANCELLED):
            left = [future for _, future in self._left.values()]
            ask(self._client, lambda: self._client.cancel(left, asynchronous=True))


def run(
    client: Client, watch: WorkerMonitor, name: str, calls: list[Call], done: Callable[[int], None] = lambda place: None
) -> list:
    """Results of calls as tasks, in order; done(place) is told of each. The first error ends it all.

    Raises KeepWorkError where the scheduler is gone, and where no worker is heard of for too long.
    """
    tasks, results = _Run(client, watch), [None] * len(calls)
    left = len(calls)
    with tqdm(total=left, desc=name, unit="task", file=sys.stderr) as bar:
        try:
            tasks.start(name, calls)
            while left:
                for place, result in tasks.wait(lambda words: bar.write(words, file=sys.stderr)):
                    results[place] = result
                    done(place)
                    bar.update()
                    left -= 1
        except BaseException as error:
            tasks.cancel()
            if isinstance(error, CANCELLED) or (isinstance(error, Exception) and client.status != "running"):
                raise watch.gone() from error
            raise
    return results
