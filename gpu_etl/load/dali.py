"""The DALI loader: an NVIDIA DALI pipeline moves blocks to the device; the same batches as load/cpu.py.

One DALI sample is one unit of packed rows, int32 [n, 40], in memory that the reader filled and that DALI takes as it is
(no_copy): with a row as the sample, the overhead per sample would be ten times the work. On a GPU the pipeline copies
it on a stream of its own, ahead of what is asked for, and hands it to torch by DLPack on the loader's stream: no step
waits on the host. Without a GPU the same pipeline runs on the CPU and hands the block through. Unpacking is left to the
functions that the plain loader calls, so that the batches agree bit for bit.
"""

from collections import deque
from collections.abc import Iterator, Sequence

import torch

from gpu_etl.common.packages import require
from gpu_etl.load.batch import Batch
from gpu_etl.load.loader import BlockReader, Loader, Slot, Unpacking, unpacked
from gpu_etl.load.order import Unit

THREADS = 2


class _Feed:
    """What a pipeline takes in; `blocks` of another epoch may follow where those of one have ended."""

    blocks: Iterator[list]

    def __call__(self) -> list:
        return next(self.blocks)


def _pass_on(feed: _Feed, to_gpu: bool, **settings):
    """A pipeline that hands blocks on; settings: DALI's own, of any pipeline."""
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(**settings)
    def pass_on():
        block = fn.external_source(source=feed, batch=True, no_copy=True, dtype=types.INT32, ndim=2)
        return block.gpu() if to_gpu else block

    return pass_on()


class DaliLoader(Loader):
    """Same interface and batches as CpuLoader. Raises DataError where DALI is not installed."""

    name = "DALI"

    def __init__(self, *settings, **more):
        require("nvidia.dali", "--loader dali", "--loader cpu, which gives the same batches")
        super().__init__(*settings, **more)
        self._spare_pipelines: list[tuple] = []

    def __str__(self) -> str:
        return super().__str__() + ("" if self._stream else ", by DALI's CPU pipeline")

    def _pipeline(self):
        """A pipeline and its feed: those of the epoch before, where it came to its end, as building costs some ten
        milliseconds."""
        if self._spare_pipelines:
            return self._spare_pipelines.pop()
        feed = _Feed()
        built = _pass_on(
            feed, self._stream is not None, batch_size=1, num_threads=THREADS, device_id=self.device.index,
            prefetch_queue_depth=self.ahead,
        )  # fmt: skip
        return built, feed

    def _made(self, epoch: int, start: int) -> Iterator[tuple[Sequence[int], Batch]]:
        # The pipeline holds self.ahead blocks; the one it gave out last may still be copied when the next is filled.
        with self._slots(self.ahead + 1) as slots:
            free, fed = deque(slots), deque()
            pipeline, feed = self._pipeline()
            feed.blocks = self._filled(self.order.units(epoch, start), free, fed)
            make, ended = self._on_gpu if self._stream else self._on_cpu(), False
            try:
                while True:
                    try:
                        (output,) = pipeline.run(self._stream)
                    except StopIteration:
                        ended = True
                        return
                    unit, slot, picks = fed.popleft()
                    yield from make(unit, slot, picks, output)
                    free.append(slot)
            finally:
                if self._stream:  # slots outlive the copies out of them: where this ends early, all that are under way
                    (self._stream if ended else torch.cuda).synchronize()
                if ended:  # else it holds blocks of an epoch that nobody wants any more
                    pipeline.reset()
                    self._spare_pipelines.append((pipeline, feed))

    def _filled(self, units: Iterator[Unit], free: deque[Slot], fed: deque) -> Iterator[list]:
        """What DALI takes in: a batch of one sample, the block of a unit. Notes in `fed` which slot holds it."""
        reader = BlockReader(self.source)
        for unit in units:
            slot = free.popleft()
            slot.take()
            block, picks = slot.fill(unit, reader)
            fed.append((unit, slot, picks))
            yield [block.numpy()]

    def _on_gpu(self, unit: Unit, slot: Slot, picks: torch.Tensor | None, output):
        with torch.cuda.stream(self._stream):
            block = torch.from_dlpack(output[0])
            whole = unpacked(block, picks, self.source, self._bounds)
            # The loader's stream has waited for DALI's copy: past this event, nobody reads the slot or the block.
            slot.give_back(self._stream.record_event(), block)
        yield unit.sizes, whole

    def _on_cpu(self):
        unpacking = Unpacking(self.source, self._memory)

        def make(unit: Unit, slot: Slot, picks: torch.Tensor | None, output):
            block = torch.from_dlpack(output[0]).numpy()
            yield from unpacking.batches(unit, block, None if picks is None else picks.numpy())
            slot.give_back()

        return make
