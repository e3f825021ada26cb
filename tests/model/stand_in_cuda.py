"""The stand-in's streams, events and graphs, put in the place of torch.cuda's; install() comes before all else."""

import threading
from contextlib import contextmanager
from types import SimpleNamespace

import safetensors.torch
import torch
from triton.runtime.interpreter import InterpretedFunction

from tests.model.stand_in import CUDA, MACHINE, Functions, Mode, OnDevice

TOTAL = 80 << 30


class Event:
    """A mark in a stream."""

    def __init__(self, enable_timing: bool = False, **_):
        self._timing, self._recorded = enable_timing, False

    def record(self, stream=None) -> None:
        """All work queued so far in the stream."""
        self._recorded = True
        MACHINE.order.record_state(id(self), stream.number if stream else MACHINE.stream)

    def wait(self, stream=None) -> None:
        """Work queued in the stream from now on comes after it."""
        if self._recorded:
            MACHINE.order.stream_wait_for_event(stream.number if stream else MACHINE.stream, id(self))

    def query(self) -> bool:
        """Whether it is done: at once, here."""
        if MACHINE.recording:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing (query)")
        return True

    def synchronize(self) -> None:
        """Waits."""
        MACHINE.waits("event.synchronize")
        if self._recorded:
            MACHINE.order.all_streams_wait_for_event(id(self))

    def elapsed_time(self, other: "Event") -> float:
        """Milliseconds: one."""
        if not (self._timing and other._timing and self._recorded and other._recorded):
            raise ValueError("Both events must be recorded, with timing, before calculating elapsed time.")
        return 1.0


class Stream:
    """Work in order."""

    def __init__(self, device=None, number: int | None = None, **_):
        if number is None:
            number, MACHINE.streams = MACHINE.streams, MACHINE.streams + 1
            MACHINE.order.create_stream(number)
        self.number = number

    def record_event(self, event: Event | None = None) -> Event:
        """A mark here and now."""
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        """See Event.wait."""
        event.wait(self)

    def wait_stream(self, other: "Stream") -> None:
        """Work queued from now on comes after all that the other has."""
        self.wait_event(other.record_event())

    def synchronize(self) -> None:
        """Waits."""
        MACHINE.waits("stream.synchronize")
        MACHINE.order.all_streams_wait_for_stream(self.number)


@contextmanager
def in_stream(stream: Stream | None):
    """torch.cuda.stream."""
    before = MACHINE.stream
    if stream is not None:
        MACHINE.local.stream = stream.number
    try:
        yield
    finally:
        MACHINE.local.stream = before


class CUDAGraph:
    """Work that was recorded, done anew at each replay, on the same memory."""

    def __init__(self, *_, **__):
        self.thread, self._work, self._before = threading.get_ident(), [], {}

    def before(self, written: list[torch.Tensor]) -> None:
        """Recording changes nothing: keep what the work under way is about to change."""
        for tensor in written:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._before:
                with torch._C._DisableTorchDispatch():
                    self._before[storage.data_ptr()] = storage, storage.clone()

    def note(self, work, new: list[torch.Tensor], makes: bool) -> None:
        """Record a piece of work, and the memory that takes its results."""

        def again() -> None:
            found = work()
            found = [x for x in (found if isinstance(found, (tuple, list)) else [found]) if isinstance(x, torch.Tensor)]
            if new and makes:
                for mine, fresh in zip(new, found, strict=True):
                    mine.copy_(fresh)

        self._work.append(again)

    def end(self) -> None:
        """Recording ends."""
        with torch._C._DisableTorchDispatch():
            for storage, kept in self._before.values():
                storage.copy_(kept)

    def replay(self) -> None:
        """Do the work."""
        with torch._C._DisableTorchDispatch(), torch.no_grad(), torch.autocast("cuda", enabled=False):
            for work in self._work:
                work()


@contextmanager
def recording(graph: CUDAGraph, pool=None, stream=None, capture_error_mode="global"):
    """torch.cuda.graph, which waits for the device; but that is once for each size of batches."""
    MACHINE.order.sync_all_streams()
    MACHINE.capture, stream = graph, stream or Stream()
    try:
        with in_stream(stream):
            yield
    finally:
        MACHINE.capture = None
        graph.end()
    MACHINE.order.all_streams_wait_for_stream(stream.number)


