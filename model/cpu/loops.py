"""Numba loops of the CPU's training step, for one thread each.

The torch code they are held against: embedding.py (look-up and update), interaction.py (DotInteraction), nn.Linear with
ReLU, F.binary_cross_entropy_with_logits. Activations are float32, or bfloat16 held as its bits in uint16. n samples, T
tables, V = T + 1 vectors a sample, D embedding dimension, W = D + pairs + 1 as in DotInteraction.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, overload

LINE = 16  # floats a cache line
AHEAD = 16  # rows that are on their way while one is updated
# Sums may be reordered (SIMD) and multiply-adds fused; NaN and infinity stay what they are, so that a diverging run
# shows in its loss.
_FAST = {"reassoc", "contract", "nsz", "arcp"}
_compiled = numba.njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy")
_inlined = numba.njit(nogil=True, fastmath=_FAST, inline="always")


@intrinsic
def _prefetch(_, array, row, column):
    """Ask the cache for array[row, column]: LLVM's llvm.prefetch, to read, for all levels."""

    def generate(context, builder, signature, values):
        place = context.make_array(signature.args[0])(context, builder, values[0])
        pointer = cgutils.get_item_pointer(context, builder, signature.args[0], place, values[1:])
        word, byte = ir.IntType(32), ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        builder.call(function, [builder.bitcast(pointer, byte), word(0), word(3), word(1)])
        return context.get_dummy_value()

    return types.void(array, row, column), generate


def _load(value):
    """The float32 that an activation stands for."""
    raise NotImplementedError("compiled only")


def _store(value, array):
    """A float32 as an activation of the array's type."""
    raise NotImplementedError("compiled only")


@overload(_load, inline="always")
def _load_typed(value):
    if value == types.uint16:
        return lambda value: np.uint32(np.uint32(value) << np.uint32(16)).view(np.float32)
    return lambda value: np.float32(value)


@overload(_store, inline="always")
def _store_typed(value, array):
    def rounded(value, array):
        bits = np.float32(value).view(np.uint32)
        odd = (bits >> np.uint32(16)) & np.uint32(1)
        return np.uint16(np.uint32(bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))

    return rounded if array.dtype == types.uint16 else lambda value, array: np.float32(value)


@_compiled
def bias_relu(y, bias, relu):
    """y float32 [n, W] = max(y + bias, 0), bias float32 [W], in place; without `relu`, y + bias."""
    floor = np.float32(0.0) if relu else np.float32(-np.inf)
    for i in range(y.shape[0]):
        for j in range(y.shape[1]):
            value = y[i, j] + bias[j]
            y[i, j] = floor if value < floor else value


@_compiled
def relu_backward(grad, y, sums, relu):
    """grad [n, W] = 0 where y [n, W] is 0, in place, if `relu`; sums float32 [W] += its columns."""
    floor = np.float32(0.0) if relu else np.float32(-np.inf)
    for i in range(grad.shape[0]):
        for j in range(grad.shape[1]):
            value = np.float32(0.0) if _load(y[i, j]) <= floor else _load(grad[i, j])
            grad[i, j] = _store(value, grad)
            sums[j] += value


@_compiled
def loss(logits, label, scale, grad):
    """logits [n], label float32 [n] -> sum of the cross entropies, float64; grad [n] = scale times its gradient."""
    total = 0.0
    for i in range(logits.shape[0]):
        x = np.float64(_load(logits[i]))
        small = np.exp(-abs(x))
        total += max(x, 0.0) - x * label[i] + np.log1p(small)
        probability = (1.0 if x >= 0 else small) / (1.0 + small)
        grad[i] = _store(np.float32((probability - label[i]) * scale), grad)
    return total


@dataclass(frozen=True)
class Interaction:
    """Look-up and dot interaction in one; the vectors [n, V, D] stay in the first-level cache, a sample at a time.

    forward(weight float32 [R, D], rows int64 [n, T], bottom [n, D], out [n, W]): out as DotInteraction gives it. Reads
    4 T D bytes of tables a sample.
    backward(weight, rows, bottom, grad [n, W], grad_bottom [n, D], grad_rows float32 [n, T, D]): the gradients of
    bottom and of the rows looked up, which are read again. Writes 4 T D bytes a sample.
    """

    forward: Callable
    backward: Callable


