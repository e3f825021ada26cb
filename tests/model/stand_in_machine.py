"""The state of the GPU that is not there (stand_in.py): streams and their order, memory, and the faults found."""

import threading
import traceback
import weakref
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch.cuda._sanitizer import StreamSynchronizations


class Fault(NamedTuple):
    """kind: "pageable", "waits", "race", "freed" or "one block"; what: the operation; where: the project's function."""

    kind: str
    what: str
    where: str


@dataclass
class Memory:
    """Of some tensors on the device: who allocated it, the last write and the reads since, as (stream, number)."""

    stream: int
    tensors: int = 0
    write: tuple[int, int] | None = None
    reads: dict[int, int] = field(default_factory=dict)
    recorded: set[int] = field(default_factory=set)


class Machine:
    """The GPU's state, and what was found."""

    def __init__(self):
        self.lock, self.local = threading.RLock(), threading.local()
        self.faults: list[Fault] = []
        self.launches: list[tuple[str, dict[str, torch.dtype]]] = []
        self.steady = False
        self.capture = None  # the graph under way, and the thread that records it
        self.order, self.numbers, self.streams = StreamSynchronizations(), 0, 1
        self.memory: dict[int, Memory] = {}
        self.pinned: dict[int, tuple[int, object]] = {}  # first byte -> bytes, and what keeps them
        self.generator = torch.Generator().manual_seed(1)
        self.main = threading.get_ident()

    @property
    def stream(self) -> int:
        """Number of this thread's current stream."""
        return getattr(self.local, "stream", 0)

    @property
    def recording(self) -> bool:
        """Whether this thread records a graph."""
        return self.capture is not None and self.capture.thread == threading.get_ident()

    def found(self, kind: str, what: str) -> None:
        """Note a fault, once."""
        frames = [f for f in traceback.extract_stack() if "/model/" in f.filename or "/load/" in f.filename]
        frames = [f for f in frames if "/tests/" not in f.filename and "site-packages" not in f.filename]
        where = f"{frames[-1].filename.rpartition('/')[2]}:{frames[-1].name}" if frames else "?"
        fault = Fault(kind, what, where)
        if fault not in self.faults:
            self.faults.append(fault)

    def waits(self, what: str) -> None:
        """The host waits for the device: refused while a graph is recorded, a fault in the main thread's steps."""
        if self.recording:
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({what})")
        if getattr(self, "sync_debug", 0) == "error":
            raise RuntimeError(f"called a synchronizing CUDA operation ({what})")
        if self.steady and threading.get_ident() == self.main:
            self.found("waits", what)
        self.order.all_streams_wait_for_stream(self.stream)

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor on the host lies in pinned memory."""
        at = tensor.untyped_storage().data_ptr()
        return any(begin <= at < begin + size for begin, (size, _) in self.pinned.items())

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """Call the memory pinned, from now on."""
        storage = tensor.untyped_storage()
        self.pinned[storage.data_ptr()] = storage.nbytes(), storage
        return tensor

    def touch(self, reads: list[torch.Tensor], writes: list[torch.Tensor], what: str) -> None:
        """The current stream's next work reads and writes these (CPU tensors behind those on the device)."""
        stream, self.numbers = self.stream, self.numbers + 1
        self.order.update_seq_num(stream, self.numbers)
        for tensors, writing in ((reads, False), (writes, True)):
            for tensor in tensors:
                known = self.memory.get(tensor.untyped_storage().data_ptr())
                if known is None or not tensor.numel():
                    continue
                before = ([known.write] if known.write else []) + (list(known.reads.items()) if writing else [])
                if not all(self.order.is_ordered_after(stream, number, other) for other, number in before):
                    self.found("race", what)
                if writing:
                    known.write, known.reads = (stream, self.numbers), {}
                else:
                    known.reads[stream] = self.numbers

    def made(self, tensor: torch.Tensor) -> None:
        """A tensor on the device came into being; later it goes."""
        at = tensor.elem.untyped_storage().data_ptr()
        self.memory.setdefault(at, Memory(self.stream)).tensors += 1
        weakref.finalize(tensor, self._gone, at).atexit = False

    def _gone(self, at: int) -> None:
        with self.lock:
            known = self.memory[at]
            known.tensors -= 1
            if known.tensors:
                return
            del self.memory[at]
            used = [*known.reads.items(), *([known.write] if known.write else [])]
            for stream, number in used:
                if stream in known.recorded or self.order.is_ordered_after(known.stream, number, stream):
                    continue
                self.found("freed", f"memory of stream {known.stream} that stream {stream} still uses")

    @contextmanager
    def step(self):
        """Inside, the host must not wait for the device, and copies come from pinned memory."""
        self.steady = True
        try:
            yield
        finally:
            self.steady = False

    def kinds(self) -> set[str]:
        """Of the faults found since the last call."""
        found, self.faults = self.faults, []
        return {fault.kind for fault in found}


MACHINE = Machine()