class Runtime:
    """torch.cuda.cudart(): host memory that the device reaches."""

    def cudaHostRegister(self, at: int, size: int, flags: int) -> int:  # noqa: N802 - CUDA's name
        """0: done."""
        MACHINE.pinned[at] = size, None
        return 0

    def cudaHostUnregister(self, at: int) -> int:  # noqa: N802
        """0: done."""
        return 0 if MACHINE.pinned.pop(at, None) else 1


def synchronize(*_) -> None:
    """torch.cuda.synchronize."""
    MACHINE.waits("torch.cuda.synchronize")
    MACHINE.order.sync_all_streams()


class Autocast(torch.amp.autocast):
    """For "cuda": the CPU's, as torch's C++ takes the tensors for ones on it."""

    def __init__(self, device_type: str, *args, **kwargs):
        super().__init__("cpu", *args, **kwargs)


def _launch(real):
    """Triton's launch: pointers must be the device's, or pinned."""

    def run(self, *args, grid, warmup, **kwargs):
        pointers = {}
        for i, (name, value) in enumerate(zip(self.arg_names, args, strict=False)):
            if isinstance(value, OnDevice):
                pointers[name] = value.elem
            elif isinstance(value, torch.Tensor):
                if not MACHINE.is_pinned(value):
                    raise ValueError(f"Pointer argument (at {i}) cannot be accessed from Triton (cpu tensor?)")
                pointers[name] = value
        plain = [x.elem if isinstance(x, OnDevice) else x.detach() if isinstance(x, torch.Tensor) else x for x in args]
        tensors = [x.detach() for x in pointers.values()]

        def work() -> None:
            with torch._C._DisableTorchDispatch():
                real(self, *plain, grid=grid, warmup=warmup, **kwargs)

        with MACHINE.lock:
            MACHINE.launches.append((self.fn.__name__, {name: x.dtype for name, x in pointers.items()}))
            MACHINE.touch([], tensors, self.fn.__name__)
            if MACHINE.recording:
                MACHINE.capture.before(tensors)
                MACHINE.capture.note(work, [], False)
            work()

    return run


def _grouped(real):
    """torch's grouping of an optimiser's tensors, whose C++ takes them for ones on the CPU."""

    def group(*args, **kwargs):
        return {
            (CUDA if isinstance(lists[0][0], OnDevice) else device, dtype): (lists, indices)
            for (device, dtype), (lists, indices) in real(*args, **kwargs).items()
        }

    return staticmethod(group)


def install() -> None:
    """From now on, in this process, there is a GPU."""
    for name, value in {
        "Event": Event, "Stream": Stream, "stream": in_stream, "CUDAGraph": CUDAGraph, "graph": recording,
        "current_stream": lambda device=None: Stream(number=MACHINE.stream), "synchronize": synchronize,
        "is_available": lambda: True, "_lazy_init": lambda: None, "current_device": lambda: 0,
        "device_count": lambda: 1, "set_device": lambda device: None, "graph_pool_handle": lambda: (0, 1),
        "is_current_stream_capturing": lambda: MACHINE.recording,
        "mem_get_info": lambda device=None: (TOTAL, TOTAL), "memory_allocated": lambda device=None: 1 << 30,
        "max_memory_allocated": lambda device=None: 2 << 30, "cudart": Runtime, "get_device_name": lambda: "stand-in",
        "manual_seed_all": lambda seed: MACHINE.generator.manual_seed(seed + 1),
        "get_sync_debug_mode": lambda: getattr(MACHINE, "sync_debug", "default"),
        "set_sync_debug_mode": lambda mode: setattr(MACHINE, "sync_debug", mode),
    }.items():  # fmt: skip
        setattr(torch.cuda, name, value)
    torch.autocast = Autocast
    save = safetensors.torch.save_file

    def save_file(tensors: dict, *args, **kwargs) -> None:  # its own copy to the host is in Rust
        save({name: x.cpu() if isinstance(x, OnDevice) else x for name, x in tensors.items()}, *args, **kwargs)

    safetensors.torch.save_file = save_file
    kind = torch.optim.Optimizer
    kind._group_tensors_by_device_and_dtype = _grouped(kind._group_tensors_by_device_and_dtype)
    InterpretedFunction.run = _launch(InterpretedFunction.run)
    start = threading.Thread.run

    def run(thread) -> None:
        with Functions(), Mode():
            start(thread)

    threading.Thread.run = run
    for mode in (Functions(), Mode()):
        mode.__enter__()


__all__ = ["CUDA", "MACHINE", "SimpleNamespace", "install"]
