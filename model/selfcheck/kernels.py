"""The Triton kernels of the training step against the eager code and float64: on a GPU at real sizes, in Triton's
interpreter (TRITON_INTERPRET=1) at small ones. Needs triton."""

import itertools

import torch
import torch.nn.functional as F
import triton

from model.kernels import lookup_interaction, update
from model.kernels.staging import stage
from model.kernels.unpack import unpack
from model.layers.interaction import DotInteraction
from model.layers.optimizers import NAMES, Optimizer

INTERPRETED = triton.knobs.runtime.interpret
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
TIMES = 1 if INTERPRETED else 3000  # samples and look-ups on a GPU, in multiples of those in the interpreter
HALF = (torch.bfloat16, torch.float16)


def distance(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Root of the mean squared error."""
    return (found.double() - truth).square().mean().sqrt().item()


def no_worse(found: torch.Tensor, eager: torch.Tensor, truth: torch.Tensor, what) -> None:
    """found is as near to the float64 truth as the eager code is, but for chance; float32: but for the last bit."""
    ours, theirs = distance(found, truth), distance(eager, truth)
    slack, last_bit = (1.05, 0.0) if eager.dtype in HALF else (3, 2**-23 * truth.square().mean().sqrt().item())
    assert found.dtype == eager.dtype and found.shape == eager.shape, what
    assert ours <= slack * theirs + last_bit, (what, ours, theirs)


def make_ids(sizes, batch, kind):
    columns = {
        "random": lambda size: torch.randint(size, (batch,)),
        "equal": lambda size: torch.full((batch,), size - 1),
        "distinct": lambda size: torch.randperm(max(size, batch))[:batch] % size,
    }[kind]
    return torch.stack([columns(size) for size in sizes], 1).int().to(DEVICE)


# batch, table sizes, dim, self-interaction, hashed ids, type of matrices, type of tables, ids
INTERACTIONS = [
    (5, (3, 11, 200, 1), 8, False, False, torch.bfloat16, torch.float32, "random"),
    (3, (3, 11, 200, 1), 24, True, True, torch.float16, torch.bfloat16, "random"),
    (7, (50,), 16, False, False, torch.bfloat16, torch.float32, "distinct"),
    (7, (50,), 16, True, False, torch.float32, torch.float16, "distinct"),
    (3, (9,) * 64, 64, False, True, torch.bfloat16, torch.float32, "random"),
    (2, (9,) * 64, 128, False, True, torch.float32, torch.float32, "random"),
    (3, (30,) * 31, 40, True, False, torch.bfloat16, torch.bfloat16, "random"),
    (9, (40,) * 26, 128, False, False, torch.bfloat16, torch.float32, "equal"),
    (5, (40,) * 26, 128, False, False, torch.float16, torch.float32, "random"),
    (5, (40,) * 26, 64, False, False, torch.float32, torch.float32, "distinct"),
    (2, (7,) * 26, 512, False, True, torch.bfloat16, torch.float16, "random"),
    (2, (7,) * 33, 512, False, True, torch.float32, torch.float32, "random"),
    (0, (7,) * 26, 64, False, False, torch.bfloat16, torch.float32, "random"),
]


def forward_and_backward() -> None:
    """The fused kernels against the eager modules and float64."""
    for case in INTERACTIONS:
        batch, sizes, dim, self_interaction, hashed, matrices, weights, kind = case
        weight = torch.randn(sum(sizes), dim, device=DEVICE).to(weights)
        begins, limits = torch.tensor([0, *sizes[:-1]]).cumsum(0).to(DEVICE), torch.tensor(sizes, device=DEVICE)
        ids = make_ids(sizes, batch * min(TIMES, 100), kind)
        rows = ids.long() + begins
        if hashed:
            ids += (torch.randint(-3, 4, ids.shape, device=DEVICE) * limits).int()
        bottom = torch.randn(len(ids), dim, device=DEVICE).to(matrices)
        for height in (len(weight), 2**31):
            found_rows = lookup_interaction.find_rows(ids, begins, limits, hashed, height)
            assert torch.equal(found_rows.long(), rows), case
        out = lookup_interaction.forward(bottom, found_rows, weight, self_interaction)
        grad = torch.randn_like(out)
        interaction = DotInteraction(len(sizes) + 1, dim, self_interaction).to(DEVICE)
        results = []
        for dtype in (matrices, torch.float64):
            first = bottom.to(dtype, copy=True).requires_grad_()
            vectors = weight[rows].to(matrices).to(dtype, copy=True).requires_grad_()
            eager = interaction(first, vectors)
            eager.backward(grad.to(dtype))
            results.append((eager.detach(), first.grad, vectors.grad.flatten(0, 1)))
        found = out, *lookup_interaction.backward(grad, bottom, found_rows, weight, self_interaction)
        if not batch:
            assert [f.shape for f in found] == [e.shape for e in results[0]]
            continue
        for name, ours, eager, truth in zip(("output", "bottom", "look-ups"), found, *results, strict=True):
            no_worse(ours, eager, truth, (name, case))
        assert torch.equal(out[:, :dim], bottom) and not out[:, -1].any()


# rows of the weight, look-ups, dim, type of the gradients, rows looked up
PIECE = update.piece_length(16)
UPDATES = [
    (50, 333, 24, torch.float32, lambda n: torch.randint(50, (n,))),
    (3, 333, 128, torch.bfloat16, lambda n: torch.randint(3, (n,))),
    (500, 200, 64, torch.float16, lambda n: torch.randperm(max(n, 500))[:n] % 500),
    (9, 5 * PIECE, 16, torch.float32, lambda n: torch.full((n,), 4)),
    (9, 19 * PIECE + 5, 16, torch.bfloat16, lambda n: (torch.arange(n) * 9 // n).flip(0)),
    (9, 3 * PIECE, 16, torch.float32, lambda n: torch.arange(n) // PIECE % 9),  # rows end where pieces end
    (20, 41, 512, torch.bfloat16, lambda n: torch.randint(20, (n,)).clamp(max=12)),
    (3, 400, 512, torch.float32, lambda n: (torch.arange(n) > 30).long()),  # more pieces than are added up at a time
    (9, 1, 8, torch.float32, lambda n: torch.full((n,), 8)),
]


def one_update(name, weight, state, rows, grads, **more):
    weight, state = weight.clone(), {key: value.clone() for key, value in state.items()}
    settings = Optimizer(name)
    scalars = [torch.tensor(value, device=DEVICE) for value in (0.1, 8.0, 3)]
    update.update(weight, state, rows, grads, name, settings.epsilon, settings.betas, *scalars, **more)
    return weight, state


def updates() -> None:
    """Every rule against the eager one and float64; equal input, equal bits; other rows stay as they are."""
    for name, case in itertools.product(NAMES, UPDATES):
        if INTERPRETED and name in ("adagrad", "adam") and case[1] > 400:
            continue  # slow there, and the sums are the same for all rules
        height, lookups, dim, dtype, choose = case
        rows = choose(lookups * min(TIMES, 300)).to(DEVICE)
        weight = torch.randn(height, dim, device=DEVICE)
        state = Optimizer(name).table_state(height, dim)
        state = {key: torch.rand_like(zeros).to(DEVICE) for key, zeros in state.items()}
        grads = (torch.randn(len(rows), dim, device=DEVICE) * 8).to(dtype)
        found, new_state = one_update(name, weight, state, rows.int(), grads)
        again, _ = one_update(name, weight, state, rows, grads, order=update.sort_lookups(rows, height))
        assert torch.equal(found, again), (name, case)
        results = []
        for kind in (torch.float32, torch.float64):
            eager, *kept = (tensor.to(kind, copy=True) for tensor in (weight, *state.values()))
            remembered = dict(zip(state, kept, strict=True))
            Optimizer(name).table_rule()(eager, remembered, rows, grads.to(kind) / 8, torch.tensor(0.1).to(kind), 3)
            results.append((eager, *remembered.values()))
        for ours, eager, truth in zip((found, *new_state.values()), *results, strict=True):
            no_worse(ours, eager, truth, (name, case))
        for skip, expected in ((1.0, weight), (0.0, found)) if name == "rowwise_adagrad" else ():
            again, _ = one_update(name, weight, state, rows, grads, skip=torch.tensor(skip, device=DEVICE))
            assert torch.equal(again, expected), case
        others = torch.ones(height, dtype=torch.bool, device=DEVICE).index_fill_(0, rows, False)
        assert torch.equal(found[others], weight[others])
    nothing = torch.empty(0, dtype=torch.int32, device=DEVICE)
    assert torch.equal(one_update("sgd", weight, {}, nothing, grads[:0])[0], weight)


def rounding() -> None:
    """Half-precision tables: neighbours only, right on average, by the step's number; to nearest if asked."""
    height, dim = 64 * min(TIMES, 50), 64
    rows = torch.arange(height, dtype=torch.int32, device=DEVICE)
    for dtype, start in ((torch.bfloat16, 1.0), (torch.float16, 1.0), (torch.float16, 3e-5)):
        low = torch.full((height, dim), start, device=DEVICE).to(dtype)
        high = torch.nextafter(low, torch.full_like(low, 10.0))
        share = 0.3
        grads = -8 / 0.1 * share * (high.float() - low.float())
        found, _ = one_update("sgd", low, {}, rows, grads)
        again, _ = one_update("sgd", low, {}, rows.flip(0), grads)
        assert torch.equal(found, again) and ((found == low) | (found == high)).all()
        up = (found == high).float()
        deviation = (share * (1 - share) / up.numel()) ** 0.5
        assert abs(up.mean() - share) < 5 * deviation, (dtype, up.mean())
        for axis in (0, 1):  # rows and columns are rounded each for itself
            spread = up.mean(axis).std() / (share * (1 - share) / up.shape[axis]) ** 0.5
            assert 0.6 < spread < 1.5, (dtype, axis, spread)
        settings = Optimizer("sgd")
        scalars = [torch.tensor(value, device=DEVICE) for value in (0.1, 8.0, 4.0)]
        other = low.clone()
        update.update(other, {}, rows, grads, "sgd", 0.0, settings.betas, *scalars)
        assert 0.3 < (other != found).float().mean() / (2 * share * (1 - share)) < 2
        for scale, nearest in ((1, low), (2, high)):
            assert torch.equal(one_update("sgd", low, {}, rows, grads * scale, stochastic=False)[0], nearest)
        unchanged, _ = one_update("sgd", low, {}, rows, torch.zeros_like(grads))
        assert torch.equal(unchanged, low)


def unpacking() -> None:
    """unpack against the record's layout and float64 logarithms; empty, odd and extreme batches."""
    for rows in (0, 1, 37, 16 * min(TIMES, 4096)):
        batch = torch.randint(0, 2**31 - 1, (rows, 40), dtype=torch.int32, device=DEVICE)
        batch[: rows // 2, 1:14] %= 1000
        batch[:1, 1:14], batch[:, 0] = 0, batch[:, 0] % 2
        dense, sparse, label = unpack(batch)
        assert torch.equal(sparse, batch[:, 14:]) and torch.equal(label, batch[:, 0].float())
        exact = (batch[:, 1:14].float() + 1).double().log()
        torch.testing.assert_close(dense, exact.float(), rtol=1.2e-7, atol=0)
        half, _, _ = unpack(batch, torch.bfloat16)
        assert torch.equal(half, dense.bfloat16())


def staging() -> None:
    """stage against torch's embedding: each look-up finds its row, and a row is fetched once."""
    cases = (8, torch.float32, 41), (24, torch.bfloat16, 33), (512, torch.float16, 16), (8, torch.bfloat16, 1)
    for dim, dtype, lookups in cases:
        weight = torch.randn(30, dim, device=DEVICE).to(dtype)
        rows = torch.randint(30, (lookups * min(TIMES, 100),), device=DEVICE)
        keys, places = update.sort_lookups(rows, len(weight))
        staged, slots = stage(weight, keys, places)
        assert torch.equal(F.embedding(slots, staged), F.embedding(rows, weight)) and staged.dtype == dtype
        distinct = rows.unique()  # they lie at the beginning, without gaps
        assert torch.equal(slots.unique(), torch.arange(len(distinct), dtype=torch.int32, device=DEVICE))
        assert torch.equal(staged[: len(distinct)], weight[distinct])
        assert [len(part) for part in stage(weight, keys[:0], places[:0])] == [0, 0]
