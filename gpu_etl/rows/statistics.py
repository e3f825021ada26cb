"""What a day file holds, added up slab by slab."""

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from gpu_etl.rows import faults
from gpu_etl.rows.scalar import INT32_MAX
from gpu_etl.schema import COLUMNS


class Summary(NamedTuple):
    """Of a slab: rows with label 1; rows with each of the 40 columns empty; its smallest integer (empty ones count as
    0), INT32_MAX where it has no rows."""

    clicks: int
    missing: list[int]
    smallest: int


@dataclass
class DayStatistics:
    """What is known of a day so far: rows read and kept, how many went and why; the place behind the last slab, which
    is `end` in its file `part`, and the rows read before that file; of the rows kept: those with label 1, those with
    each of the 40 columns missing, and the smallest integer (missing ones counting as 0); and, once the day was read to
    its end, the CRC-32 of its bytes."""

    read: int = 0
    kept: int = 0
    part: int = 0
    end: int = 0
    before_part: int = 0
    clicks: int = 0
    missing: np.ndarray = field(default_factory=lambda: np.zeros(COLUMNS, np.int64))
    smallest: int = INT32_MAX
    dropped: Counter = field(default_factory=Counter)
    crc32: str | None = None

    def add(
        self, read: int, kept: int, end: int, clicks: int, missing: list[int], smallest: int, dropped: dict,
        part: int = 0,
    ) -> None:  # fmt: skip
        """Take in a slab's event."""
        self.before_part, self.part = self.rows_before(part), part
        self.read, self.kept, self.end = self.read + read, self.kept + kept, end
        self.clicks, self.missing = self.clicks + clicks, self.missing + missing
        self.smallest = min(self.smallest, smallest)
        self.dropped.update(dropped)

    def rows_before(self, part: int) -> int:
        """How many rows of the day come before those of file `part`, which is the one that it is at, or the next."""
        return self.before_part if part == self.part else self.read

    def event(self) -> dict:
        """What add() takes to make this tally of an empty one, for JSON."""
        return {
            "read": self.read, "kept": self.kept, "part": self.part, "end": self.end, "clicks": self.clicks,
            "missing": self.missing.tolist(), "smallest": self.smallest, "dropped": dict(self.dropped),
        }  # fmt: skip

    def bad_rows(self) -> int:
        """Rows left out because they could not be parsed."""
        return sum(self.dropped[reason] for reason in faults.REASONS.values())

    def reasons(self) -> dict[str, int]:
        """Rows that went, by reason, without the reasons that did not occur."""
        return {reason: count for reason, count in sorted(self.dropped.items()) if count}
