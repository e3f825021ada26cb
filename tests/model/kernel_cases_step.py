"""Cases of test_kernels.py about the step around the kernels, each run in a process of its own: in the interpreter,
or on a GPU.

    TRITON_INTERPRET=1 python -m tests.model.kernel_cases_step spoilt_gradients
"""

import sys

import torch
import torch.distributed as dist

from model.distributed.process_group import Groups, Ranks
from model.distributed.sharded_embedding import ReplicatedTables
from model.distributed.trainer import RankLoader, RankTrainer, make_model
from model.dlrm import DLRM
from model.kernels import lookup_interaction, update
from model.layers.embedding import Storage
from model.layers.optimizers import NAMES, Optimizer
from model.planner.plan import Piece, Plan
from model.selfcheck.kernels import DEVICE, one_update
from model.training.schedule import Schedule
from model.training.trainer import Precision, Trainer
from tests.model import kernel_cases  # noqa: F401 - lets models take the kernels in the interpreter
from tests.model.helpers import SIZES, ListLoader, random_batches, small_config

NOT_FINITE = (float("nan"), float("inf"), float("-inf"))


def spoilt_gradients() -> None:
    """A gradient that is no number, or infinite, spoils its own row alone, not those that share a piece with it."""
    for name, dtype in [(name, torch.bfloat16) for name in NAMES] + [("sgd", torch.float32), ("sgd", torch.float16)]:
        weight = torch.randn(40, 64, device=DEVICE)
        state = {key: torch.rand_like(zeros).to(DEVICE) for key, zeros in Optimizer(name).table_state(40, 64).items()}
        rows = torch.randint(40, (90,), device=DEVICE)
        rows[:30] = 7  # a row of more than a piece
        grads = torch.randn(90, 64, device=DEVICE).to(dtype)
        good, good_state = one_update(name, weight, state, rows, grads)
        for at, bad in zip((3, 60, 89), NOT_FINITE, strict=True):
            spoilt = grads.clone()
            spoilt[at, 5] = bad
            found, found_state = one_update(name, weight, state, rows, spoilt)
            others = torch.arange(40, device=DEVICE) != rows[at]
            assert not found[rows[at], 5].isfinite(), (name, dtype, bad)
            for ours, expected in zip((found, *found_state.values()), (good, *good_state.values()), strict=True):
                assert torch.equal(ours[others], expected[others]), (name, dtype, bad)


def flags() -> None:
    """backward says of its gradients whether all are numbers, and leaves a flag that is set as it is."""
    for tables, dim, dtype in ((3, 24, torch.float16), (26, 128, torch.float16), (5, 8, torch.bfloat16)):
        weight = torch.randn(50, dim, device=DEVICE)
        rows = torch.randint(50, (6, tables), dtype=torch.int32, device=DEVICE)
        bottom = torch.randn(6, dim, device=DEVICE).to(dtype)
        good = torch.randn_like(lookup_interaction.forward(bottom, rows, weight, False))
        flag = torch.zeros((), device=DEVICE)
        plain = lookup_interaction.backward(good, bottom, rows, weight, False)
        found = lookup_interaction.backward(good, bottom, rows, weight, False, flag)
        assert flag == 0 and all(map(torch.equal, plain, found))
        for place in (0, dim, dim + 1, good.shape[1] - 2):  # of the bottom vector itself, and of pairs
            for bad in NOT_FINITE:
                grad = good.clone()
                grad[4, place] = bad
                flag.zero_()
                found = lookup_interaction.backward(grad, bottom, rows, weight, False, flag)
                assert flag == 1 and not all(part.isfinite().all() for part in found), (place, bad)
        flag.fill_(1.0)
        lookup_interaction.backward(good, bottom, rows, weight, False, flag)
        assert flag == 1


