"""numba-cuda's real host layer on a driver that is not there: a rung between the simulator and a GPU.

Arrays, streams, events, contexts and the marshalling of arguments are numba-cuda's own. Device memory is the host's,
poisoned; a launch runs Numba's simulator on views of its arguments. What is started on a stream runs as late as it
may: when somebody waits for it. So a copy whose source was filled again, a result read too early and memory freed too
early give wrong results or a fault here; and every access is held against all others that no stream, event or wait
puts before it, whichever order they ran in.

Faults that are found: a driver call in a thread without a context; a host array passed to a kernel; copies outside of
an allocation; pinned memory changed while a copy of it is under way; memory freed while something that uses it is under
way; two accesses, one of them a write, that nothing orders; arguments that are misaligned or not of the declared types.
"""

import ctypes
import itertools
import os
import threading
import traceback
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace

import numba.cuda.dispatcher as dispatcher
import numpy as np
from cuda.bindings import driver as bindings
from numba import cuda
from numba.cuda.cudadrv import devicearray, devices, driver as driver_module
from numba.cuda.simulator.kernel import FakeCUDAKernel

POISON, UNREAD = 0xAB, 0xCD  # of new device memory; of host memory that a copy is on its way to
LEGACY = 0  # the stream of calls that name none: waits for all others, and its caller for it

faults: list[str] = []
calls: dict[str, int] = {}  # driver calls, launches, bytes copied from and to pageable and pinned memory
launched_types: dict[str, set[tuple[str, ...]]] = {}  # kernel -> argument types of its launches
_thread = threading.local()
_numbers = itertools.count(1000)
_lock = threading.RLock()

StepTimer = dict[int, int]  # stream -> how many of its operations come before


@dataclass
class Access:
    """Bytes begin to end of an allocation, touched by operation `number` of a stream."""

    begin: int
    end: int
    writes: bool
    stream: int
    number: int
    name: str


@dataclass
class Allocation:
    """Device or pinned host memory."""

    buffer: object
    size: int
    pinned: bool
    accesses: list[Access] = field(default_factory=list)


@dataclass
class Operation:
    """Something started on a stream; run: what it does, when its turn comes."""

    name: str
    run: Callable[[], None]
    needs: list[tuple[int, int]] = field(default_factory=list)  # (stream, operations of it) that must have run


@dataclass
class Stream:
    """Operations started, how many of them ran, and what comes before the next one."""

    operations: list[Operation] = field(default_factory=list)
    done: int = 0
    clock: StepTimer = field(default_factory=dict)
    needs: list[tuple[int, int]] = field(default_factory=list)


memory: dict[int, Allocation] = {}
_freed_too_early: list[Allocation] = []
streams: dict[int, Stream] = {}
events: dict[int, tuple[int, int, StepTimer]] = {}  # event -> stream, its operations before the event, clock
_host: StepTimer = {}  # what the host has waited for


def _count(name: str, amount: int = 1) -> None:
    calls[name] = calls.get(name, 0) + amount


def _join(clock: StepTimer, other: StepTimer) -> None:
    for stream, number in other.items():
        clock[stream] = max(clock.get(stream, 0), number)


def _allocation(address: int, size: int) -> tuple[int, Allocation] | None:
    return next(((a, m) for a, m in list(memory.items()) if a <= address and address + size <= a + m.size), None)


def _allocate(size: int, pinned: bool) -> int:
    buffer = ctypes.create_string_buffer(size + 256)
    address = (ctypes.addressof(buffer) + 255) & ~255
    ctypes.memset(address, POISON, size)
    with _lock:
        memory[address] = Allocation(buffer, size, pinned)
    return address


