"""Coded rows that stay in the device's memory between the passes: nothing of them is written but the final files.

A run that is killed begins anew. Where more rows come than were expected, those on the device go into files, and the
run goes on as one that never kept any.
"""

import sys

import numpy as np
from tqdm import tqdm

from gpu_etl.common.buffers import ScratchBuffer
from gpu_etl.common.threads import BackgroundWorker
from gpu_etl.dataset import formats
from gpu_etl.passes import integrity
from gpu_etl.passes.buckets import Buckets
from gpu_etl.passes.coded_rows import Spill
from gpu_etl.passes.count import CountPass
from gpu_etl.passes.encode import EncodePass, pieces
from gpu_etl.passes.journal import Journal
from gpu_etl.rows.numbered import DAY_SHIFT, first_number, group

KEPT = "kept_on_device"


def begin(kernels, journal: Journal, rows: int):
    """Memory of the device for about so many rows, or None: where they do not fit, and where an earlier run has left
    rows in files."""
    if journal.all("slab") or journal.all("counted"):
        return None
    if journal.all(KEPT):
        print("the run before kept its rows on the device: begins anew", file=sys.stderr)
    kept = kernels.keep(rows)
    if kept is not None:
        if not journal.all(KEPT):
            journal.record(**{KEPT: True})
        journal.hold()
    return kept


class Store:
    """Where a count pass keeps its rows on the device, and how they leave it."""

    def __init__(self, kept, journal: Journal, spill: Spill, buckets: Buckets, to_buckets: list[bool]):
        self.kept, self._journal, self._spill = kept, journal, spill
        self._buckets, self._to_buckets = buckets, to_buckets

    def move_to_files(self, counting: CountPass, keys: list[np.ndarray]) -> None:
        """Write all rows and the dictionaries' keys, and into the journal what there is of each day."""
        print("more rows than were expected: those on the device go into files", file=sys.stderr)
        memory, seed = ScratchBuffer(), self._buckets.seed
        for first, numbered in self.kept.numbered():
            coded, day = np.ascontiguousarray(numbered["coded"]), first >> DAY_SHIFT
            if self._to_buckets[day]:
                grouped, ends = group(coded, first, seed, len(self._buckets), memory)
                self._buckets.add(grouped, ends)
                found = integrity.add_to_buckets(grouped, ends, self._buckets.sums)
            else:
                self._spill.add(day, coded)
                found = integrity.rows_sum(coded, first)
            counting.sums[day] = integrity.add(counting.sums[day], found)
        self.kept.release()
        self._journal.resume()
        stored = {"keys": self._spill.add_keys(keys), "keys_crc": self._spill.keys_crc}
        for day, tally in enumerate(counting.tallies):
            if tally.read:
                self._journal.record(slab={"day": day, "sum": counting.sums[day], **stored, **tally.event()})
                stored["keys"] = 0
            if tally.crc32 is not None:
                self._journal.record(day={"day": day, "crc32": tally.crc32})


class KeptEncodePass(EncodePass):
    """The encode pass over rows that are on the device."""

    def __init__(self, kept, seed: int, *arguments):
        super().__init__(*arguments)
        self._kept, self._seed = kept, seed

    def run(self, split: str, begin: int, end: int, shuffled: bool) -> None:
        """See EncodePass."""
        ranges = []
        for piece in pieces(self._day_rows, begin, end, max(1, end - begin)):
            first = first_number(piece.day)
            ranges += self._kept.ranges(first + piece.begin, first + piece.end)
        with (
            tqdm(total=end - begin, unit="rows", unit_scale=True, desc=f"encode {split:5}", file=sys.stderr) as bar,
            formats.SplitWriter(self._form, self._work, split, self._table_sizes, 0, self._buckets.crew) as writer,
        ):
            with BackgroundWorker(self._kernels.enter_thread) as writing:
                for finished in self._finished(ranges, shuffled, bar):
                    writing.submit(lambda finished=finished: writer.write(finished()))
            files = writer.described()
        # No sum of the rows' digests: they have been nowhere that is checked by it.
        self._journal.record(split={"name": split, "files": files, "sum": 0})

    def _finished(self, ranges: list[tuple[int, int]], shuffled: bool, bar: tqdm):
        """What gives the records of the rows of some ranges, some at a time."""
        step, words = self._kernels.ENCODE_ROWS, self._kept.words
        if shuffled:
            self._finisher.take_there(words, order=self._kept.shuffled(ranges, self._seed))
            rows = sum(end - begin for begin, end in ranges)
            for begin in range(0, rows, step):
                yield self._finish(begin, min(begin + step, rows), bar)
            return
        for place, stop in ranges:
            self._finisher.take_there(words, place)
            for begin in range(0, stop - place, step):
                yield self._finish(begin, min(begin + step, stop - place), bar)
