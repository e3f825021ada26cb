"""A batch of 160-byte records, unpacked in one kernel."""

import torch
import triton
import triton.language as tl

from model.kernels.arithmetic import rounded
from model.kernels.cost import Cost

RECORD, DENSE, SPARSE = 40, 13, 26  # int32 columns: a label, then integers, then ids
ROWS = 16


@triton.jit(do_not_specialize=["rows"])  # a last, short batch compiles nothing
def _unpack(records, dense, sparse, label, rows, COLUMNS: tl.constexpr, NUMBERS: tl.constexpr, IDS: tl.constexpr,
            BLOCK: tl.constexpr):  # fmt: skip
    """ROWS records a program, read once; each element goes to the one output that it belongs to."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, 64)[None, :]
    there = (row < rows) & (column < COLUMNS)
    value = tl.load(records + row * COLUMNS + column, mask=there, other=0)
    # log(float32(x) + 1) in float64, so that its float32 is the nearest one; float32 first, as gpu_etl takes it.
    logged = tl.log((value.to(tl.float32) + 1.0).to(tl.float64)).to(tl.float32)
    number, id_ = column - 1, column - 1 - NUMBERS
    tl.store(label + row + column, value.to(tl.float32), mask=there & (column == 0))
    is_number = there & (number >= 0) & (number < NUMBERS)
    tl.store(dense + row * NUMBERS + number, rounded(logged, dense.dtype.element_ty), mask=is_number)
    tl.store(sparse + row * IDS + id_, value, mask=there & (id_ >= 0))


def unpack(
    records: torch.Tensor, dense_dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """records int32 [B, 40], contiguous -> dense log(x + 1) float32 or bfloat16 [B, 13], sparse int32 [B, 26], label
    float32 [B]; contiguous, on the records' device. Bytes: see unpack_cost."""
    if records.dtype != torch.int32 or records.shape[1:] != (RECORD,) or not records.is_contiguous():
        raise ValueError(f"expected contiguous int32 [B, {RECORD}], got {records.dtype} {tuple(records.shape)}")
    rows = len(records)
    dense = torch.empty(rows, DENSE, dtype=dense_dtype, device=records.device)
    sparse = torch.empty(rows, SPARSE, dtype=torch.int32, device=records.device)
    label = torch.empty(rows, dtype=torch.float32, device=records.device)
    if rows:
        _unpack[(triton.cdiv(rows, ROWS),)](
            records, dense, sparse, label, rows, RECORD, DENSE, SPARSE, ROWS, num_warps=4
        )
    return dense, sparse, label


def unpack_cost(batch: int, dense_bytes: int = 4) -> Cost:
    """Records read; dense, sparse and label written."""
    return Cost(batch * (4 * RECORD + dense_bytes * DENSE + 4 * SPARSE + 4), 30.0 * batch * DENSE)
