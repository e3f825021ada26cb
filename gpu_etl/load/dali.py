"""The DALI loader: an NVIDIA DALI pipeline reads blocks ahead and unpacks them; the same batches as load/cpu.py.

One DALI sample is one block of rows, [B, 40] of records or the three arrays of a split form: with a row as the sample,
the overhead per sample would be ten times the work. The logarithm is left to the same function that the plain loader
calls, so that the batches agree bit for bit.
"""

from collections.abc import Iterator

import torch
from nvidia.dali import fn, pipeline_def, types

from gpu_etl.load.batch import Batch, make_batch
from gpu_etl.load.cpu import CpuLoader
from gpu_etl.load.dataset import RecordFile
from gpu_etl.schema import FIRST_DENSE, FIRST_SPARSE

THREADS = 2


@pipeline_def
def _unpack(blocks: Iterator):
    block = fn.external_source(source=blocks, batch=True, dtype=types.INT32, ndim=2)
    dense = fn.cast(block[:, FIRST_DENSE:FIRST_SPARSE], dtype=types.FLOAT)
    return dense, block[:, FIRST_SPARSE:], fn.cast(block[:, 0], dtype=types.FLOAT)


@pipeline_def
def _pass_on(blocks: Iterator):
    dtypes = [types.FLOAT, types.INT32, types.FLOAT]
    return tuple(fn.external_source(source=blocks, num_outputs=3, batch=True, dtype=dtypes, ndim=[2, 2, 1]))


class DaliLoader(CpuLoader):
    """Same interface and batches as CpuLoader; `prefetch` blocks are read and unpacked ahead.

    The pipeline runs on the CPU and its batches move to `device` one by one.
    """

    prefetch = 2

    def _pipeline(self, ranges: list[tuple[int, int]]):
        settings = {"batch_size": 1, "num_threads": THREADS, "device_id": None, "prefetch_queue_depth": self.prefetch}
        if isinstance(self.source, RecordFile):
            return _unpack(([self.source.read(begin, end)] for begin, end in ranges), **settings)
        columns = (self.source.columns(begin, end) for begin, end in ranges)
        return _pass_on((tuple([array] for array in arrays) for arrays in columns), **settings)

    def batches(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """The batches from number `start` of `epoch` on."""
        pipeline = self._pipeline(self.rank_ranges(epoch, start))
        pipeline.build()
        while True:
            try:
                outputs = pipeline.run()
            except StopIteration:
                return
            # DALI takes its buffers back with the next run; a batch must outlive it.
            columns = (torch.from_dlpack(output[0]).clone() for output in outputs)
            yield make_batch(*columns, logged=self.source.logged).to(self.device)
