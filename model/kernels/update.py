"""The optimiser step of the rows that a batch looked up: exact under duplicates, the same bits each time.

N look-ups, sorted by row (ties in the order of the batch), are cut into pieces of a fixed length. A program takes a
piece: it gathers the gradients into a tile, sums those of equal rows by one product with the matrix of equal rows, and
steps each row that lies in the piece whole: one read and one write a row. What a piece holds of a row that goes on
beyond an edge is kept as a partial sum; a second kernel adds those up, many at a time, and steps such rows. So a row
looked up by every sample costs as little as N distinct ones, nothing waits for the host, shapes do not depend on the
data (a CUDA graph can hold it), and no atomics are needed.

The gradients of the look-ups go through memory once (2 x 2 D bytes a look-up in bfloat16). Atomics straight from the
interaction's backward would save that, but then rows change while other samples still read them, Adagrad needs the
whole sum first, and the sums would depend on the order of arrival.
"""

import torch
import triton
import triton.language as tl

from model.kernels import MOST_COLUMNS, supported
from model.kernels.arithmetic import matrix_sum, not_finite, random_bits, rounded, stochastically_rounded
from model.kernels.cost import Cost, Shape

TILE = 4096  # elements of a piece's tile, where a piece has 16 to 64 look-ups
PARTIALS, SPANNING_WARPS = 8192, 8  # elements of partial sums added up at a time, 32 a thread


