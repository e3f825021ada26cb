"""The count pass: parse every day, code and count its values, store coded rows; from where an earlier run stopped."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from types import ModuleType

import numpy as np
from tqdm import tqdm

from gpu_etl.common.buffers import Pool, ScratchBuffer
from gpu_etl.common.threads import BackgroundWorker, side_by_side
from gpu_etl.passes import integrity
from gpu_etl.passes.bad_rows import BadRows
from gpu_etl.passes.buckets import Buckets
from gpu_etl.passes.coded_rows import KEYS, Spill
from gpu_etl.passes.journal import Journal
from gpu_etl.raw.reader import kind_of, read_day
from gpu_etl.raw.source import Slab, Source
from gpu_etl.rows import vocabulary
from gpu_etl.rows.numbered import first_number
from gpu_etl.rows.sampling import dropped_rows
from gpu_etl.rows.statistics import DayStatistics
from gpu_etl.schema import Preset

RECOUNT_ROWS = 1 << 15
OF_STORE = ("day", "keys", "keys_crc", "sum")  # of a slab's event: not for its day's tally
CODING = {"clamp": (0, 0), "plus2": (2, 0)}  # preset.dense -> shift, empty_value; "min" waits for the day's smallest


@dataclass(frozen=True)
class _DayEnd:
    day: int


class _Reading:
    """How days are read: one file of plain text after the other, each by all readers, or else a file a reader, as only
    plain text can be read from anywhere. at_once: files."""

    def __init__(self, kernels: ModuleType, sources: list[Source], slab_bytes: int, workers: int):
        self._kernels, self._slab_bytes, self._pool = kernels, slab_bytes, Pool(kernels.host_bytes)
        readers = max(1, int(workers / kernels.CORES_PER_READER))
        plain = all(kind_of(file.path) == "text" for source in sources for file in source.files)
        self.at_once, self._threads = (1, readers) if plain else (readers, 1)
        self._files_at_once = max(1, readers // max(1, len(sources))) if not plain else 1

    def slabs(self, source: Source, day: int, part: int, skip: int) -> Iterator[Slab | _DayEnd]:
        """Slabs of a day from `skip` of its file `part` on, ready to parse, and a _DayEnd behind them."""
        kernels = self._kernels
        yield from read_day(
            source, day, self._slab_bytes, skip, part=part, pool=self._pool, readers=kernels.readers(),
            prepare=lambda slab: slab.prepare(kernels), threads=self._threads, files_at_once=self._files_at_once,
            initializer=kernels.enter_thread,
        )  # fmt: skip
        yield _DayEnd(day)


class CountPass:
    """Runs the pass. tallies: one a day file; dictionary_bytes: memory of the dictionaries, known after run().

    bad_rows: "error" or "skip", up to max_bad_rows of them.

    to_buckets: of each day, whether its rows go into the shuffle's buckets, rather than into a file of its own. only:
    the one day to read, None for all; first_row: the number that its first row has in its day, where its source is a
    part of one. What an earlier run has done is read from the journal. sums: of each day, that of its coded rows'
    digests (see integrity.py). Raises WorkDamagedError where what is stored is not what the journal says.
    """

    def __init__(
        self, kernels: ModuleType, sources: list[Source], preset: Preset, seed: int, journal: Journal, work: Path,
        workers: int, bad_rows: str, max_bad_rows: int, to_buckets: list[bool], only: int | None = None,
        first_row: int = 0,
    ):  # fmt: skip
        self._kernels, self._preset, self._seed = kernels, preset, seed
        self._sources = [source.fresh() for source in sources]
        self._journal, self._bad_rows = journal, BadRows(bad_rows, max_bad_rows)
        self._workers, self.to_buckets, self._only, self._first_row = workers, to_buckets, only, first_row
        self.tallies = [DayStatistics() for _ in sources]
        self.dictionary_bytes = 0
        self._keys = keys_crc = 0
        self.sums = [0] * len(sources)
        for event in journal.all("slab"):
            self._keys, keys_crc = self._keys + event["keys"], event["keys_crc"]
            self.sums[event["day"]] = integrity.add(self.sums[event["day"]], event["sum"])
            self.tallies[event["day"]].add(**{key: value for key, value in event.items() if key not in OF_STORE})
        for event in journal.all("day"):
            self.tallies[event["day"]].crc32 = event["crc32"]
        kept = [tally.kept for tally in self.tallies]
        self.kept_in_buckets = [rows * inside for rows, inside in zip(kept, to_buckets, strict=True)]
        self.store = None  # of kept.py, where rows stay on the device
        self.spill = Spill(work, [a - b for a, b in zip(kept, self.kept_in_buckets, strict=True)], self._keys)
        integrity.expect(self.spill.keys_crc, keys_crc, work / KEYS, "the dictionaries' keys")

    @property
    def rows(self) -> int:
        """Rows kept so far, of all days."""
        return sum(tally.kept for tally in self.tallies)

    def run(self, slab_bytes: int, buckets: Buckets) -> vocabulary.Counts:
        """Read, parse, code, count and store what is left; returns the counts of everything, by dictionary code."""
        dictionaries, rows_before = self._dictionaries(buckets), self.rows
        host_bytes = self._kernels.host_bytes
        parsed, stored = ScratchBuffer(), cycle((ScratchBuffer(host_bytes), ScratchBuffer(host_bytes)))
        left = [
            (source, day, tally.part, tally.end)
            for day, (source, tally) in enumerate(zip(self._sources, self.tallies, strict=True))
            if tally.crc32 is None and self._only in (None, day)
        ]
        reading = _Reading(self._kernels, [source for source, *_ in left], slab_bytes, self._workers)
        waiting = [reading.slabs(*day) for day in left]
        size = sum(source.size for source in self._sources)
        with (
            tqdm(total=size, unit="B", unit_scale=True, desc="count ", file=sys.stderr) as bar,
            BackgroundWorker(self._kernels.enter_thread) as storing,
        ):
            items = side_by_side(waiting, reading.at_once, reading.at_once, self._kernels.enter_thread)
            for item in items:
                if isinstance(item, _DayEnd):
                    storing.submit(self._end_day(item.day))
                else:
                    for job in self._jobs(item, dictionaries, buckets, parsed, stored, bar):
                        storing.submit(job)
                rate = (self.rows - rows_before) / max(bar.format_dict["elapsed"], 1e-3)
                bar.set_postfix_str(f"{self.rows:,} rows, {rate:,.0f} rows/s", refresh=False)
                done = sum(s.size if t.crc32 else s.read for s, t in zip(self._sources, self.tallies, strict=True))
                bar.update(done - bar.n)
        self.spill.close()
        dictionaries.close()
        self.dictionary_bytes = dictionaries.nbytes
        return dictionaries.counts()

    def _jobs(
        self,
        slab: Slab | None,
        dictionaries,
        buckets: Buckets,
        parsed: ScratchBuffer,
        stored: Iterator[ScratchBuffer],
        bar: tqdm,
    ) -> Iterator[Callable[[], None]]:
        """What stores a slab: one job, but for a slab of more rows than good ones can be."""
        while slab is not None:
            yield self._take(slab, dictionaries, buckets, parsed, next(stored), bar)
            slab = slab.rest(self._kernels)

    def _end_day(self, day: int) -> Callable[[], None]:
        crc32 = f"{self._sources[day].crc32:08x}"
        self.tallies[day].crc32 = crc32
        return lambda: self._journal.record(day={"day": day, "crc32": crc32})

    def _dictionaries(self, buckets: Buckets):
        """New dictionaries, or those of an earlier run: their keys were stored, rows are counted again."""
        keys = self.spill.keys()
        dictionaries = self._kernels.Dictionaries(self._preset, self._workers, keys)
        limits = np.array([len(column) for column in keys])
        for coded, numbers in self.stored(buckets):
            integrity.check_codes(coded, limits, self.spill.folder)
            dictionaries.recount(coded, numbers)
        return dictionaries

    def stored(self, buckets: Buckets) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """All coded rows so far, int32 [n, 40], and their numbers int64 [n], some at a time; what they sum up to goes
        into buckets.sums. Raises WorkDamagedError behind the last where they are not those that the journal tells of.
        """
        for numbered in integrity.rows_of(buckets):
            yield numbered["coded"], numbered["row"]
        found = integrity.add(*buckets.sums.tolist())
        in_buckets = [sums * inside for sums, inside in zip(self.sums, self.to_buckets, strict=True)]
        integrity.expect(found, integrity.add(*in_buckets), self.spill.folder, "the rows in the shuffle's buckets")
        yield from self.spilled()

    def spilled(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The same of the rows in files of their days."""
        for day, (tally, inside) in enumerate(zip(self.tallies, self.to_buckets, strict=True)):
            found = 0
            for begin in range(0, 0 if inside else tally.kept, RECOUNT_ROWS):
                coded = self.spill.read(day, begin, min(begin + RECOUNT_ROWS, tally.kept))
                first = first_number(day) + self._first_row + begin
                found = integrity.add(found, integrity.rows_sum(coded, first))
                yield coded, np.arange(first, first + len(coded))
            if not inside:
                integrity.expect(found, self.sums[day], self.spill.folder / f"rows_{day}", "the coded rows")

    def _take(
        self, slab: Slab, dictionaries, buckets: Buckets, parsed: ScratchBuffer, stored: ScratchBuffer, bar: tqdm
    ) -> Callable[[], None]:
        """Parse, count and code a slab; returns what stores it and says so in the journal."""
        kernels = self._kernels
        values, missing, codes = slab.parse(kernels, parsed)
        tally = self.tallies[slab.day]
        dropped = self._drop_bad(slab, codes, bar)
        slab.release()
        keep = codes == 0
        preset = self._preset
        if preset.sample < 1 or preset.sample_last < 1 or preset.drop_negatives:
            last = slab.day == len(self._sources) - 1
            gone_by = dropped_rows(kernels.labels(values), preset, self._seed, slab.day, last, tally.read)
            for reason, gone in gone_by.items():
                dropped[reason] = int((gone & keep).sum())
                keep &= ~gone
        read = len(values)
        if not keep.all():
            values, missing = kernels.keep_rows(values, missing, keep)
        summary = kernels.summarize(values, missing)
        if preset.dense in CODING:
            kernels.integers(values, missing, *CODING[preset.dense])
        first = first_number(slab.day) + self._first_row + tally.kept
        if self.store is not None and not self.store.kept.has_room(len(values)):
            self.store.move_to_files(self, dictionaries.new_keys()())
            self.store = None
        dictionaries.code(values, missing, first)
        event = {
            "read": read, "kept": len(values), "part": slab.part, "end": slab.end, "dropped": dropped,
            **summary._asdict(),
        }  # fmt: skip
        tally.add(**event)
        if self.store is not None:
            self.store.kept.add(values, first)
            return lambda: None
        store = self._storing(slab.day, values, first, dictionaries.new_keys(), buckets, stored)
        return lambda: self._journal.record(slab={"day": slab.day, **store(), **event})

    def _storing(
        self,
        day: int,
        values: np.ndarray,
        first: int,
        keys: Callable[[], list[np.ndarray]],
        buckets: Buckets,
        memory: ScratchBuffer,
    ) -> Callable[[], dict[str, int]]:
        """What writes the coded rows and the new keys, and returns what the journal says of them: how many keys there
        were, the checksum of all keys so far, the sum of the rows' digests."""
        if self.to_buckets[day]:
            grouped = self._kernels.group(values, first, buckets.seed, len(buckets), memory)

            def write() -> int:
                numbered, ends = grouped()
                buckets.add(numbered, ends)
                return integrity.add_to_buckets(numbered, ends, buckets.sums)
        else:
            coded = self._kernels.rows_of(values, memory)

            def write() -> int:
                stored = coded()
                self.spill.add(day, stored)
                return integrity.rows_sum(stored, first)

        def store() -> dict[str, int]:
            found = write()
            self.sums[day] = integrity.add(self.sums[day], found)
            return {"sum": found, "keys": self.spill.add_keys(keys()), "keys_crc": self.spill.keys_crc}

        return store

    def _drop_bad(self, slab: Slab, codes: np.ndarray, bar: tqdm) -> dict[str, int]:
        """Bad rows of the slab by reason. Raises BadRowError where there may be none, or not so many."""
        return self._bad_rows.settle(
            slab, codes, where=partial(self._where, slab),
            before=sum(tally.bad_rows() for tally in self.tallies), say=partial(bar.write, file=sys.stderr),
        )  # fmt: skip

    def _where(self, slab: Slab, row: int) -> str:
        """File and row, counted from 1, of row `row` of a slab that was not yet added to its day's tally."""
        tally = self.tallies[slab.day]
        number = self._first_row + tally.read - tally.rows_before(slab.part) + row + 1
        return f"{self._sources[slab.day].files[slab.part].path}: row {number}"
