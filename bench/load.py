"""Data set -> batches: the plain loader, DALI, and a DataLoader that takes one row at a time."""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from gpu_etl.load.batch import make_batch
from gpu_etl.load.cpu import CpuLoader
from gpu_etl.load.dali import DaliLoader
from gpu_etl.load.dataset import RecordFile
from gpu_etl.schema import COLUMNS, RECORD_DTYPE

PER_ROW_LIMIT = 20_000  # rows: the slow one is not read to its end


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of this benchmark."""
    parser.add_argument("--rows", type=int, default=2_000_000, metavar="N", help="records to read (default: 2,000,000)")
    parser.add_argument("--batch_size", type=int, nargs="+", default=[2048, 16384, 65536], metavar="B")
    parser.add_argument("--repeat", type=int, default=5, metavar="N", help="passes, of which the median counts")


class _Rows(torch.utils.data.Dataset):
    """One row a time, as a first attempt would write it."""

    def __init__(self, source: RecordFile):
        self._source = source

    def __len__(self) -> int:
        return min(self._source.rows, PER_ROW_LIMIT)

    def __getitem__(self, row: int):
        columns = map(torch.from_numpy, self._source.columns(row, row + 1))
        return tuple(tensor[0] for tensor in make_batch(*columns, logged=False))


def _median_rate(batches, rows: int, repeat: int) -> float:
    """Median rows/s of reading all batches, after one pass to warm up."""
    seconds = []
    for _ in range(repeat + 1):
        start = time.perf_counter()
        for _batch in batches():
            pass
        seconds.append(time.perf_counter() - start)
    return rows / statistics.median(seconds[1:])


def measure(args: argparse.Namespace) -> dict:
    """Millions of rows/s per loader and batch size, from the page cache, on the CPU."""
    cpu = torch.device("cpu")
    rates = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "records.bin"
        records = np.random.default_rng(0).integers(0, 1 << 20, (args.rows, COLUMNS), RECORD_DTYPE)
        records[:, 0] &= 1
        records.tofile(path)
        source = RecordFile(path)
        for batch_size in args.batch_size:
            plain = CpuLoader(source, batch_size, cpu, shuffle=True)
            dali = DaliLoader(source, batch_size, cpu, shuffle=True)
            rows = torch.utils.data.DataLoader(_Rows(source), batch_size)
            found = {
                "batch_size": batch_size,
                "plain": _median_rate(plain.batches, source.rows, args.repeat) / 1e6,
                "dali": _median_rate(dali.batches, source.rows, args.repeat) / 1e6,
                "per_row": _median_rate(lambda rows=rows: rows, len(rows.dataset), 1) / 1e6,
            }
            print({name: round(value, 3) for name, value in found.items()}, file=sys.stderr)
            rates.append(found)
    return {"rows": args.rows, "million_rows_per_second": rates}
