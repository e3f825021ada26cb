"""What a run has done so far, as lines appended to a file, so that a killed run can go on."""

import fcntl
import json
import os
from pathlib import Path

from gpu_etl.errors import DataError


class Journal:
    """Events, each a small JSON object, in the order they were recorded; those of an earlier run come first.

    record() returns once the line is with the kernel, where it outlives this process. A last line that a kill cut short
    is dropped. Raises DataError while another process has the same journal open.
    """

    def __init__(self, path: Path):
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{path}: another run is at work there; wait for it, or choose another --out") from None
        self.events: list[dict] = []
        self._held: int | None = None
        whole = 0
        for line in path.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            self.events.append(json.loads(line))
            whole += len(line)
        os.truncate(path, whole)

    def record(self, **event) -> None:
        """Append an event. Everything it speaks of must have been written before."""
        self.events.append(event)
        if self._held is None:
            os.write(self._file, (json.dumps(event) + "\n").encode())

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

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)
