"""Text on its way to a GPU, and the device memory that it lies in, which is used again."""

import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gpu_etl.backend.cuda.launch import Mark, budget, device_array, stream


@dataclass
class TextRoom:
    """Device memory for the text of a slab, uint8 [size]; arrived: behind its copy; free: behind its last reader."""

    bytes: Any
    size: int
    arrived: Mark = field(default_factory=Mark)
    free: Mark = field(default_factory=Mark)


class TextRooms:
    """Rooms that threads which read ahead take, and the parser's thread gives back."""

    def __init__(self):
        self._free: list[TextRoom] = []
        self._small: list[TextRoom] = []
        self._lock = threading.Lock()

    def take(self, size: int) -> TextRoom:
        """A room of `size` bytes or more. Its memory may still be read on the device: see TextRoom.free."""
        with self._lock:
            for place, room in enumerate(self._free):
                if room.size >= size:
                    return self._free.pop(place)
            # Too small for what is read now, and never to be used again. Numba frees in one thread at a time only, so
            # that is left to the one that gives back.
            self._small += self._free
            self._free = []
        size = 1 << (size - 1).bit_length()  # slabs differ by some bytes
        budget.take("text", size)
        return TextRoom(device_array(size, np.uint8), size)

    def give(self, room: TextRoom) -> None:
        """Give it back; nothing that starts later reads it."""
        with self._lock:
            self._free.append(room)
            small, self._small = self._small, []
        for room in small:
            room.free.wait()
            budget.take("text", -room.size)


text_rooms = TextRooms()


@dataclass
class DeviceText:
    """Text on the device: its first `size` bytes are a slab's, from `begin` on; last: the last byte. rows_end: how many
    bytes hold the rows that were parsed, behind parse()."""

    room: TextRoom
    size: int
    last: int
    begin: int = 0
    rows_end: int = 0

    @property
    def bytes(self):
        """The text and what there is behind it, uint8."""
        return self.room.bytes[self.begin :] if self.begin else self.room.bytes


def find_rows(text: np.ndarray) -> DeviceText | None:
    """Start to bring a slab of text, uint8 [bytes] in pinned memory, to the device, where parse() finds its rows.

    The CPU's twin finds them; both run in the thread that reads ahead.
    """
    if not len(text):
        return None
    room = text_rooms.take(len(text))
    room.free.hold("up")
    room.bytes[: len(text)].copy_to_device(text, stream=stream("up"))
    room.arrived.put("up")
    return DeviceText(room, len(text), int(text[-1]))
