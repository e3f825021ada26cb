"""The count pass: parse every day into the spill and count its values, from where an earlier run stopped."""

import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import numpy as np
from tqdm import tqdm

from gpu_etl import faults, vocabulary
from gpu_etl.errors import DataError
from gpu_etl.extract import Slab, Source, read_day
from gpu_etl.journal import Journal
from gpu_etl.prefetch import prefetch
from gpu_etl.rows import FAULT_STRIDE, INT32_MAX
from gpu_etl.sampling import dropped_rows
from gpu_etl.schema import FIRST_DENSE, FIRST_SPARSE, Preset
from gpu_etl.spill import Spill

SHOWN_BAD_ROWS = 5
RECOUNT_ROWS = 1 << 16


@dataclass
class Tally:
    """What is known of a day file so far: rows read and kept, how many went and why, the place behind the last slab,
    the smallest integer (missing ones counting as 0), and, once it was read to its end, the CRC-32 of its bytes."""

    read: int = 0
    kept: int = 0
    end: int = 0
    smallest: int = INT32_MAX
    dropped: Counter = field(default_factory=Counter)
    crc32: str | None = None

    def add(self, read: int, kept: int, end: int, smallest: int, dropped: dict) -> None:
        """Take in a slab's event."""
        self.read, self.kept, self.end = self.read + read, self.kept + kept, end
        self.smallest = min(self.smallest, smallest)
        self.dropped.update(dropped)

    def reasons(self) -> dict[str, int]:
        """Rows that went, by reason, without the reasons that did not occur."""
        return {reason: count for reason, count in sorted(self.dropped.items()) if count}


@dataclass(frozen=True)
class _DayEnd:
    day: int


def _read(sources: list[Source], tallies: list[Tally], slab_bytes: int) -> Iterator[Slab | _DayEnd]:
    """Slabs of all days not read yet, and a _DayEnd behind each day."""
    for day, (source, tally) in enumerate(zip(sources, tallies, strict=True)):
        if tally.crc32 is None:
            yield from read_day(source, day, slab_bytes, tally.end)
            yield _DayEnd(day)


class CountPass:
    """Runs the pass. tallies: one a day file. bad_rows: "error" or "skip", up to max_bad_rows of them."""

    def __init__(
        self, kernels: ModuleType, sources: list[Source], preset: Preset, seed: int, journal: Journal, work: Path,
        workers: int, bad_rows: str, max_bad_rows: int,
    ):  # fmt: skip
        self._kernels, self._sources, self._preset, self._seed = kernels, sources, preset, seed
        self._journal, self._bad_rows, self._max_bad_rows = journal, bad_rows, max_bad_rows
        self.tallies = [Tally() for _ in sources]
        for event in journal.all("slab"):
            self.tallies[event["day"]].add(**{key: value for key, value in event.items() if key != "day"})
        for event in journal.all("day"):
            self.tallies[event["day"]].crc32 = event["crc32"]
        self.spill = Spill(work, self.rows)
        self._counter = kernels.Counter(preset, workers)
        self._writer = ThreadPoolExecutor(1)

    @property
    def rows(self) -> int:
        """Rows kept so far, of all days."""
        return sum(tally.kept for tally in self.tallies)

    def run(self, slab_bytes: int) -> vocabulary.Counts:
        """Read, parse, spill and count what is left; returns the counts of everything."""
        self._recount()
        total = sum(source.size for source in self._sources)
        with tqdm(total=total, unit="B", unit_scale=True, desc="count ", file=sys.stderr) as bar:
            for item in prefetch(_read(self._sources, self.tallies, slab_bytes)):
                if isinstance(item, _DayEnd):
                    crc32 = f"{self._sources[item.day].crc32:08x}"
                    self.tallies[item.day].crc32 = crc32
                    self._journal.record(day={"day": item.day, "crc32": crc32})
                else:
                    self._take(item, bar)
                bar.set_postfix_str(f"{self.rows:,} rows", refresh=False)
                done = sum(s.size if t.crc32 else s.read for s, t in zip(self._sources, self.tallies, strict=True))
                bar.update(done - bar.n)
        self.spill.close()
        return self._counter.result()

    def _recount(self) -> None:
        """Count again what an earlier run has spilled: cheaper than to keep its tables on disk."""
        for begin in range(0, self.rows, RECOUNT_ROWS):
            end = min(begin + RECOUNT_ROWS, self.rows)
            self._counter.add(*self.spill.read(begin, end), begin)

    def _take(self, slab: Slab, bar: tqdm) -> None:
        values, missing, codes = slab.parse(self._kernels)
        tally = self.tallies[slab.day]
        dropped = self._drop_bad(slab, codes, bar)
        keep = codes == 0
        preset = self._preset
        if preset.sample < 1 or preset.sample_last < 1 or preset.drop_negatives:
            last = slab.day == len(self._sources) - 1
            for reason, gone in dropped_rows(values[:, 0], preset, self._seed, slab.day, last, tally.read).items():
                dropped[reason] = int((gone & keep).sum())
                keep &= ~gone
        read = len(values)
        if not keep.all():
            values, missing = values[keep], missing[keep]
        smallest = INT32_MAX
        if preset.dense == "min" and len(values):
            smallest = int(values[:, FIRST_DENSE:FIRST_SPARSE].view(np.int32).min())
        spilled = self._writer.submit(self.spill.add, values, missing)
        self._counter.add(values, missing, self.rows)
        spilled.result()
        event = {"read": read, "kept": len(values), "end": slab.end, "smallest": smallest, "dropped": dropped}
        self._journal.record(slab={"day": slab.day, **event})
        tally.add(**event)

    def _drop_bad(self, slab: Slab, codes: np.ndarray, bar: tqdm) -> dict[str, int]:
        """Bad rows of the slab by reason. Raises DataError where there may be none, or not so many."""
        bad = np.flatnonzero(codes)
        before = sum(tally.dropped[reason] for tally in self.tallies for reason in faults.REASONS.values())
        dropped: Counter = Counter(faults.REASONS[int(code)] for code in codes[bad] // FAULT_STRIDE)
        for place, row in enumerate(bad.tolist()):
            where = f"{self._sources[slab.day].path}: row {self.tallies[slab.day].read + row + 1}"
            words = f"{where}: {slab.describe(row, codes[row])}"
            if self._bad_rows == "error":
                raise DataError(f"{words}. Mend the file, or leave such rows out with --bad-rows skip")
            if before + place >= self._max_bad_rows:
                limit = self._max_bad_rows
                raise DataError(f"{words}. More than --max-bad-rows {limit} such rows; is this Criteo's format?")
            if before + place < SHOWN_BAD_ROWS:
                bar.write(f"left out: {words}", file=sys.stderr)
        return dict(dropped)
