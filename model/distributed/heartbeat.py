"""Who of the ranks lives: a fault on one ends all of them within seconds, with the words of the one that failed.

Every rank writes a beat into the job's key-value store each second, and looks for two things there: words of a rank
that failed, and beats that have stopped. On its own machine it sees the processes too (neighbours.py): at once that one
ended, and by which signal, or that one is stopped or hangs, and then ends it by force, as torchrun would wait for it
for another 30 s. Collectives alone would not do: a rank that waits for one that is gone hangs, on a GPU for as long as
the time limit of NCCL.
"""

import contextlib
import json
import os
import platform
import signal
import sys
import threading
import time
import traceback
from dataclasses import asdict

import torch.distributed as dist

from model.distributed.neighbours import Neighbours, Process, exit_words, this_process

BEAT = 1.0  # seconds
LOST_AFTER = 20.0  # seconds without a beat: the machine or its network is gone, or the process is stopped
TIDY = 0.7  # seconds that the main thread has, after connections broke, to clear away a checkpoint half written
FAR = 3.0  # seconds more for ranks of other machines: those beside them can say more
SETTLE = 3.5  # seconds after a broken connection in which a rank that lives must have beaten again
LOST_PEER = ("connection", "gloo", "nccl", "socket", "broken pipe", "timed out", "remote process", "store")


