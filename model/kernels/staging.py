"""Rows of tables in pinned host memory, brought to the device once a batch.

A batch looks the popular rows up thousands of times, and the bus is a hundredth as fast as device memory: each distinct
row crosses it once here, into a buffer on the device that look-ups then read. Shapes do not depend on the data: the
buffer has room for a batch of distinct rows, which lie one after another at its beginning.
"""

import torch
import triton
import triton.language as tl

from model.kernels.cost import Shape

ROWS, WARPS = 16, 8


@triton.jit(do_not_specialize=["lookups"])  # a last, short batch compiles nothing
def _fetch(weight, keys, slots, staged, lookups, DIM: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """The row of every first look-up, copied to its slot; keys and slots: of the sorted look-ups."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = place < lookups
    key = tl.load(keys + place, mask=there, other=-1)
    before = tl.load(keys + place - 1, mask=(place > 0) & there, other=-1)
    slot = tl.load(slots + place, mask=there, other=0).to(tl.int64)
    column = tl.arange(0, COLUMNS)[None, :]
    wanted = (key != before)[:, None] & (column < DIM)
    found = tl.load(weight + key.to(tl.int64)[:, None] * DIM + column, mask=wanted, other=0.0)
    tl.store(staged + slot[:, None] * DIM + column, found, mask=wanted)


def stage(weight: torch.Tensor, keys: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [R, D] in pinned host memory; keys [N], places int64 [N]: sorted look-ups as of update.sort_lookups.

    Returns staged [N, D] on the device, of the weight's type, and slots int32 [N]: look-up i is staged[slots[i]]. Rows
    that are no slot hold nothing. Bytes: see bus_bytes.
    """
    lookups, dim = len(keys), weight.shape[1]
    staged = torch.empty(lookups, dim, dtype=weight.dtype, device=keys.device)
    slots = torch.empty(lookups, dtype=torch.int32, device=keys.device)
    if lookups:
        number = torch.zeros(lookups, dtype=torch.int32, device=keys.device)  # of distinct rows before this one
        torch.cumsum(keys[1:] != keys[:-1], 0, dtype=torch.int32, out=number[1:])
        columns = triton.next_power_of_2(dim)
        grid = (triton.cdiv(lookups, ROWS),)
        _fetch[grid](weight, keys, number, staged, lookups, dim, columns, ROWS, num_warps=WARPS)
        slots[places] = number
    return staged, slots


def bus_bytes(s: Shape) -> tuple[int, int]:
    """What a step brings to the device and takes back: the distinct rows, once for the look-ups, and once each way for
    the update."""
    rows = s.distinct * s.dim * s.weight
    return 2 * rows, rows
