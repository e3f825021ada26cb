"""Coded rows that stay in device memory between the passes, where all of them fit."""

from collections.abc import Iterator

import numpy as np
from numba import cuda

from gpu_etl.cuda_encode import NOWHERE, PLACES, WORDS, keys_there, number_rows, words_of
from gpu_etl.cuda_kernel import blocks_for, kernel
from gpu_etl.cuda_launch import Input, Memory, budget, download, launch, sorted_places
from gpu_etl.cuda_rows import Rows
from gpu_etl.numbered import NUMBERED

SORT_BYTES = 5 * 8  # of a row: its key, its place, and what sorting takes beside them
SHARE = 0.6  # of the memory left: the rest is for the dictionaries and for slabs
CHUNK_ROWS = 1 << 18


@kernel(PLACES, "int64", PLACES, PLACES, "int64")
def _to_places(order, count, ends, begins, ranges):
    """order[i], the number of a row among those of some ranges, becomes its place: ranges r are begins[r] onwards, and
    hold together ends[r] rows with those before."""
    i = cuda.grid(1)
    if i < count:
        row, low, high = order[i], 0, ranges - 1
        while low < high:
            middle = (low + high) // 2
            if ends[middle] <= row:
                low = middle + 1
            else:
                high = middle
        before = np.int64(0)
        if low > 0:
            before = ends[low - 1]
        order[i] = begins[low] + row - before


class Kept:
    """Numbered coded rows on the device, in the order in which they came.

    spans: (number of the first row, its place, rows) of what came together. `room` rows find place.
    """

    def __init__(self, room: int):
        self._memory = Memory("coded rows", np.uint32, WORDS)
        self.words, self._room, self.count = self._memory.take(room), room, 0
        self.spans: list[tuple[int, int, int]] = []
        self._ends, self._begins = Input("coded rows", np.int64), Input("coded rows", np.int64)

    def has_room(self, rows: int) -> bool:
        """Whether so many more rows find place."""
        return self.count + rows <= self._room

    def add(self, values: Rows, first_row: int) -> None:
        """Keep a coded slab, numbered from first_row on, for which there is room."""
        if len(values):
            number_rows(values, first_row, self.words, self.count)
            self.spans.append((first_row, self.count, len(values)))
            self.count += len(values)

    def ranges(self, first: int, end: int) -> list[tuple[int, int]]:
        """Places (begin, end) of the rows with numbers first to end, in the order of their numbers."""
        found: list[tuple[int, int]] = []
        for number, place, count in sorted(self.spans):
            begin, stop = max(first, number), min(end, number + count)
            if begin < stop:
                begin, stop = begin - number + place, stop - number + place
                if found and found[-1][1] == begin:
                    begin = found.pop()[0]
                found.append((begin, stop))
        return found

    def shuffled(self, ranges: list[tuple[int, int]], seed: int):
        """Places of the rows of some ranges in the order of their sort keys, int64 [n] on the device."""
        count = sum(end - begin for begin, end in ranges)
        if not count:
            return NOWHERE.take(1)
        order = sorted_places(keys_there(self.words, ranges, seed), count)
        if ranges != [(0, count)]:
            ends, begins = np.cumsum([end - begin for begin, end in ranges]), np.array([begin for begin, _ in ranges])
            launch(
                _to_places, blocks_for(count), order, count, self._ends.put(ends), self._begins.put(begins), len(ranges)
            )
        return order

    def numbered(self) -> Iterator[tuple[int, np.ndarray]]:
        """All rows, some at a time, of one span each: the number of the first, and NUMBERED [n] on the host."""
        for number, place, count in self.spans:
            for begin in range(0, count, CHUNK_ROWS):
                end = min(begin + CHUNK_ROWS, count)
                rows = np.empty(end - begin, NUMBERED)
                words_of(rows)[:] = download(self.words[place + begin : place + end])
                yield number + begin, rows

    def release(self) -> None:
        """Give the memory back. Nothing that uses it may be under way; else wait for all that is."""
        self._memory.release(wait=True)


def keep(rows: int) -> Kept | None:
    """Device memory for about so many rows, as far as that is known; None where they would leave too little of it."""
    room = int(budget.left() * SHARE / (NUMBERED.itemsize + SORT_BYTES))
    if room < rows + rows // 8 or not rows:
        return None
    return Kept(min(room, rows + rows // 4))