class FailureDetector:
    """The watch of rank `rank` of `world`. store: a client of its own, as one that waits would hold up the beats."""

    def __init__(self, rank: int, world: int, store: dist.Store):
        self._rank, self._world, self._store = rank, world, store
        self._local = int(os.environ.get("LOCAL_RANK", 0))
        self._ending = False
        self._screen = sys.stderr
        self._neighbours, self._processes = Neighbours(), {rank: this_process()}
        self._store.set(f"process/{rank}", json.dumps(asdict(self._processes[rank]), allow_nan=False))
        self._beat(0)
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    @staticmethod
    def of_environment() -> tuple["FailureDetector | None", dist.Store | None]:
        """The watch and the store that torchrun's environment tells of; none of either for a process alone."""
        if "RANK" not in os.environ:
            return None, None
        store, rank, world = next(iter(dist.rendezvous("env://")))
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        own = dist.TCPStore(host, port, is_master=False, wait_for_workers=False)
        # torchrun may keep its store over a restart: addresses of ranks that are gone would still stand in it.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        watch = FailureDetector(rank, world, dist.PrefixStore(f"attempt_{attempt}/watch", own))
        return watch, dist.PrefixStore(f"attempt_{attempt}/ranks", store)

    def hold_off_sigterm(self) -> None:
        """From now on SIGTERM ends this process only some seconds later, wherever nothing else handles it: torchrun
        sends it as soon as a rank has died, and those that are left must have time to say so."""

        def end_later(number, _):
            timer = threading.Timer(SETTLE + 1.5, os._exit, [128 + number])
            timer.daemon = True
            timer.start()

        signal.signal(signal.SIGTERM, end_later)

    def _beat(self, number: int) -> None:
        self._store.set(f"beat/{self._rank}", str(number))

    def _beats(self) -> list[str]:
        """Each rank's last beat; "" before its first."""
        keys = [f"beat/{rank}" for rank in range(self._world)]
        return [self._store.get(key).decode() if self._store.check([key]) else "" for key in keys]

    def _meet(self) -> None:
        """Get to know the processes of ranks that have come since the last time."""
        for rank in range(self._world):
            if rank not in self._processes and self._store.check([key := f"process/{rank}"]):
                self._processes[rank] = Process(**json.loads(self._store.get(key)))
                self._neighbours.add(rank, self._processes[rank])

    def _run(self) -> None:
        number, before, since = 0, [""] * self._world, [time.monotonic()] * self._world
        looked = since[0]
        while not self._ending:
            ended = self._neighbours.wait(BEAT)
            if self._ending:
                return
            number += 1
            try:
                self._beat(number)
                if (found := self._found()) is not None:
                    self._leave(found)
                if ended:
                    self._lost({rank: exit_words(status) for rank, status in ended.items()})
                self._meet()
                beats, now = self._beats(), time.monotonic()
            except Exception as error:  # the store's errors have no common type
                if self._ending:
                    return
                self._store_gone(error)
            if now - looked > LOST_AFTER / 2:  # this process was stopped itself, as the others may have been
                since = [now] * self._world
            since = [last if old == new else now for last, old, new in zip(since, before, beats, strict=True)]
            before, looked = beats, now
            limits = [LOST_AFTER + FAR * (rank not in self._neighbours) for rank in range(self._world)]
            lost = [r for r in range(self._world) if beats[r] and now - since[r] > limits[r]]
            if lost:
                self._lost(self._silent(lost, f"no sign of life for {LOST_AFTER:.0f} s"))

    def _silent(self, ranks: list[int], why: str) -> dict[int, str]:
        """Words for ranks that do not beat any more."""
        far = f"is gone without a word ({why}): its machine or the network failed, or it stands still there"
        near = self._neighbours
        return {rank: f"{near.words(rank)} ({why})" if rank in near else far for rank in ranks}

    def _store_gone(self, error: Exception) -> None:
        first = str(error).splitlines()[0]
        words = f"error: the job's store does not answer, its first machine is gone ({first})"
        self._leave({"rank": -1, "host": "", "status": 1, "words": words, "lost": ()})

    def _found(self) -> dict | None:
        return json.loads(self._store.get("failed")) if self._store.check(["failed"]) else None

    def _post(self, words: str, status: int, rank: int, lost: tuple[int, ...] = ()) -> dict:
        """Say why the job ends; returns what the first to do so said."""
        told = {"rank": rank, "host": platform.node(), "status": status, "words": words, "lost": lost}
        mine = json.dumps({"by": self._rank, **told}, allow_nan=False)
        said = self._store.compare_set("failed", "", mine).decode()
        if said == mine:
            self._show(words)
        return json.loads(said)

    def _show(self, words: str) -> None:
        print(words, file=self._screen, flush=True)

    def _lost(self, ranks: dict[int, str]) -> None:
        """End as ranks are gone; by each, what became of it."""
        told = [f"rank {rank} of {self._world}{self._place(rank)} {words}" for rank, words in ranks.items()]
        words = f"error: {'; '.join(told)}; the job ends. Go on from its last checkpoint with --ckpt"
        self._leave(self._post(words, 1, min(ranks), tuple(ranks)))

    def _place(self, rank: int) -> str:
        found = self._processes.get(rank)
        return f", process {found.pid} on {found.host}," if found else ""

    def _leave(self, found: dict) -> None:
        """End this process, now: its main thread may wait for a rank that never answers. Those on this machine that
        cannot leave by themselves are ended too."""
        if found["rank"] != self._rank and found["host"] != platform.node() and self._local == 0:
            self._show(f"on {found['host'] or 'another machine'}: {found['words']}")
        for rank in self._neighbours:
            if rank in found["lost"] or self._neighbours.stopped(rank):
                self._neighbours.kill(rank)
        if threading.current_thread() is self._thread:
            time.sleep(TIDY)
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(found["status"])

    def failed(self, status: int, words: str) -> None:
        """This rank cannot go on: tell the others, and end."""
        self._ending = True
        self._leave(self._post(words if self._world == 1 else f"rank {self._rank}: {words}", status, self._rank))

    def broken(self, error: BaseException) -> None:
        """An error nobody expected: end, with the words of the rank that caused it. That is another one where the error
        is a broken connection to it."""
        text = f"{type(error).__name__}: {error}".lower()
        if not isinstance(error, RuntimeError) or not any(word in text for word in LOST_PEER):
            self.failed(1, "".join(traceback.format_exception(error)).rstrip())
        try:
            self._blame(error)
        except Exception as gone:  # the store's errors have no common type
            self._store_gone(gone)

    def _blame(self, error: BaseException) -> None:
        """Connections broke: end with the words of the rank that failed; without any, find who has stopped to beat."""
        beats, stop = self._beats(), time.monotonic() + SETTLE
        while time.monotonic() < stop:
            if (found := self._found()) is not None:
                self._leave(found)
            time.sleep(0.1)
        lost = [rank for rank, (old, new) in enumerate(zip(beats, self._beats(), strict=True)) if old == new]
        if lost:
            self._lost(self._silent(lost, "its connections broke"))
        self.failed(1, f"error: the ranks lost each other: {str(error).splitlines()[0]}")

    def end(self) -> None:
        """All went well, or the ranks end together. The thread ends here: were it in the store's C++ code while Python
        shuts down, Python would end it there, and with it the process, by "terminate called"."""
        self._ending = True
        self._neighbours.wake()
        self._thread.join()
