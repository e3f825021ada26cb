"""Embedding look-up and dot interaction in one kernel, forward and backward: the vectors never reach memory.

B batch, T tables (up to 64), D dimension (a multiple of 8, up to 512), R rows of all tables, W = D + pairs + 1. One
program a sample: it gathers the sample's rows into a tile [T + 1 padded, D in chunks], multiplies the tile with its own
transpose on the matrix units, and writes the lower triangle. Backward gathers the rows again: 4 D bytes a look-up with
float32 tables, as many as writing and reading bfloat16 vectors would take, but popular rows come from the cache.
"""

import torch
import triton
import triton.language as tl

from model.kernels import MOST_COLUMNS, MOST_TABLES, supported
from model.kernels.arithmetic import dot, not_finite, rounded
from model.kernels.cost import Cost, Shape

IDS = 1024  # ids a program
# By bytes of a matrix element and padded vectors: columns of a chunk, warps; chosen by registers (python -m bench
# step_kernels): a tile of half-precision numbers has 32 of them a thread. float32 products take three passes of TF32.
LAUNCH = {
    2: {16: (256, 4), 32: (128, 4), 64: (64, 4), 128: (64, 8)},
    4: {16: (128, 4), 32: (64, 4), 64: (32, 8), 128: (32, 8)},
}


def launch(tables: int, dim: int, matrix_bytes: int) -> tuple[int, int, int]:
    """(padded vectors, columns of a chunk, warps): plain numbers, so that nothing is tuned inside a CUDA graph."""
    vectors = max(16, triton.next_power_of_2(tables + 1))
    chunk, warps = LAUNCH[matrix_bytes][vectors]
    return vectors, max(16, min(chunk, triton.next_power_of_2(dim))), warps


@triton.jit
def _tile(bottom, weight, rows, sample, column, TABLES: tl.constexpr, DIM: tl.constexpr, VECTORS: tl.constexpr):
    """Chunk of a sample's vectors [VECTORS, CHUNK] in the type of `bottom`, which is vector 0."""
    vector = tl.arange(0, VECTORS)
    inside = column < DIM
    is_table = (vector > 0) & (vector <= TABLES)
    places = rows[:, None].to(tl.int64) * DIM + column[None, :]
    found = tl.load(weight + places, mask=is_table[:, None] & inside[None, :], other=0.0)
    first = tl.load(bottom + sample * DIM + column, mask=inside, other=0.0)
    found = rounded(found.to(tl.float32), bottom.dtype.element_ty)
    return tl.where(vector[:, None] == 0, first[None, :], found), first