def _free(address: int) -> None:
    with _lock:
        there = memory.pop(int(address))
        for access in there.accesses:
            if access.number > streams[access.stream].done:
                _freed_too_early.append(there)  # or what uses it would crash
                stack = [f for f in traceback.extract_stack() if "gpu_etl" in f.filename]
                at = " ".join(f"{f.filename.rpartition('/')[2]}:{f.lineno}" for f in stack[-4:-2])
                faults.append(f"memory freed while {access.name} is under way, at {at}")
                return


def _start(stream: int, name: str, run: Callable[[], None], accesses: list[tuple[int, int, bool]]) -> None:
    """Put an operation behind those of its stream; accesses: (address, size, writes)."""
    there = streams.setdefault(stream, Stream())
    if stream == LEGACY:
        for other, state in streams.items():
            there.needs.append((other, len(state.operations)))
            _join(there.clock, state.clock)
    _join(there.clock, _host)
    there.operations.append(Operation(name, run, there.needs))
    there.needs = []
    number = there.clock[stream] = len(there.operations)
    for address, size, writes in accesses:
        if size and (found := _allocation(address, size)):
            _check(found[1], Access(address, address + size, writes, stream, number, name), there.clock)


def _check(allocation: Allocation, access: Access, clock: StepTimer) -> None:
    """Hold an access against those before it."""
    allocation.accesses = [a for a in allocation.accesses if a.number > _host.get(a.stream, 0)]
    for other in allocation.accesses:
        together = other.begin < access.end and access.begin < other.end and (other.writes or access.writes)
        if together and clock.get(other.stream, 0) < other.number:
            faults.append(f"nothing puts {other.name} before {access.name}")
    allocation.accesses.append(access)


def _run(stream: int, until: int) -> None:
    """Run the operations of a stream up to that one, and all that they wait for."""
    there = streams.setdefault(stream, Stream())
    while there.done < until:
        operation = there.operations[there.done]
        for other, number in operation.needs:
            _run(other, number)
        operation.run()
        operation.run = None
        there.done += 1


def _wait_for(stream: int, until: int, clock: StepTimer) -> None:
    _run(stream, until)
    _join(_host, clock)


def _synchronize(stream: int) -> None:
    there = streams.setdefault(stream, Stream())
    _wait_for(stream, len(there.operations), there.clock)


def _synchronize_all() -> None:
    for stream in list(streams):
        _synchronize(stream)


def _copy(to, source, size: int, kind: str, stream: int = LEGACY) -> None:
    """A copy between host and device: from or to pageable memory, the host waits for it."""
    to, source = int(to or 0), int(source or 0)
    device, host = (to, source) if kind == "HtoD" else (source, to)
    if not (found := _allocation(device, size)) or found[1].pinned:
        faults.append(f"{kind} of {size} bytes: outside of device memory")
    there = _allocation(host, size)
    pinned = there is not None and there[1].pinned
    _count(f"{kind} {'pinned' if pinned else 'pageable'}")
    _count(f"{kind} bytes, {'pinned' if pinned else 'pageable'}", size)
    if pinned and kind == "HtoD":
        before = zlib.crc32(ctypes.string_at(source, size))
    elif pinned:
        ctypes.memset(to, UNREAD, size)

    def run() -> None:
        if pinned and kind == "HtoD" and zlib.crc32(ctypes.string_at(source, size)) != before:
            faults.append(f"pinned memory changed before it was copied to the device, {size} bytes")
        if pinned and kind == "DtoH" and ctypes.string_at(to, size) != bytes([UNREAD]) * size:
            faults.append(f"pinned memory changed while a copy was on its way to it, {size} bytes")
        ctypes.memmove(to, source, size)

    _start(stream, kind, run, [(device, size, kind == "HtoD"), (host, size, kind == "DtoH")])
    if not pinned or stream == LEGACY:
        _synchronize(stream)


def _copy_inside(to, source, size: int, stream: int = LEGACY) -> None:
    to, source = int(to), int(source)
    _start(stream, "DtoD", lambda: ctypes.memmove(to, source, size) and None, [(source, size, False), (to, size, True)])
    if stream == LEGACY:
        _synchronize(stream)


