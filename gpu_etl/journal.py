"""What a run has done so far, as lines appended to a file, so that a killed run can go on."""

import fcntl
import json
import os
import sys
import zlib
from pathlib import Path

from gpu_etl.errors import DataError

CHAIN = ', "chain": "'


class Journal:
    """Events, each a small JSON object, in the order they were recorded; those of an earlier run come first.

    record() returns once the line is with the kernel, where it outlives this process. Every line ends with a CRC-32
    over itself and all lines before it: where a line is damaged or missing, that line and those behind it are dropped,
    which is said, and the run goes on as one that was killed there. A last line that a kill cut short is dropped.
    Raises DataError while another process has the same journal open.
    """

    def __init__(self, path: Path):
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._file)
            raise DataError(f"{path}: another run is at work there; wait for it, or choose another --out") from None
        self.events: list[dict] = []
        self._held: int | None = None
        self._crc32 = whole = 0
        for line in path.read_bytes().splitlines(keepends=True):
            event = self._parse(line)
            if event is None:
                if line.endswith(b"\n"):
                    print(
                        f"{path}: line {len(self.events) + 1} is damaged or out of its place; the run goes on from "
                        "what stands before it",
                        file=sys.stderr,
                    )
                break
            self.events.append(event)
            whole += len(line)
        os.truncate(path, whole)

    def _parse(self, line: bytes) -> dict | None:
        """The event of a line, or None where it is not what record() wrote behind the lines before it."""
        body, chain, crc32 = line.rpartition(CHAIN.encode())
        expected = zlib.crc32(body, self._crc32)
        if not chain or crc32 != f'{expected:08x}"}}\n'.encode():
            return None
        try:
            event = json.loads(body + b"}")
        except (ValueError, RecursionError):
            return None
        self._crc32 = expected
        return event

    def record(self, **event) -> None:
        """Append an event. Everything it speaks of must have been written before."""
        self.events.append(event)
        if self._held is None:
            self._write(event)

    def _write(self, event: dict) -> None:
        body = json.dumps(event, allow_nan=False)[:-1]
        self._crc32 = zlib.crc32(body.encode(), self._crc32)
        line = f'{body}{CHAIN}{self._crc32:08x}"}}\n'.encode()
        while line:  # a disk that is almost full takes a part, and raises only when asked again
            line = line[os.write(self._file, line) :]

    def hold(self) -> None:
        """From now on, remember events for this process alone: a later run does not go on where this one was."""
        self._held = len(self.events)

    def resume(self) -> None:
        """Forget what was recorded since hold(), and write what is recorded from now on."""
        del self.events[self._held :]
        self._held = None

    def all(self, key: str) -> list:
        """What the events that have `key` hold under it, in order."""
        return [event[key] for event in self.events if key in event]

    def clear(self) -> None:
        """Forget all events. The file stays, and stays locked."""
        os.ftruncate(self._file, 0)
        self.events, self._crc32, self._held = [], 0, None

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)
