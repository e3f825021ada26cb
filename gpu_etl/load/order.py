"""Which rows come when: the order of batches and rows in an epoch, and a rank's share of every batch.

Everything follows from the split's size, the settings, the epoch and the batch's number, so that a position to resume
at is just (epoch, number), and every loader, device and number of ranks sees the same global batches.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gpu_etl.common.jit import compiled
from gpu_etl.load.batch import batch_ranges, rank_range
from gpu_etl.rows.random_keys import mix64, row_keys

ROUNDS = 6  # of the Feistel network: with 4, which rows become neighbours is not quite random in windows of 400 rows
ABREAST = 512  # pairs that go through it side by side
UNIT_ROWS = 1 << 15  # rows read at once where batches are small: each read costs a hand-over between threads
GPU_UNIT_ROWS = 1 << 17  # the same for a GPU: some hundred microseconds of Python a unit, in which it takes more rows
ROW_SHUFFLE = 1 << 40  # key numbers of windows, beyond those of epochs


@compiled
def _add(random, part, limit):
    """(part + a number below limit from 64 random bits) modulo limit; limit < 2^32."""
    part += np.int64((random >> np.uint64(32)) * np.uint64(limit) >> np.uint64(32))
    return part - limit if part >= limit else part


@compiled
def _permute(keys, rows, first, places):
    """places[i] = where number first + i goes in the permutation of 0 .. rows - 1 that the keys make.

    A Feistel network over pairs (a, b), a < height, b < width, whose number is a * width + b, adding modulo height and
    width in turn (Black, Rogaway 2002). The few pairs beyond `rows` are sent through again until they land below. Some
    hundred pairs go through each round together, so that the processor takes eight at a time: 7 ns in place of 25.
    """
    width = np.int64(np.ceil(np.sqrt(np.float64(rows))))
    height = (rows + width - 1) // width
    memory = np.empty((2, ABREAST), np.int64)
    for low in range(0, len(places), ABREAST):
        count = min(ABREAST, len(places) - low)
        a, b = memory[0, :count], memory[1, :count]
        row, column = (first + low) // width, (first + low) % width
        for i in range(count):
            a[i], b[i] = row, column
            column += 1
            if column == width:
                row, column = row + 1, 0
        for r in range(0, len(keys), 2):
            for i in range(count):
                a[i] = _add(mix64(np.uint64(b[i]) + keys[r]), a[i], height)
            for i in range(count):
                b[i] = _add(mix64(np.uint64(a[i]) + keys[r + 1]), b[i], width)
        for i in range(count):
            number = a[i] * width + b[i]
            while number >= rows:
                row, column = number // width, number % width
                for r in range(0, len(keys), 2):
                    row = _add(mix64(np.uint64(column) + keys[r]), row, height)
                    column = _add(mix64(np.uint64(row) + keys[r + 1]), column, width)
                number = row * width + column
            places[low + i] = number


def permuted(seed: int, rows: int, first: int, count: int) -> np.ndarray:
    """Places first to first + count of a seeded random permutation of 0 .. rows - 1 (rows < 2^62), int64 [count].

    Any stretch of it costs only itself: 7 ns a place.
    """
    places = np.empty(count, np.int64)
    _permute(row_keys(seed, 0, ROUNDS), rows, first, places)
    return places


@dataclass(frozen=True)
class Unit:
    """What is read at once.

    reads: row ranges (begin, end) of the split, to be laid one behind the other; sizes: rows of each batch of the unit;
    picks: int64 [sum(sizes)], the place of each row of the batches in what was read; None: they are just in order.
    """

    reads: tuple[tuple[int, int], ...]
    sizes: tuple[int, ...]
    picks: np.ndarray | None = None

    @property
    def rows_read(self) -> int:
        """Rows of all reads together."""
        return sum(end - begin for begin, end in self.reads)

    def rows(self) -> np.ndarray:
        """The split's row number of each row of the batches, int64 [sum(sizes)]."""
        read = np.concatenate([np.arange(begin, end) for begin, end in self.reads])
        return read if self.picks is None else read[self.picks]


@dataclass(frozen=True)
class Order:
    """The order of a split's rows, and what of it is `rank`'s.

    A global batch is `batch_size` consecutive rows; with `shuffle`, full batches come in a new order each epoch. With a
    `buffer` (rows) of more than one batch, so many batches that follow one another in that order (rounded up) make a
    window, whose rows are permuted; the batches are then cut from it. The short last batch comes last, and is in the
    last window. Each batch is cut into `world` shares (rank_range). unit_rows: about how many are read at once.
    """

    rows: int
    batch_size: int
    shuffle: bool = False
    seed: int = 0
    buffer: int = 0
    rank: int = 0
    world: int = 1
    unit_rows: int = UNIT_ROWS

    def __len__(self) -> int:
        return -(-self.rows // self.batch_size)

    @property
    def window(self) -> int:
        """Batches that exchange rows; 1: none do."""
        return max(1, -(-self.buffer // self.batch_size))

    def ranges(self, epoch: int, start: int = 0) -> list[tuple[int, int]]:
        """Row ranges of the global batches from number `start` of `epoch` on, before rows change places."""
        return batch_ranges(self.rows, self.batch_size, self.shuffle, self.seed, epoch)[start:]

    def units(self, epoch: int, start: int = 0, in_memory: bool = False) -> Iterator[Unit]:
        """What to read for the batches from number `start` of `epoch` on; nothing else is read.

        With a window, all of it is read by each rank, as a batch needs rows from everywhere in it. in_memory: reading
        costs nothing, so units are small even where a window is large.
        """
        ranges = batch_ranges(self.rows, self.batch_size, self.shuffle, self.seed, epoch)
        few = max(1, self.unit_rows * self.world // self.batch_size)
        if self.window > 1:
            yield from self._windows(ranges, epoch, start, few if in_memory else self.window)
            return
        for first in range(start, len(ranges), few):
            reads = tuple(self._share(*of) for of in ranges[first : first + few])
            yield Unit(reads, tuple(end - begin for begin, end in reads))

    def _share(self, begin: int, end: int) -> tuple[int, int]:
        return rank_range(begin, end, self.rank, self.world)

    def _windows(self, ranges, epoch: int, start: int, at_once: int) -> Iterator[Unit]:
        epoch_seed = int(row_keys(self.seed, epoch, 1)[0])
        for window in range(start // self.window, -(-len(ranges) // self.window)):
            first = window * self.window
            reads = tuple(ranges[first : first + self.window])
            rows = sum(end - begin for begin, end in reads)
            seed = int(row_keys(epoch_seed, ROW_SHUFFLE + window, 1)[0])
            numbers = range(max(start - first, 0), len(reads))
            for some in (numbers[i : i + at_once] for i in range(0, len(numbers), at_once)):
                cuts = [self._share(n * self.batch_size, min((n + 1) * self.batch_size, rows)) for n in some]
                picks = [permuted(seed, rows, begin, end - begin) for begin, end in cuts]
                yield Unit(reads, tuple(map(len, picks)), np.concatenate(picks))