def _record(event, stream) -> None:
    there = streams.setdefault(int(stream), Stream())
    events[int(event)] = int(stream), len(there.operations), dict(there.clock)


def _stream_waits(stream, event, _flags) -> None:
    there = streams.setdefault(int(stream), Stream())
    if int(event) in events:
        other, number, clock = events[int(event)]
        there.needs.append((other, number))
        _join(there.clock, clock)


def _event_synchronize(event) -> None:
    if int(event) in events:
        _wait_for(*events[int(event)])


def _view(array, name: str):
    """A kernel's argument as the simulator takes it, and the bytes that it spans."""
    if not isinstance(array, devicearray.DeviceNDArray):
        return array, None
    if array.size == 0:
        return np.empty(array.shape, array.dtype), None
    address, size = array.device_ctypes_pointer.value, array.alloc_size
    if not _allocation(address, size):
        faults.append(f"{name}: an argument outside of device memory")
    if address % array.dtype.itemsize:
        faults.append(f"{name}: a misaligned argument")
    bytes_ = (ctypes.c_byte * size).from_address(address)
    return np.ndarray(array.shape, array.dtype, buffer=bytes_, strides=array.strides), (address, size, True)


def _launch(self, arguments, configuration) -> None:
    name = self.py_func.__name__
    _count("launches")
    _count(f"launch {name}")
    _needs_context(f"launch of {name}")
    grid, block = configuration.griddim, configuration.blockdim
    assert all(size > 0 for size in grid) and grid[0] < 2**31 and max(grid[1:]) < 65536, (name, grid)
    types = next(iter(self.overloads)) if self.specialized else [self.typeof_pyval(a) for a in arguments]
    launched_types.setdefault(name, set()).add(tuple(map(str, types)))
    real = dispatcher._Kernel.__new__(dispatcher._Kernel)
    real.extensions, copied_back, marshalled = [], [], []
    for kind, argument in zip(types, arguments, strict=True):
        real._prepare_args(kind, argument, configuration.stream, copied_back, marshalled)
    assert not copied_back, f"{name}: a host array was passed to a kernel"
    with _lock:
        views, spans = zip(*(_view(argument, name) for argument in arguments), strict=True)
        # As Numba hands on a number: in the type that it was declared or taken for.
        typed = zip(views, types, strict=True)
        views = [v if isinstance(v, np.ndarray) else np.dtype(str(kind)).type(v) for v, kind in typed]
        run = lambda: FakeCUDAKernel(self.py_func, device=False)[grid, block](*views)  # noqa: E731
        _start(int(configuration.stream.handle), name, run, [span for span in spans if span])


def _needs_context(name: str) -> None:
    if not getattr(_thread, "context", None):
        faults.append(f"{name}: no context is current in the thread {threading.current_thread().name}")


def _api(name: str, function: Callable, needs_context: bool = True) -> None:
    """Put a function in the place of a driver call."""

    def call(*arguments):
        with _lock:
            _count(name)
            if needs_context:
                _needs_context(name)
            return function(*arguments)

    setattr(driver_module.driver, name, call)


class FakeStream:
    """cupy.cuda.ExternalStream: takes the driver's number of a stream."""

    current = LEGACY

    def __init__(self, handle: int):
        assert type(handle) is int, f"ExternalStream: expected an int, got {handle!r}"
        self._handle = handle

    def __enter__(self):
        FakeStream.current = self._handle

    def __exit__(self, *_):
        FakeStream.current = LEGACY


