"""Ranks for tests: processes of one thread each that talk by gloo over the loopback, as torchrun starts them."""

import multiprocessing
import os
import pickle
import socket
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["dist_train"])


@dataclass(frozen=True)
class Ended:
    """How a rank ended: exit status (negative: a signal), seconds after the first rank's end, and what it said."""

    status: int
    seconds: float
    out: str
    err: str


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _enter(rank: int, world: int, port: int) -> None:
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    import torch

    torch.set_num_threads(1)


def _call(rank, world, port, pipe, work, device):
    _enter(rank, world, port)
    import torch.distributed as dist

    from model.distributed import process_group as ranks

    try:
        store, *_ = next(iter(dist.rendezvous("env://")))
        together = ranks.join("auto", ranks.choose_device(device), store)
        function, args = pickle.loads(work)
        # Plain pickles: torch would have multiprocessing share tensors through files of a process that is gone by then.
        pipe.send_bytes(pickle.dumps((True, function(together, *args))))
        together.everyone(None)
    except BaseException:
        pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
    os._exit(0)


def _main(rank, world, port, folder, words, prepare):
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{name}_{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    _enter(rank, world, port)
    import sys

    import dist_train

    sys.stdout, sys.stderr = open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115
    if prepare:
        words = prepare(rank, list(words)) or words
    status = dist_train.main([str(word) for word in words])
    sys.stdout.flush()
    os._exit(status)


class _Store:
    """The store that torchrun's agent would hold."""

    def __enter__(self):
        import torch.distributed as dist

        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        return self._store.port

    def __exit__(self, *_):
        del self._store


def _start(world, target, arguments):
    children = [CONTEXT.Process(target=target, args=arguments(rank), daemon=True) for rank in range(world)]
    for child in children:
        child.start()
    return children


def run_ranks(world: int, function, *args, device: str = "cpu", seconds: float = 60) -> list:
    """function(ranks, *args) on every rank, by gloo on "cpu" and NCCL on "cuda"; returns what each gave, by rank. Fails
    with the first rank's traceback."""
    pipes = [CONTEXT.Pipe() for _ in range(world)]
    with _Store() as port:
        work = pickle.dumps((function, args))
        children = _start(world, _call, lambda rank: (rank, world, port, pipes[rank][1], work, device))
        try:
            found = []
            for rank, (pipe, _) in enumerate(pipes):
                assert pipe.poll(seconds), f"rank {rank} of {world} said nothing for {seconds} s"
                good, value = pickle.loads(pipe.recv_bytes())
                assert good, f"rank {rank} of {world}:\n{value}"
                found.append(value)
            return found
        finally:
            for child in children:
                child.join(5)
                child.kill()


def run_main(world: int, words, folder: Path, prepare=None, seconds: float = 60) -> list[Ended]:
    """dist_train.main(words) on every rank. prepare(rank, words): called first in each, may give other words."""
    with _Store() as port:
        children = _start(world, _main, lambda rank: (rank, world, port, folder, words, prepare))
        ends, stop = [None] * world, time.monotonic() + seconds
        while None in ends and time.monotonic() < stop:
            for rank, child in enumerate(children):
                if ends[rank] is None and not child.is_alive():
                    ends[rank] = time.monotonic()
            time.sleep(0.02)
        for child in children:
            child.kill()
            child.join()
    said = [[(folder / f"{name}_{rank}").read_text() for name in ("out", "err")] for rank in range(world)]
    assert None not in ends, f"ranks {[r for r, end in enumerate(ends) if end is None]} hang\n{said}"
    return [
        Ended(child.exitcode, end - min(ends), out, err)
        for child, end, (out, err) in zip(children, ends, said, strict=True)
    ]
