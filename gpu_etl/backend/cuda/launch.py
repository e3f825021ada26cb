"""Streams of the device, marks in them, copies between host and device, and how much memory the device gives.

Kernels, and copies that they wait for, run on the stream "compute"; text goes up on "up" while an earlier slab is
computed on, and rows come back on "down" while a later one is. Nothing is allocated or freed a slab: memory, pinned
memory and events are made once, grow where they must, and are used again behind a mark.
"""

import threading
from collections import deque
from collections.abc import Callable
from itertools import count

import numpy as np
from numba import config, cuda

from gpu_etl.backend.cuda.kernel import Kernel
from gpu_etl.common.errors import DeviceMemoryError

STREAMS = ("compute", "up", "down", "read")
_streams: dict[str, object] = {}
_lock = threading.RLock()


def enter_thread() -> None:
    """Make the device's context current in the calling thread, which may free device memory or wait for it."""
    cuda.current_context()


def stream(name: str):
    """The stream of that name, one of STREAMS; all are made at first use, whichever thread comes first."""
    if not _streams:
        with _lock:
            if not _streams:
                _streams.update({each: cuda.stream() for each in STREAMS})
    return _streams[name]


def stream_handle(name: str) -> int:
    """The stream as the driver's number, for other libraries."""
    handle = stream(name).handle
    return int(getattr(handle, "value", handle) or 0)


def launch(kernel: Kernel, blocks: int | tuple[int, int], *arguments, on: str = "compute") -> None:
    """Start a kernel in blocks of THREADS, behind what was started before on that stream."""
    kernel.launch(blocks, stream(on), *arguments)


Places = dict[str, int]  # stream -> number of its last mark
_passed: Places = {}  # what this process has seen the device pass
_before: dict[str, Places] = {name: {} for name in STREAMS}  # marks that come before what is started next on a stream
_numbers = count(1)


def _join(places: Places, others: Places) -> None:
    for name, number in others.items():
        places[name] = max(places.get(name, 0), number)


class Mark:
    """A place in a stream, behind all that was started on it before; put again, it forgets the place before.

    Waiting for one tells of all marks before it, on whichever stream: those are not waited for any more.
    """

    def __init__(self):
        self._event, self._number, self._name = None, 0, ""
        self._behind: Places = {}

    def put(self, name: str) -> "Mark":
        """Put it behind all that was started on the stream of that name."""
        with _lock:
            self._event = self._event or cuda.event()
            self._event.record(stream(name))
            self._number, self._name = next(_numbers), name
            _before[name][name] = self._number
            self._behind = dict(_before[name])
        return self

    def hold(self, name: str) -> None:
        """Let what is started from now on on the stream of that name wait until the work before the mark is done."""
        if self._event is not None and name != self._name:
            with _lock:
                self._event.wait(stream(name))
                _join(_before[name], self._behind)

    def wait(self) -> None:
        """Wait here until the work before the mark is done."""
        behind, number = self._behind, self._number
        if number > _passed.get(self._name, 0):
            self._event.synchronize()
            with _lock:
                _join(_passed, behind)


class Budget:
    """Device memory by use, held under `limit` bytes (0: none); peak: the most that was in use together."""

    def __init__(self):
        self.limit, self.peak = 0, 0
        self._parts: dict[str, int] = {}
        self._dropped: deque[tuple[str, int]] = deque()

    def take(self, name: str, size: int) -> None:
        """`name` is about to take `size` more bytes, or gives -size back. Raises DeviceMemoryError beyond the limit."""
        with _lock:
            while self._dropped:
                dropped, there = self._dropped.popleft()
                self._parts[dropped] -= there
            together = sum(self._parts.values()) + size
            if size > 0 and self.limit and together > self.limit:
                raise DeviceMemoryError(
                    f"--memory-limit {self.limit}: {name} take {size:,} bytes of device memory, {together:,} together "
                    "with the rest; raise it, lower --slab-bytes, or use --device cpu"
                )
            self._parts[name] = self._parts.get(name, 0) + size
            self.peak = max(self.peak, together)

    def drop(self, name: str, size: int) -> None:
        """`name` gave `size` bytes back, as Python's collector found: it comes at any time, so no lock is taken."""
        self._dropped.append((name, size))

    def left(self) -> int:
        """Bytes that may still be taken: under the limit, and of what the device has free."""
        free, _ = (1 << 40, 0) if config.ENABLE_CUDASIM else cuda.current_context().get_memory_info()
        with _lock:
            return min(free, self.limit - sum(self._parts.values())) if self.limit else free


budget = Budget()


def synchronize() -> None:
    """Wait for all that was started on the streams: before memory that it may use is freed."""
    for name in STREAMS:
        stream(name).synchronize()


