"""Embedding look-up alone, for models without the dot interaction whose tables lie in pinned host memory."""

import torch
import triton
import triton.language as tl

ROWS = 16


@triton.jit
def _gather(weight, rows, out, lookups, DIM: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows + place, mask=place < lookups, other=0)
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (place < lookups)[:, None] & (column < DIM)
    found = tl.load(weight + row.to(tl.int64)[:, None] * DIM + column, mask=inside, other=0.0)
    tl.store(out + place[:, None] * DIM + column, found.to(tl.float32), mask=inside)


def gather(weight: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """weight [R, D], in device or pinned host memory, rows int [N] on the device -> float32 [N, D] on the device.

    Bytes: N D (4 + those of a weight).
    """
    out = torch.empty(len(rows), weight.shape[1], device=rows.device)
    if len(rows):
        columns = triton.next_power_of_2(out.shape[1])
        grid = (triton.cdiv(len(rows), ROWS),)
        _gather[grid](weight, rows, out, len(rows), out.shape[1], columns, ROWS, num_warps=8)
    return out