@_inlined
def _gather(weight, rows, bottom, b, z, tables, dim):
    """The vectors of sample b -> z float32 [T + 1, D]."""
    if b + 1 < rows.shape[0]:  # the next sample's rows come while this one is worked on
        for t in range(tables):
            for d in range(0, dim, LINE):
                _prefetch(weight, rows[b + 1, t], d)
    for d in range(dim):
        z[0, d] = _load(bottom[b, d])
    for t in range(tables):
        row = rows[b, t]
        for d in range(dim):
            z[t + 1, d] = weight[row, d]


@cache
def interaction(tables: int, dim: int, self_interaction: bool) -> Interaction:
    """The loops for T tables of D columns, compiled for just these numbers.

    They close over numbers alone: compiled code of functions that close over others is never found again on disk.
    """
    vectors, more = tables + 1, 1 if self_interaction else 0

    @_compiled
    def forward(weight, rows, bottom, out):
        z = np.empty((vectors, dim), np.float32)
        for b in range(rows.shape[0]):
            _gather(weight, rows, bottom, b, z, tables, dim)
            for d in range(dim):
                out[b, d] = bottom[b, d]
            place = dim
            for i in range(vectors):
                j = 0
                while j + 4 <= i + more:  # four at a time: z[i] is loaded once for them
                    s0 = s1 = s2 = s3 = np.float32(0.0)
                    for d in range(dim):
                        x = z[i, d]
                        s0 += x * z[j, d]
                        s1 += x * z[j + 1, d]
                        s2 += x * z[j + 2, d]
                        s3 += x * z[j + 3, d]
                    out[b, place], out[b, place + 1] = _store(s0, out), _store(s1, out)
                    out[b, place + 2], out[b, place + 3] = _store(s2, out), _store(s3, out)
                    place += 4
                    j += 4
                while j < i + more:
                    s0 = np.float32(0.0)
                    for d in range(dim):
                        s0 += z[i, d] * z[j, d]
                    out[b, place] = _store(s0, out)
                    place += 1
                    j += 1
            out[b, place] = 0

    @_compiled
    def backward(weight, rows, bottom, grad, grad_bottom, grad_rows):
        z = np.empty((vectors, dim), np.float32)
        pairs = np.zeros((vectors, vectors), np.float32)
        for b in range(rows.shape[0]):
            _gather(weight, rows, bottom, b, z, tables, dim)
            place = dim
            for i in range(vectors):
                for j in range(i + more):
                    value = _load(grad[b, place])
                    pairs[i, j] = value
                    pairs[j, i] = value
                    place += 1
                if more:
                    pairs[i, i] *= np.float32(2.0)
            for d in range(dim):
                total = _load(grad[b, d])
                for k in range(vectors):
                    total += pairs[0, k] * z[k, d]
                grad_bottom[b, d] = _store(total, grad_bottom)
            for i in range(1, vectors):
                for d in range(dim):
                    total = np.float32(0.0)
                    for k in range(vectors):
                        total += pairs[i, k] * z[k, d]
                    grad_rows[b, i - 1, d] = total

    return Interaction(forward, backward)


@_compiled
def sgd(weight, rows, grad, lr, part, parts):
    """weight[rows[k]] -= lr * grad[k] for the rows that are this part's of `parts`: chosen by a row's low 16 bits, so
    that threads never meet and every row takes its gradients in the batch's order, whatever the number of threads.

    weight float32 [R, D], rows int64 [N], grad float32 [N, D]. Moves 12 D bytes a row; every part reads all of `rows`.
    """
    last = rows.shape[0] - 1
    for k in range(rows.shape[0]):
        row, later = rows[k], rows[min(k + AHEAD, last)]
        if ((later & 0xFFFF) * parts) >> 16 == part:
            for d in range(0, weight.shape[1], LINE):
                _prefetch(weight, later, d)
        if ((row & 0xFFFF) * parts) >> 16 == part:
            for d in range(weight.shape[1]):
                weight[row, d] -= lr * grad[k, d]
