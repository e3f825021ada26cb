"""Ranks for tests: processes of one thread each that talk by gloo over the loopback."""

import multiprocessing
import os
import pickle
import socket
import traceback

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["model.distributed", "numpy"])


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _child(rank, world, port, pipe, work):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    import torch

    from model import ranks

    torch.set_num_threads(1)
    try:
        together = ranks.join("gloo", torch.device("cpu"))
        function, args = pickle.loads(work)
        # Plain pickles: torch would have multiprocessing share tensors through files of a process that is gone by then.
        pipe.send_bytes(pickle.dumps((True, function(together, *args))))
        together.everyone(None)
    except BaseException:
        pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
    os._exit(0)


def run_ranks(world: int, function, *args, seconds: float = 60) -> list:
    """function(ranks, *args) on every rank; returns what each gave, by rank. Fails with the first rank's traceback."""
    port, children = free_port(), []
    for rank in range(world):
        ours, theirs = CONTEXT.Pipe()
        words = (rank, world, port, theirs, pickle.dumps((function, args)))
        child = CONTEXT.Process(target=_child, args=words, daemon=True)
        child.start()
        theirs.close()
        children.append((child, ours))
    try:
        found = []
        for rank, (_, pipe) in enumerate(children):
            if not pipe.poll(seconds):
                raise AssertionError(f"rank {rank} of {world} said nothing for {seconds} s")
            good, value = pickle.loads(pipe.recv_bytes())
            assert good, f"rank {rank} of {world}:\n{value}"
            found.append(value)
        return found
    finally:
        for child, _ in children:
            child.join(5)
            child.kill()
