"""The DALI loader: an NVIDIA DALI pipeline moves blocks to the device; the same batches as load/cpu.py.

One DALI sample is one unit of packed rows, int32 [n, 40], in memory that the reader filled and that DALI takes as it is
(no_copy): with a row as the sample, the overhead per sample would be ten times the work. On a GPU the pipeline copies
it on a stream of its own, ahead of what is asked for, and hands it to torch by DLPack on the loader's stream: no step
waits on the host. Without a GPU the same pipeline runs on the CPU and hands the block through. Unpacking is left to the
functions that the plain loader calls, so that the batches agree bit for bit.
"""

from collections import deque
from collections.abc import Iterator

import torch
from nvidia.dali import fn, pipeline_def, types

from gpu_etl.load.batch import Batch
from gpu_etl.load.loader import BlockReader, Loader, Slot, unpacked
from gpu_etl.load.order import Unit
from gpu_etl.load.unpack import BatchMemory, Unpacker

THREADS = 2
DEPTH = 2  # blocks that the pipeline holds ahead


@pipeline_def
def _pass_on(blocks: Iterator, to_gpu: bool):
    block = fn.external_source(source=blocks, batch=True, no_copy=True, dtype=types.INT32, ndim=2)
    return block.gpu() if to_gpu else block


class DaliLoader(Loader):
    """Same interface and batches as CpuLoader."""

    name = "dali"

    def _units(self, epoch: int, start: int) -> Iterator[tuple[Unit, Batch]]:
        gpu, reader = self._stream is not None, BlockReader(self.source)
        # The pipeline holds DEPTH blocks and the one it gave out last; one more is read into.
        slots, fed = deque(Slot(pinned=gpu) for _ in range(DEPTH + 2)), deque()

        def blocks() -> Iterator[list]:
            for unit in self.order.units(epoch, start):
                slot = slots.popleft()
                slot.take()
                block, picks = slot.fill(unit, reader)
                fed.append((unit, slot, picks))
                yield [block.numpy()]

        device = (self.device.index or 0) if gpu else None
        pipeline = _pass_on(blocks(), gpu, batch_size=1, num_threads=THREADS, device_id=device,
                            prefetch_queue_depth=DEPTH)  # fmt: skip
        unpack = self._on_gpu if gpu else self._on_cpu()
        try:
            while True:
                try:
                    (output,) = pipeline.run(self._stream)
                except StopIteration:
                    return
                unit, slot, picks = fed.popleft()
                whole = unpack(slot, output, picks)
                slots.append(slot)
                yield unit, whole
        finally:
            if gpu:  # where it ends early, the pipeline may still be copying out of slots that are about to be freed
                torch.cuda.synchronize(self.device)

    def _on_gpu(self, slot: Slot, output, picks: torch.Tensor | None) -> Batch:
        with torch.cuda.stream(self._stream):
            block = torch.from_dlpack(output[0])
            whole = unpacked(block, picks, self.source)
            # The loader's stream has waited for DALI's copy: past this event, nobody reads the slot or the block.
            slot.give_back(self._stream.record_event(), block)
        return whole

    def _on_cpu(self):
        unpacker, memory = Unpacker(self.source.floats, self.source.logged), BatchMemory()

        def unpack(slot: Slot, output, picks: torch.Tensor | None) -> Batch:
            block = torch.from_dlpack(output[0]).numpy()
            rows = len(block) if picks is None else len(picks)
            whole = memory.empty_batch(rows)
            unpacker.into(whole, 0, rows, block, None if picks is None else picks.numpy())
            slot.give_back()
            return whole

        return unpack
