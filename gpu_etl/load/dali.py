"""The DALI loader: an NVIDIA DALI pipeline reads blocks ahead and unpacks them; the same batches as load/cpu.py.

One DALI sample is one block of rows, [B, 40]: with a row as the sample, the overhead per sample would be ten times
the work. The logarithm is left to the same function that the plain loader calls, so that the batches agree bit for bit.
"""

from collections.abc import Iterator

import torch
from nvidia.dali import fn, pipeline_def, types

from gpu_etl.load.batch import Batch, log_dense
from gpu_etl.load.cpu import CpuLoader
from gpu_etl.schema import FIRST_DENSE, FIRST_SPARSE

THREADS = 2


@pipeline_def
def _unpack(blocks: Iterator):
    block = fn.external_source(source=blocks, batch=True, dtype=types.INT32, ndim=2)
    dense = fn.cast(block[:, FIRST_DENSE:FIRST_SPARSE], dtype=types.FLOAT)
    return dense, block[:, FIRST_SPARSE:], fn.cast(block[:, 0], dtype=types.FLOAT)


class DaliLoader(CpuLoader):
    """Same interface and batches as CpuLoader; `prefetch` blocks are read and unpacked ahead.

    The pipeline runs on the CPU and its batches move to `device` one by one.
    """

    prefetch = 2

    def batches(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """The batches from number `start` of `epoch` on."""
        blocks = ([self.source.read(begin, end)] for begin, end in self.ranges(epoch, start))
        pipeline = _unpack(
            blocks, batch_size=1, num_threads=THREADS, device_id=None, prefetch_queue_depth=self.prefetch
        )  # fmt: skip
        pipeline.build()
        while True:
            try:
                outputs = pipeline.run()
            except StopIteration:
                return
            # DALI takes its buffers back with the next run; a batch must outlive it.
            dense, sparse, label = (torch.from_dlpack(output[0]).clone() for output in outputs)
            yield Batch(log_dense(dense), sparse, label).to(self.device)