def piece_length(dim: int) -> int:
    """Look-ups of a piece; 16 is the least that the matrix units take."""
    return max(16, min(64, TILE // triton.next_power_of_2(dim)))


def piece_warps(dim: int, rule: str, grad_bytes: int) -> int:
    """Warps of a piece's program: 32 elements of the tile a thread, which saves a quarter of the instructions of 16, or
    16 where 32 would take too many registers."""
    elements = 32 if rule in ("sgd", "rowwise_adagrad") and grad_bytes == 2 else 16
    return max(4, piece_length(dim) * triton.next_power_of_2(dim) // (elements * 32))


@triton.jit
def _step_rows(
    weight, sums, squares, rows, total, chosen, column, lr, scale, step, DIM: tl.constexpr, RULE: tl.constexpr,
    EPS: tl.constexpr, BETA1: tl.constexpr, BETA2: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """One step of the chosen rows int64 [N, 1], each once, with gradients `total` float32 [N, COLUMNS]."""
    inside = chosen & (column < DIM)
    at = rows * DIM + column
    rate = tl.load(lr).to(tl.float32)
    total = total * (1.0 / tl.load(scale).to(tl.float32))
    old = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    if RULE == "sgd":
        change = rate * total
    elif RULE == "rowwise_adagrad":
        mean = tl.sum(total * total, 1, keep_dims=True) / DIM
        found = tl.load(sums + rows, mask=chosen, other=0.0) + mean
        tl.store(sums + rows, found, mask=chosen)
        change = rate / (tl.sqrt(found) + EPS) * total
    elif RULE == "adagrad":
        found = tl.load(sums + at, mask=inside, other=0.0) + total * total
        tl.store(sums + at, found, mask=inside)
        change = rate * total / (tl.sqrt(found) + EPS)
    else:
        tl.static_assert(RULE == "adam")
        first = tl.load(sums + at, mask=inside, other=0.0)
        first += (1 - BETA1) * (total - first)
        second = tl.load(squares + at, mask=inside, other=0.0)
        second += (1 - BETA2) * (total * total - second)
        tl.store(sums + at, first, mask=inside)
        tl.store(squares + at, second, mask=inside)
        number = tl.load(step).to(tl.float64)  # 1 - 0.999 has no digits to spare
        bias1 = 1 - tl.exp(number * tl.log(tl.full((), BETA1, tl.float64)))
        bias2 = 1 - tl.exp(number * tl.log(tl.full((), BETA2, tl.float64)))
        rate = rate * (tl.sqrt(bias2) / bias1).to(tl.float32)
        change = rate * first / (tl.sqrt(second) + EPS)
    new = old - change
    if STOCHASTIC:
        bits = random_bits(tl.load(step).to(tl.int64), rows, column.shape[1])
        tl.store(weight + at, stochastically_rounded(new, bits, weight.dtype.element_ty), mask=inside)
    else:
        tl.store(weight + at, rounded(new, weight.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["lookups"])  # a last, short batch compiles nothing
def _step_pieces(
    keys, order, grads, partials, weight, sums, squares, lr, scale, step, skip, lookups, DIM: tl.constexpr,
    COLUMNS: tl.constexpr, PIECE: tl.constexpr, RULE: tl.constexpr, EPS: tl.constexpr, BETA1: tl.constexpr,
    BETA2: tl.constexpr, STOCHASTIC: tl.constexpr, SKIPS: tl.constexpr,
):  # fmt: skip
    """See the top of the file: rows that lie in one piece whole take their step, others leave partial sums."""
    piece = tl.program_id(0)
    place, column = piece * PIECE + tl.arange(0, PIECE), tl.arange(0, COLUMNS)[None, :]
    if SKIPS:
        lookups = tl.where(tl.load(skip) > 0, 0, lookups)
    there = place < lookups
    key = tl.load(keys + place, mask=there, other=-1)
    before = tl.load(keys + place - 1, mask=there & (place > 0), other=-1)
    after = (piece + 1) * PIECE
    following = tl.load(keys + after, mask=after < lookups, other=-2)
    lookup = tl.load(order + place, mask=there, other=0).to(tl.int64)
    inside = there[:, None] & (column < DIM)
    grad = tl.load(grads + lookup[:, None] * DIM + column, mask=inside, other=0.0)
    same = key[:, None] == key[None, :]
    if SKIPS:  # a step with a gradient that is no number is skipped whole
        total = matrix_sum(same, grad)
    else:
        # Such a gradient times the 0 of another row would be no number there too: only its own row gets that.
        spoilt = tl.max(not_finite(grad.to(tl.float32)).to(tl.int32), 1)
        total = matrix_sum(same, tl.where(spoilt[:, None] > 0, 0.0, grad.to(tl.float32)).to(grad.dtype))
        marks = tl.max(tl.where(same, spoilt[None, :], 0), 1)
        total = tl.where(marks[:, None] > 0, float("nan"), total)
    begins, goes_on = there & (key != before), key == following
    whole = (begins & (key != following))[:, None]
    rows = key.to(tl.int64)[:, None]
    _step_rows(
        weight, sums, squares, rows, total, whole, column, lr, scale, step, DIM, RULE, EPS, BETA1, BETA2, STOCHASTIC
    )
    # Slot 0: the sum of a row that came in over the left edge; slot 1: of one that begins here and goes on.
    came_in = there & (place == piece * PIECE) & (key == before)
    slot = tl.where(begins, 1, 0)[:, None]
    kept = (came_in | (begins & goes_on))[:, None] & (column < DIM)
    tl.store(partials + (piece.to(tl.int64) * 2 + slot) * DIM + column, total, mask=kept)


@triton.jit(do_not_specialize=["lookups"])  # a last, short batch compiles nothing
def _step_spanning(
    keys, partials, weight, sums, squares, lr, scale, step, skip, lookups, DIM: tl.constexpr, COLUMNS: tl.constexpr,
    PIECE: tl.constexpr, GROUP: tl.constexpr, RULE: tl.constexpr, EPS: tl.constexpr, BETA1: tl.constexpr,
    BETA2: tl.constexpr, STOCHASTIC: tl.constexpr, SKIPS: tl.constexpr,
):  # fmt: skip
    """The row that begins in a piece and goes on: its partial sums of the pieces behind, added up; then its step."""
    piece = tl.program_id(0)
    end = (piece + 1) * PIECE
    key, following = tl.load(keys + end - 1), tl.load(keys + end)
    before = tl.load(keys + piece * PIECE - 1, mask=piece > 0, other=-1)
    if SKIPS:
        following = tl.where(tl.load(skip) > 0, -2, following)
    if (key == following) & (key != before):
        column = tl.arange(0, COLUMNS)[None, :]
        own = tl.load(partials + (piece.to(tl.int64) * 2 + 1) * DIM + column, mask=column < DIM, other=0.0)
        total = tl.zeros((GROUP, COLUMNS), tl.float32)
        next_piece, going = piece + 1, True
        while going:
            pieces = next_piece + tl.arange(0, GROUP)
            mine = tl.load(keys + pieces.to(tl.int64) * PIECE, mask=pieces * PIECE < lookups, other=-1) == key
            at = partials + pieces.to(tl.int64)[:, None] * 2 * DIM + column
            total += tl.load(at, mask=mine[:, None] & (column < DIM), other=0.0)
            next_piece += GROUP
            going = tl.min(mine.to(tl.int32), 0) == 1
        total = own + tl.sum(total, 0, keep_dims=True)
        rows = tl.full((1, 1), 0, tl.int64) + key
        _step_rows(
            weight, sums, squares, rows, total, rows >= 0, column, lr, scale, step, DIM, RULE, EPS, BETA1, BETA2,
            STOCHASTIC,
        )  # fmt: skip


def sort_lookups(rows: torch.Tensor, height: int) -> tuple[torch.Tensor, torch.Tensor]:
    """rows int32 or int64 [N], below height -> (sorted rows [N], int32 where height allows: half the passes of a sort;
    their places int64 [N]); equal rows in the order they came."""
    return torch.sort(rows.int() if height < 2**31 else rows, stable=True)


def update(
    weight: torch.Tensor, state: dict[str, torch.Tensor], rows: torch.Tensor, grads: torch.Tensor, rule: str,
    eps: float, betas: tuple[float, float], lr: torch.Tensor, scale: torch.Tensor, step: torch.Tensor,
    stochastic: bool = True, skip: torch.Tensor | None = None,
    order: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:  # fmt: skip
    """One step of the rows int [N] of weight [R, D], of which grads [N, D] are the gradients times `scale`, in place.

    state: the rule's (optimizers.table_state). lr, scale, step: scalars on the device, so that a CUDA
    graph sees their new values. stochastic: round half-precision weights stochastically, by (step, row, column).
    skip: a float32 scalar on the device; where it is above 0, nothing changes. order: what sort_lookups made of the
    rows, if that is known already. weight may lie in pinned host memory. Equal input gives equal bits. Bytes: see
    update_cost.
    """
    lookups, dim = grads.shape
    if weight.shape[1] != dim or not supported(1, dim):
        raise ValueError(
            f"expected gradients and weight of one dim, a multiple of 8 up to {MOST_COLUMNS}; got {dim} and "
            f"{weight.shape[1]}"
        )
    if not lookups:
        return
    keys, places = order or sort_lookups(rows, len(weight))
    piece, columns = piece_length(dim), max(16, triton.next_power_of_2(dim))
    pieces = triton.cdiv(lookups, piece)
    partials = torch.empty(pieces, 2, dim, device=grads.device)
    sums, squares = [*state.values(), partials, partials][:2]
    last = rule, eps, *betas, stochastic and weight.dtype != torch.float32, skip is not None
    scalars = lr, scale, step, scale if skip is None else skip, lookups
    _step_pieces[(pieces,)](
        keys, places, grads.contiguous(), partials, weight, sums, squares, *scalars, dim, columns, piece, *last,
        num_warps=piece_warps(dim, rule, grads.element_size()),
    )  # fmt: skip
    if pieces > 1:
        group = PARTIALS // columns
        _step_spanning[(pieces - 1,)](
            keys, partials, weight, sums, squares, *scalars, dim, columns, piece, group, *last,
            num_warps=SPANNING_WARPS,
        )  # fmt: skip


def update_cost(s: Shape, rule: str = "sgd") -> Cost:
    """Sorted rows and places (keys of 4 bytes and places of 8, read and written by each of 4 passes of a radix sort),
    gradients read once, distinct rows and their state read and written, partial sums."""
    sort = s.lookups * (4 + 8) * 2 * 4
    state = {"sgd": 0, "rowwise_adagrad": 4, "adagrad": 4 * s.dim, "adam": 8 * s.dim}[rule]
    rows = s.distinct * 2 * (s.dim * s.weight + state)
    partials = min(s.distinct, s.lookups // piece_length(s.dim)) * 2 * 4 * s.dim
    sums = 2.0 * s.lookups * piece_length(s.dim) * s.dim * (3 if s.matrix == 4 else 1)
    return Cost(sort + s.lookups * (12 + s.dim * s.matrix) + rows + partials, sums)