class Memory:
    """Device memory of one use, by name in the budget: an array that is used again and grows, its contents undefined.

    shape: of an array for n items, by default (n,); order: of an array with two dimensions.
    """

    def __init__(self, name: str, dtype, width: int = 0, order: str = "C"):
        self.array, self.items = None, -1
        self._name, self._dtype, self._width, self._order = name, np.dtype(dtype), width, order
        self._item_bytes = max(1, width) * self._dtype.itemsize

    def take(self, items: int):
        """The array of at least so many items, rows of [items, width] where it has a width."""
        if items > self.items:
            items = max(1, items if self.items < 0 else items + items // 8)  # so that it does not grow each time
            self.release(wait=True)
            budget.take(self._name, items * self._item_bytes)
            shape = (items, self._width) if self._width else items
            self.array = cuda.device_array(shape, self._dtype, order=self._order)
            self.items = items
        return self.array

    def release(self, wait: bool = False) -> None:
        """Give it back to the device. Nothing that uses it may be under way; else wait for all that is."""
        if self.items >= 0:
            if wait:
                synchronize()
            budget.take(self._name, -self.items * self._item_bytes)
            self.array, self.items = None, -1

    def __del__(self):
        if self.items >= 0:
            budget.drop(self._name, self.items * self._item_bytes)


class Pinned:
    """Pinned host memory of one use, that a device copies from and to while the host does something else; grows."""

    def __init__(self, dtype):
        self._dtype, self._array, self._mark = np.dtype(dtype), np.empty(0, dtype), Mark()

    def take(self, items: int) -> np.ndarray:
        """An array of `items`, once no copy of its memory is under way."""
        self._mark.wait()
        if items > len(self._array):
            self._array = cuda.pinned_array(items + items // 4, self._dtype)
        return self._array[:items]

    def used_on(self, name: str) -> None:
        """A copy of it was started on the stream of that name."""
        self._mark.put(name)


class Input:
    """Small arrays that go up to the kernels of a stream: pinned, and a place on the device, both used again."""

    def __init__(self, name: str, dtype, on: str = "compute"):
        self._host, self._device, self._on = Pinned(dtype), Memory(name, dtype), on

    def put(self, array: np.ndarray):
        """The array on the device, for the kernels launched from now on. The one before is gone then."""
        host = self._host.take(len(array))
        host[:] = array
        device = self._device.take(len(array))[: len(array)]
        if len(array):
            device.copy_to_device(host, stream=stream(self._on))
            self._host.used_on(self._on)
        return device

    def release(self) -> None:
        """Give the device's memory back. Nothing that uses it may be under way."""
        self._device.release()


class Output:
    """A small array that comes down behind the kernels of a stream: pinned, used again."""

    def __init__(self, dtype, on: str = "compute"):
        self._host, self._mark, self._on = Pinned(dtype), Mark(), on

    def get(self, array) -> Callable[[], np.ndarray]:
        """Start to copy a device array down behind the kernels launched so far; returns what waits for it."""
        host, mark = self._host.take(array.size), self._mark
        if not array.size:
            return lambda: host
        array.copy_to_host(host, stream=stream(self._on))
        self._host.used_on(self._on)
        mark.put(self._on)

        def arrived() -> np.ndarray:
            mark.wait()
            return host

        return arrived


def device_array(shape: int | tuple[int, ...], dtype):
    """New device memory, its contents undefined."""
    return cuda.device_array(shape, dtype)


def upload_array(array: np.ndarray):
    """The array on the device, in memory of its own, for the kernels launched from now on."""
    return cuda.to_device(array, stream=stream("compute"))


def download(array) -> np.ndarray:
    """The device array on the host, contiguous, once all kernels launched so far are done."""
    found = array.copy_to_host(stream=stream("compute"))
    stream("compute").synchronize()
    return np.ascontiguousarray(found)


def host_bytes(size: int) -> np.ndarray:
    """Host memory, uint8 [size], that the device copies from and to while the host does something else."""
    return cuda.pinned_array(size, np.uint8)


_computed = Mark()  # one is enough: a stream that waits for it waits for where it was put then


def fetch(array, host: np.ndarray, mark: Mark) -> Callable[[], None]:
    """Start to copy a device array to pinned `host`, behind the kernels launched so far. Returns what waits for it.

    `host` must be left alone until then, and so must the device array: `mark` is behind the copy.
    """
    _computed.put("compute").hold("down")
    array.copy_to_host(host, stream=stream("down"))
    mark.put("down")
    return mark.wait


def copy_now(array) -> np.ndarray:
    """The device array on the host, once kernels whose results somebody has waited for are done."""
    found = array.copy_to_host(stream=stream("down"))
    stream("down").synchronize()
    return found


def sorted_places(keys, count: int):
    """Places of the first `count` keys, uint64, in the keys' order: int64 [count] on the device, by CuPy's radix
    sort."""
    if config.ENABLE_CUDASIM:  # CuPy has no simulator
        return upload_array(np.argsort(keys.copy_to_host()[:count]))
    import cupy

    with cupy.cuda.ExternalStream(stream_handle("compute")):
        # Not through asarray(keys), which waits for the array's stream.
        memory = cupy.cuda.UnownedMemory(keys.device_ctypes_pointer.value, 8 * count, keys)
        order = cupy.argsort(cupy.ndarray(count, np.uint64, cupy.cuda.MemoryPointer(memory, 0)))
    return cuda.as_cuda_array(order, sync=False)