@triton.jit
def _pair(i, j, SELF: tl.constexpr):
    """Number of the pair (i, j), j < i (or j <= i), in the lower triangle, row by row."""
    return (i * (i + 1) // 2 if SELF else i * (i - 1) // 2) + j


@triton.jit(do_not_specialize=["lookups"])  # a last, short batch compiles nothing
def _find_rows(sparse, begins, limits, rows, lookups, TABLES: tl.constexpr, HASH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of the joint weight for ids. Here and not in _forward, where every thread would divide for a whole row."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there, table = place < lookups, place % TABLES
    row = tl.load(sparse + place, mask=there, other=0).to(rows.dtype.element_ty)
    if HASH:
        limit = tl.load(limits + table).to(row.dtype)
        row = row % limit
        row = tl.where(row < 0, row + limit, row)
    tl.store(rows + place, row + tl.load(begins + table).to(row.dtype), mask=there)


@triton.jit
def _forward(
    bottom, rows_in, weight, out, TABLES: tl.constexpr, DIM: tl.constexpr, SELF: tl.constexpr,
    PRECISION: tl.constexpr, VECTORS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    PAIRS: tl.constexpr = TABLES * (TABLES + 1) // 2 + (TABLES + 1 if SELF else 0)
    WIDTH: tl.constexpr = DIM + PAIRS + 1
    sample = tl.program_id(0).to(tl.int64)
    vector = tl.arange(0, VECTORS)
    is_table = (vector > 0) & (vector <= TABLES)
    rows = tl.load(rows_in + sample * TABLES + vector - 1, mask=is_table, other=0)
    products = tl.zeros((VECTORS, VECTORS), tl.float32)
    for begin in tl.static_range(0, DIM, CHUNK):
        column = begin + tl.arange(0, CHUNK)
        tile, first = _tile(bottom, weight, rows, sample, column, TABLES, DIM, VECTORS)
        tl.store(out + sample * WIDTH + column, first, mask=column < DIM)
        products = dot(tile, tl.trans(tile), products, PRECISION)
    i, j = vector[:, None], vector[None, :]
    wanted = (i <= TABLES) & ((j <= i) if SELF else (j < i))
    products = rounded(products, out.dtype.element_ty)
    tl.store(out + sample * WIDTH + DIM + _pair(i, j, SELF), products, mask=wanted)
    tl.store(out + sample * WIDTH + WIDTH - 1, 0.0)


@triton.jit
def _backward(
    grad, bottom, rows_in, weight, grad_bottom, grad_tables, flag, TABLES: tl.constexpr, DIM: tl.constexpr,
    SELF: tl.constexpr, PRECISION: tl.constexpr, VECTORS: tl.constexpr, CHUNK: tl.constexpr, CHECKS: tl.constexpr,
):  # fmt: skip
    PAIRS: tl.constexpr = TABLES * (TABLES + 1) // 2 + (TABLES + 1 if SELF else 0)
    WIDTH: tl.constexpr = DIM + PAIRS + 1
    sample = tl.program_id(0).to(tl.int64)
    vector = tl.arange(0, VECTORS)
    is_table = (vector > 0) & (vector <= TABLES)
    rows = tl.load(rows_in + sample * TABLES + vector - 1, mask=is_table, other=0)
    i, j = vector[:, None], vector[None, :]
    # products = tile @ tile.T, so the gradient of the tile is (g + g.T) @ tile: both triangles filled, diagonal twice.
    pair = _pair(tl.maximum(i, j), tl.minimum(i, j), SELF)
    wanted = (i <= TABLES) & (j <= TABLES) & ((i == i) if SELF else (i != j))
    both = tl.load(grad + sample * WIDTH + DIM + pair, mask=wanted, other=0.0)
    if SELF:
        both = rounded(tl.where(i == j, 2.0, 1.0) * both.to(tl.float32), both.dtype)
    bad = tl.zeros((VECTORS, CHUNK), tl.int32)
    for begin in tl.static_range(0, DIM, CHUNK):
        column = begin + tl.arange(0, CHUNK)
        inside = column < DIM
        tile, _ = _tile(bottom, weight, rows, sample, column, TABLES, DIM, VECTORS)
        found = dot(both, tile, tl.zeros((VECTORS, CHUNK), tl.float32), PRECISION)
        direct = tl.load(grad + sample * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
        found = rounded(tl.where(i == 0, found + direct[None, :], found), grad_tables.dtype.element_ty)
        at = (sample * TABLES + i - 1) * DIM + column[None, :]
        tl.store(grad_tables + at, found, mask=is_table[:, None] & inside[None, :])
        at = sample * DIM + i * DIM + column[None, :]  # only vector 0 is stored; addresses are aligned for all
        tl.store(grad_bottom + at, found, mask=(i == 0) & inside[None, :])
        if CHECKS:
            bad |= not_finite(found.to(tl.float32)).to(tl.int32)  # of padding too, where all is 0
    if CHECKS:
        tl.store(flag, 1.0, mask=tl.max(bad) > 0)  # all that store, store the same


def _precision() -> str:
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _check(bottom: torch.Tensor, tables: int, dim: int) -> None:
    if not supported(tables, dim):
        raise ValueError(
            f"expected up to {MOST_TABLES} tables and a dim that is a multiple of 8, up to {MOST_COLUMNS}; "
            f"got {tables} tables of dim {dim}; use the torch code"
        )
    if bottom.shape[1:] != (dim,) or not bottom.is_contiguous():
        raise ValueError(f"bottom: expected a contiguous tensor [B, {dim}], got {tuple(bottom.shape)}")


def find_rows(
    sparse: torch.Tensor, begins: torch.Tensor, limits: torch.Tensor, hash_indices: bool, height: int
) -> torch.Tensor:
    """sparse int32 [B, T], contiguous; begins and limits int64 [T]: first row and size of the tables in a weight of
    `height` rows -> rows of that weight [B, T], int32 where height allows, else int64.

    Ids must lie within their tables, unless hash_indices takes them modulo the size.
    """
    rows = torch.empty_like(sparse, dtype=torch.int32 if height < 2**31 else torch.int64)
    if len(sparse):
        grid = (triton.cdiv(sparse.numel(), IDS),)
        _find_rows[grid](sparse, begins, limits, rows, sparse.numel(), sparse.shape[1], hash_indices, IDS, num_warps=4)
    return rows


def forward(bottom: torch.Tensor, rows: torch.Tensor, weight: torch.Tensor, self_interaction: bool) -> torch.Tensor:
    """bottom [B, D], rows int [B, T] of weight [R, D] -> [bottom, dot products, 0] of bottom's type [B, W].

    weight may be float32, bfloat16 or float16. Contiguous tensors. Bytes: see forward_cost.
    """
    (batch, tables), dim = rows.shape, weight.shape[1]
    _check(bottom, tables, dim)
    pairs = tables * (tables + 1) // 2 + (tables + 1 if self_interaction else 0)
    out = bottom.new_empty(batch, dim + pairs + 1)
    vectors, chunk, warps = launch(tables, dim, bottom.element_size())
    if batch:
        _forward[(batch,)](
            bottom, rows, weight, out, tables, dim, self_interaction, _precision(), vectors, chunk, num_warps=warps
        )
    return out


def backward(
    grad: torch.Tensor, bottom: torch.Tensor, rows: torch.Tensor, weight: torch.Tensor, self_interaction: bool,
    flag: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """grad [B, W] of forward's output, and its input -> gradients of bottom [B, D] and of every look-up
    [B * T, D], in the type of bottom. flag: a float32 scalar on the device, set to 1 where one of these is infinite or
    no number, else left as it is. Bytes: see backward_cost."""
    (batch, tables), dim = rows.shape, weight.shape[1]
    _check(bottom, tables, dim)
    grad_bottom, grad_tables = torch.empty_like(bottom), bottom.new_empty(batch * tables, dim)
    vectors, chunk, warps = launch(tables, dim, bottom.element_size())
    if batch:
        _backward[(batch,)](
            grad.contiguous(), bottom, rows, weight, grad_bottom, grad_tables, grad if flag is None else flag, tables,
            dim, self_interaction, _precision(), vectors, chunk, flag is not None, num_warps=warps,
        )  # fmt: skip
    return grad_bottom, grad_tables


def rows_cost(s: Shape) -> Cost:
    """Ids read, the rows' numbers written."""
    return Cost(s.lookups * (4 + 4), 0.0)


def forward_cost(s: Shape) -> Cost:
    """Rows' numbers, rows and bottom read; the output written. Products of the padded tile."""
    padded = max(16, triton.next_power_of_2(s.tables + 1))
    moved = s.lookups * (4 + s.dim * s.weight) + s.batch * (s.dim + s.width) * s.matrix
    return Cost(moved, 2.0 * s.batch * padded * padded * s.dim)


def backward_cost(s: Shape) -> Cost:
    """Rows' numbers, rows, bottom and the output's gradient read; gradients of bottom and of every look-up written."""
    padded = max(16, triton.next_power_of_2(s.tables + 1))
    moved = s.lookups * (4 + s.dim * (s.weight + s.matrix)) + s.batch * (2 * s.dim + s.width) * s.matrix
    return Cost(moved, 2.0 * s.batch * padded * padded * s.dim)