def look_ups_are_sorted_once() -> None:
    """One sort a step, wherever the tables lie; of host tables, forward and backward share it. And float16's gradients
    of tables are looked at where they are made, not once more."""
    sorts, looked_at = [], []
    sort, check = update.sort_lookups, torch._amp_foreach_non_finite_check_and_unscale_
    update.sort_lookups = lambda *given: sorts.append(given) or sort(*given)
    torch._amp_foreach_non_finite_check_and_unscale_ = lambda *given: looked_at.append(len(given[0])) or check(*given)
    batches = [type(b)(*(t.to(DEVICE) for t in b)) for b in random_batches(3, 7)]
    for placement in ("device", "host"):
        for interaction in ("dot", "cat"):
            torch.manual_seed(0)
            with DEVICE:
                model = DLRM(small_config(interaction_op=interaction), True, Optimizer(), Storage(placement=placement))
            trainer = Trainer(model, Schedule(0.1), Precision(torch.float16, 64.0))
            for batch in batches:
                sorts.clear(), looked_at.clear()
                trainer.step(batch)
                assert len(sorts) == 1, (placement, interaction)
                assert looked_at == ([8] if interaction == "dot" else [8, 1]), (placement, interaction)
            assert trainer.loss_scale.skipped == 0


def _alone() -> Ranks:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return Ranks(0, 1, DEVICE, Groups(*[dist.group.WORLD] * 3))


def one_rank() -> None:
    """A plan of one rank takes the fused path of one process, hashed ids included; and a step that overflows is
    skipped."""
    ranks, plan = _alone(), Plan(1, SIZES, 8, (), tuple(Piece(0, t, 0, size, 0, 8) for t, size in enumerate(SIZES)))
    fused, forward = [], lookup_interaction.forward
    lookup_interaction.forward = lambda *given: fused.append(given) or forward(*given)
    for changes, precision in (({}, Precision()), ({"hash_indices": True}, Precision(torch.float16, 2.0**40, True))):
        config, ends = small_config(**changes), []
        batches = [b._replace(sparse=b.sparse * 5 if changes else b.sparse) for b in random_batches(4, 9)]
        batches = [type(b)(*(t.to(DEVICE) for t in b)) for b in batches]
        for several in (False, True):
            torch.manual_seed(0)
            fused.clear()
            with DEVICE:
                model = make_model(config, plan, ranks) if several else DLRM(config)
            if several:
                trainer = RankTrainer(ranks, model, Schedule(0.1), precision)
                loader = RankLoader(ListLoader(batches), model.embedding, 9, 36)
            else:
                trainer, loader = Trainer(model, Schedule(0.1), precision, fused=False), ListLoader(batches)
            losses = [trainer.step(batch).item() for batch in loader.batches()]
            assert len(fused) == len(batches), (changes, several, len(fused))
            tables = model.embedding.parts() if several else model.embedding.tables()
            tables = [held[0][1] for held in tables] if several else tables
            ends.append((losses, [table.clone() for table in tables]))
        for found, expected in zip(*ends, strict=True):  # a rank's loss is a sum over a number, not a mean
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        assert not precision.dynamic or trainer.loss_scale.skipped > 0


def replicas() -> None:
    """Tables on every rank: the sum of a batch's gradients, the rows that Adam moves, by kernels as by torch."""
    for name in NAMES:
        for looked_up in (3, 200):
            ends = []
            for kernels in (True, False):
                torch.manual_seed(1)
                pending = []
                with DEVICE:
                    tables = ReplicatedTables((4, 60), 8, Optimizer(name), lambda _, then, to=pending: to.append(then))
                    tables.weight.data.normal_()
                    index, grad = torch.randint(looked_up % 64, (looked_up,)), torch.randn(looked_up, 8)
                if not kernels:
                    type(tables).has_kernels = property(lambda self: False)
                tables.lr.fill_(0.1)
                for step in (1, 2):
                    tables.step = step
                    tables.update(index, grad * step)
                    pending.pop()()
                    assert not tables._sum.any()
                ends.append([tables.weight.detach(), *tables.state().values()])
                if not kernels:
                    del type(tables).has_kernels
            for ours, theirs in zip(*ends, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
            others = torch.ones(64, dtype=torch.bool, device=DEVICE).index_fill_(0, index, False)
            assert torch.equal(ends[0][0][others], ends[1][0][others])


if __name__ == "__main__":
    torch.manual_seed(0)
    globals()[sys.argv[1]]()
    print("agrees")