def _argsort(array):
    """cupy.argsort of what cupy.ndarray made: a device array of Numba's here, which cuda.as_cuda_array hands on."""
    count, address = array
    found = cuda.device_array(count, np.int64)
    keys = np.ndarray(count, np.uint64, buffer=(ctypes.c_byte * (8 * count)).from_address(address))
    there = found.device_ctypes_pointer.value
    places = np.ndarray(count, np.int64, buffer=(ctypes.c_byte * (8 * count)).from_address(there))

    def run() -> None:
        places[:] = np.argsort(keys, kind="stable")

    with _lock:
        _count("sorts")
        _start(FakeStream.current, "argsort", run, [(address, 8 * count, False), (there, 8 * count, True)])
    return found


cupy = SimpleNamespace(
    argsort=_argsort, ndarray=lambda count, dtype, pointer: (count, pointer),
    cuda=SimpleNamespace(
        ExternalStream=FakeStream, UnownedMemory=lambda address, size, owner: address,
        MemoryPointer=lambda memory_, offset: memory_ + offset,
    ),
)  # fmt: skip


def _compile(self, signature):
    """Take the types as compiled: what a kernel's machine code is, other rungs say."""
    types, _ = dispatcher.sigutils.normalize_signature(signature)
    self.overloads[types] = kernel = SimpleNamespace(argument_types=types)
    return kernel


def install() -> None:
    """From now on, numba.cuda in this process works on the fake driver (compute capability 9.0)."""
    driver = driver_module.driver
    driver.is_initialized, driver.initialization_error, driver.pid = True, None, os.getpid()
    driver_module._logger = driver_module.make_logger()
    new = lambda kind: lambda *_: kind(next(_numbers))  # noqa: E731
    _api("cuMemAlloc", lambda size: bindings.CUdeviceptr(_allocate(int(size), pinned=False)))
    _api("cuMemFree", _free)
    _api("cuMemHostAlloc", lambda size, flags: _allocate(int(size), pinned=True))
    _api("cuMemFreeHost", _free)
    _api("cuMemcpyHtoDAsync", lambda to, source, size, stream: _copy(to, source, size, "HtoD", int(stream)))
    _api("cuMemcpyDtoHAsync", lambda to, source, size, stream: _copy(to, source, size, "DtoH", int(stream)))
    _api("cuMemcpyHtoD", lambda to, source, size: _copy(to, source, size, "HtoD"))
    _api("cuMemcpyDtoH", lambda to, source, size: _copy(to, source, size, "DtoH"))
    _api("cuMemcpyDtoDAsync", lambda to, source, size, stream: _copy_inside(to, source, size, int(stream)))
    _api("cuMemcpyDtoD", _copy_inside)
    _api("cuStreamCreate", new(bindings.CUstream))
    _api("cuEventCreate", new(bindings.CUevent))
    _api("cuStreamSynchronize", lambda stream: _synchronize(int(stream)))
    _api("cuCtxSynchronize", _synchronize_all)
    _api("cuEventRecord", _record)
    _api("cuStreamWaitEvent", _stream_waits)
    _api("cuEventSynchronize", _event_synchronize)
    for name in ("cuStreamDestroy", "cuEventDestroy"):
        _api(name, lambda *_: None)
    _api("cuMemGetInfo", lambda: (70 << 30, 80 << 30))
    _api("cuCtxGetCurrent", lambda: bindings.CUcontext(getattr(_thread, "context", 0)), needs_context=False)
    _api("cuCtxGetDevice", lambda: 0)
    _api("cuCtxPushCurrent", lambda handle: setattr(_thread, "context", 77), needs_context=False)
    # A class of its own, as Context keeps a weak reference to it.
    facts = dict(id=0, compute_capability=(9, 0), name="fake", CAN_MAP_HOST_MEMORY=1, supports_float16=True)
    device = type("Device", (), facts)()
    context = driver_module.Context(device, bindings.CUcontext(77))
    gpu = SimpleNamespace(id=0, compute_capability=(9, 0), device=device, get_primary_context=lambda: context)
    devices._runtime.gpus = devices.gpus = cuda.gpus = [gpu]
    dispatcher.CUDADispatcher.call = _launch
    dispatcher.CUDADispatcher.compile = _compile
