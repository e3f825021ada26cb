"""What every launch of a kernel needs: streams, copies between host and device, and how much memory the device gives.

Kernels, and copies that they wait for, run on the stream "compute"; text goes up on "up" while an earlier slab is
computed on, and rows come back on "down" while a later one is. Small arrays are copied at once.
"""

from collections.abc import Callable
from functools import cache

import numpy as np
from numba import config, cuda

from gpu_etl.errors import DeviceMemoryError

THREADS = 128  # a block


@cache
def stream(name: str):
    """The stream of that name; made at first use, as there is no GPU where kernels are only compiled."""
    return cuda.stream()


def blocks_for(threads: int) -> int:
    """Blocks of THREADS that hold so many threads; at least 1."""
    return max(1, -(-threads // THREADS))


def launch(kernel, blocks: int | tuple[int, int], *arguments) -> None:
    """Start a kernel in blocks of THREADS, behind what was started before."""
    kernel[blocks, THREADS, stream("compute")](*arguments)


def empty(shape: int | tuple[int, ...], dtype, order: str = "C"):
    """An array on the device, its contents undefined."""
    return cuda.device_array(shape, dtype, order=order, stream=stream("compute"))


def upload_array(array: np.ndarray):
    """The array on the device, for the kernels launched from now on."""
    return cuda.to_device(array, stream=stream("compute"))


def download(array) -> np.ndarray:
    """The device array on the host, contiguous, once all kernels launched so far are done."""
    found = array.copy_to_host(stream=stream("compute"))
    stream("compute").synchronize()
    return np.ascontiguousarray(found)


def host_bytes(size: int) -> np.ndarray:
    """Host memory, uint8 [size], that the device copies from and to while the host does something else."""
    return cuda.pinned_array(size, np.uint8)


class Behind:
    """All that was started so far on a stream."""

    def __init__(self, name: str):
        self._event = cuda.event()
        self._event.record(stream(name))

    def wait(self, name: str) -> None:
        """Let what is started from now on on the stream `name` wait for it."""
        self._event.wait(stream(name))

    def synchronize(self) -> None:
        """Wait for it here."""
        self._event.synchronize()


def fetch(array, host: np.ndarray) -> Callable[[], None]:
    """Start to copy a device array to `host`, behind the kernels launched so far. Returns what waits for the end.

    The result keeps the array from being freed; `host` must be left alone until then.
    """
    Behind("compute").wait("down")
    array.copy_to_host(host, stream=stream("down"))
    arrived = Behind("down")

    def wait() -> None:
        assert array is not None
        arrived.synchronize()

    return wait


class Upload:
    """Host memory on its way to the device: bytes uint8 [n], pinned, copied into `room`, uint8 [n or more]. last: the
    last byte."""

    def __init__(self, host: np.ndarray, room):
        self.room, self.bytes, self.last = room, room[: len(host)], int(host[-1])
        self.bytes.copy_to_device(host, stream=stream("up"))
        self._arrived = Behind("up")

    def wait(self) -> None:
        """Let the kernels launched from now on wait for it."""
        self._arrived.wait("compute")


def sorted_places(keys) -> object:
    """Places of keys, uint64 [n] on the device, in the keys' order: int64 [n] on the device, by CuPy's radix sort."""
    if config.ENABLE_CUDASIM:  # CuPy has no simulator
        return upload_array(np.argsort(download(keys)))
    import cupy

    with cupy.cuda.ExternalStream(stream("compute").handle.value):
        return cuda.as_cuda_array(cupy.argsort(cupy.asarray(keys)))


class Budget:
    """Device memory by use, held under `limit` bytes (0: none); peak: the most that was in use together."""

    def __init__(self):
        self.limit, self.peak = 0, 0
        self._parts: dict[str, int] = {}

    def take(self, name: str, size: int) -> None:
        """`name` is about to take `size` bytes in place of what it had. Raises DeviceMemoryError beyond the limit."""
        together = sum(self._parts.values()) - self._parts.get(name, 0) + size
        if self.limit and together > self.limit:
            raise DeviceMemoryError(
                f"--memory-limit {self.limit}: {name} take {size:,} bytes of device memory, {together:,} together with "
                "the rest; raise it, lower --slab-bytes, or use --device cpu"
            )
        self._parts[name] = size
        self.peak = max(self.peak, together)

    def take_more(self, name: str, size: int) -> None:
        """The same of bytes beside those that `name` has."""
        self.take(name, self._parts.get(name, 0) + size)


budget = Budget()


def text_room(size: int):
    """Device memory for text, uint8 [size], that threads may copy to."""
    budget.take_more("text", size)
    room = cuda.device_array(size, np.uint8)
    # What had this memory before may still be computed on, and the stream "up" does not wait for that.
    stream("compute").synchronize()
    return room
