"""Make a plan: small tables on every rank, the others where they fit and load and memory are even."""

import argparse
import json
import math
import sys
from dataclasses import asdict, replace
from pathlib import Path

from model.config import ConfigError, ModelConfig, names, read_config
from model.numbers import number, whole
from model.optimizers import NAMES
from model.predict import MACHINES, Job, Machine, alone, costs, fixed_bytes, rank_bytes, step_seconds, table_bytes
from model.sharding import COLUMN_OPTIMIZERS, Piece, Plan, PlanError, read_plan

# Narrower pieces would read less than a memory sector of 64 B a row.
LEAST_WIDTH = 16
WIRES = {"fp32": 4, "bf16": 2, "fp16": 2}


def make_plan(job: Job, world: int, machine: Machine) -> Plan:
    """The plan with the least predicted time of a step, of those that fit. Raises PlanError where none does."""
    sizes, b = job.config.categorical_feature_sizes, job.batch_size / world
    levels = [1 << i for i in range(_most_columns(job).bit_length()) if 1 << i <= world]
    best, best_seconds = None, math.inf
    for limit in sorted({0, b * job.wire / 16, b * job.wire / 4} if world > 1 else {0}):
        replicated = tuple(t for t, size in enumerate(sizes) if size < limit)
        for columns in levels:
            plan = _fit(job, world, machine, replicated, columns)
            if plan and (seconds := step_seconds(plan, job, machine)) < 0.999 * best_seconds:
                best, best_seconds = plan, seconds
    if best is None:
        raise PlanError(shortfall(job, world, machine))
    return best


def _most_columns(job: Job) -> int:
    """Into how many pieces a table can be cut by columns."""
    return max(1, job.config.embedding_dim // LEAST_WIDTH) if job.optimizer in COLUMN_OPTIMIZERS else 1


def _fit(job: Job, world: int, machine: Machine, replicated: tuple[int, ...], columns: int) -> Plan | None:
    """Tables cut by columns into `columns` pieces, those that do not fit so into more, then by rows; placed."""
    config, most_columns = job.config, _most_columns(job)
    tables = [t for t in range(len(config.categorical_feature_sizes)) if t not in replicated]
    cuts = {t: (1, columns) for t in tables}
    for _ in range(len(tables) * (world.bit_length() + most_columns.bit_length() + 1)):
        plan = _place(job, world, machine, replicated, cuts)
        if isinstance(plan, Plan):
            return plan
        rows, across = cuts[plan]
        if across * 2 <= min(most_columns, world):
            cuts[plan] = rows, across * 2
        elif rows * 2 * across <= world * most_columns and rows < config.categorical_feature_sizes[plan]:
            cuts[plan] = rows * 2, across
        else:
            return None
    return None


def _cut(sizes: tuple[int, ...], dim: int, table: int, rows: int, columns: int) -> list[tuple[int, ...]]:
    size = sizes[table]
    return [
        (table, size * r // rows, size * (r + 1) // rows, dim * c // columns, dim * (c + 1) // columns)
        for r in range(rows) for c in range(columns) if size * r // rows < size * (r + 1) // rows
    ]  # fmt: skip


def _place(job: Job, world: int, machine: Machine, replicated: tuple[int, ...], cuts: dict) -> Plan | int:
    """The largest piece first, each to the least loaded rank with room; else the table of the piece that found none."""
    config, b = job.config, -(-job.batch_size // world)
    sizes, dim = config.categorical_feature_sizes, config.embedding_dim
    pieces = [piece for t, cut in cuts.items() for piece in _cut(sizes, dim, t, *cut)]
    pieces.sort(key=lambda p: (-table_bytes(job, p[2] - p[1], p[4] - p[3]), p))
    empty = Plan(world, sizes, dim, replicated, ())
    wires = 2 * b * (4 + job.wire) * sum(right - left for *_, left, right in pieces)
    room = [machine.memory - fixed_bytes(empty, job) - wires] * world
    load = [0] * world
    found = []
    for table, begin, end, left, right in pieces:
        width = right - left
        needed = table_bytes(job, end - begin + 1, width)
        needed += 2 * job.batch_size * (4 + job.wire) * width if world > 1 else 0
        able = [rank for rank in range(world) if room[rank] >= needed]
        if not able:
            return table
        rank = min(able, key=lambda rank: (load[rank], -room[rank], rank))
        load[rank] += width
        room[rank] -= needed
        found.append(Piece(rank, table, begin, end, left, right))
    return Plan(world, sizes, dim, replicated, tuple(sorted(found)))


def total_bytes(job: Job, world: int) -> float:
    """Bytes that the tables and all else need on `world` ranks together, whatever the placement."""
    config = job.config
    empty = Plan(world, config.categorical_feature_sizes, config.embedding_dim, (), ())
    width = len(config.categorical_feature_sizes) * config.embedding_dim
    wires = 4 * job.batch_size * (4 + job.wire) * width if world > 1 else 0
    tables = sum(table_bytes(job, rows, config.embedding_dim) for rows in config.categorical_feature_sizes)
    return tables + wires + world * fixed_bytes(empty, job)


def shortfall(job: Job, world: int, machine: Machine) -> str:
    """Why nothing fits, by how much, and what would help."""
    needed, there = total_bytes(job, world), world * machine.memory
    remedies = []
    for more in range(world + 1, 64 * world + 1):
        if total_bytes(job, more) <= more * machine.memory and _fit(job, more, machine, (), 1):
            remedies.append(f"{more} ranks")
            break
    for other in ("sgd", "rowwise_adagrad"):
        cheaper = replace(job, optimizer=other)
        if table_bytes(cheaper, 1, 64) < table_bytes(job, 1, 64) and _fit(cheaper, world, machine, (), 1):
            remedies.append(f"--embedding_optimizer {other}")
    remedies.append("a smaller --batch_size, or smaller tables (python -m gpu_etl encode --min-count)")
    short = f"{(needed - there) / 1e9:.1f} GB short" if needed > there else "no table can be cut so that its pieces fit"
    return (
        f"the model does not fit: {needed / 1e9:.1f} GB on {world} ranks of {machine.memory / 1e9:.1f} GB, {short}; "
        f"what would help: {'; '.join(remedies)}"
    )


def check_memory(plan: Plan, job: Job, machine: Machine) -> None:
    """Raise PlanError where a rank needs more than it has."""
    needed = [rank_bytes(plan, job, rank) for rank in range(plan.world)]
    rank = max(range(plan.world), key=needed.__getitem__)
    if needed[rank] > machine.memory:
        raise PlanError(
            f"the plan does not fit: rank {rank} needs {needed[rank] / 1e9:.1f} GB of {machine.memory / 1e9:.1f} GB, "
            f"{(needed[rank] - machine.memory) / 1e9:.1f} GB too much; move some of its pieces, or let a plan be made"
        )


def show(plan: Plan, job: Job, machine: Machine) -> str:
    """The plan as a table for people, and what its slowest rank does."""
    found = costs(plan, job, machine)
    counts = ", ".join(f"{count} {kind}" for kind, count in plan.kinds().items())
    lines = [f"{len(plan.sizes)} tables on {plan.world} ranks: {counts}",
             "rank  pieces           rows       GB  width  predicted ms  MB sent"]  # fmt: skip
    for rank, cost in enumerate(found):
        pieces = plan.of(rank)
        lines.append(
            f"{rank:4}  {len(pieces):6}  {sum(p.rows for p in pieces):13,}  {cost.gigabytes:7.2f}  "
            f"{sum(p.width for p in pieces):5}  {cost.milliseconds:12.3f}  {cost.bytes_sent / 1e6:7.1f}"
        )
    return "\n".join(lines)


def forecast(job: Job, world: int, machine: Machine, plan: Plan | None = None) -> dict:
    """Time of a step, its parts, memory, and efficiency against one rank: with the same global batch (strong), and with
    one rank working on its share of it (weak)."""
    plan = plan or make_plan(job, world, machine)
    slowest = max(costs(plan, job, machine), key=lambda cost: cost.milliseconds)
    seconds = slowest.milliseconds / 1e3
    share = replace(job, batch_size=-(-job.batch_size // world))
    one, one_share = alone(job, machine), alone(share, machine)
    return {
        "machine": machine.name, "world": world, "batch_size": job.batch_size,
        "milliseconds": round(slowest.milliseconds, 3), "samples_per_second": round(job.batch_size / seconds),
        "one_rank_samples_per_second": round(job.batch_size / one),
        "times_one_rank": round(one / seconds, 2), "strong_efficiency": round(one / seconds / world, 3),
        "weak_efficiency": round(one_share / seconds, 3),
        "fits_one_rank": total_bytes(job, 1) <= machine.memory,
        "slowest_rank": {key: round(value, 3) for key, value in asdict(slowest).items()},
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """python -m model.sharding."""
    from model import sharding

    parser = argparse.ArgumentParser(
        prog="python -m model.sharding", description=sharding.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    rate = number(above=True)
    parser.add_argument("--model_config", default="official_config", metavar="NAME|FILE", help=", ".join(names()))
    parser.add_argument("--world", type=whole(1, 1 << 16), default=8, metavar="N", help="ranks (default: 8)")
    parser.add_argument("--gpu", default="h200", choices=sorted(MACHINES), help="what a rank is (default: h200)")
    parser.add_argument("--batch_size", type=whole(1), default=65536, metavar="B", help="global (default: 65536)")
    parser.add_argument("--embedding_optimizer", default="sgd", choices=NAMES, help="of the tables (default: sgd)")
    parser.add_argument("--wire_dtype", default="fp32", choices=sorted(WIRES), help="of vectors sent (default: fp32)")
    parser.add_argument("--memory", type=rate, metavar="GB", help="of a rank (default: 92 %% of the card's)")
    parser.add_argument("--link", type=rate, metavar="GB/S", help="within a node, each way (default: the card's)")
    parser.add_argument("--network", type=rate, metavar="GB/S", help="between nodes, each way (default: the card's)")
    parser.add_argument("--per_node", type=whole(1, 1 << 16), metavar="N", help="ranks of a node (default: 8)")
    parser.add_argument("--plan", type=Path, metavar="FILE", help="judge this plan instead of making one")
    parser.add_argument("--save_plan", type=Path, metavar="FILE", help="write the plan there")
    args = parser.parse_args(argv)
    given = {key: value * scale for key, scale in (("memory", 1e9), ("link", 1e9), ("network", 1e9), ("per_node", 1))
             if (value := getattr(args, key))}  # fmt: skip
    machine = replace(MACHINES[args.gpu], **given)
    try:
        config, _ = read_config(args.model_config)
        result = _report(args, config, machine)
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(result, allow_nan=False))
    return 0


def _report(args: argparse.Namespace, config: ModelConfig, machine: Machine) -> dict:
    job = Job(config, args.batch_size, args.embedding_optimizer, WIRES[args.wire_dtype])
    plan = read_plan(args.plan) if args.plan else make_plan(job, args.world, machine)
    plan.check(config, args.world, args.embedding_optimizer, f"--plan {args.plan}")
    check_memory(plan, job, machine)
    if args.save_plan:
        plan.write(args.save_plan)
    found = forecast(job, args.world, machine, plan)
    cost = found["slowest_rank"]
    words = [
        show(plan, job, machine), "",
        f"step {found['milliseconds']:.3f} ms on the slowest rank: MLPs {cost['mlps']:.3f}, interaction "
        f"{cost['interaction']:.3f}, tables {cost['tables']:.3f}, exchange not hidden {cost['exposed']:.3f} (of "
        f"vectors {cost['vectors']:.3f}, all-reduce {cost['all_reduce']:.3f}), launches {cost['overhead']:.3f}",
        f"{found['samples_per_second']:,} samples/s, {found['times_one_rank']} times one rank with the whole batch"
        f"{'' if found['fits_one_rank'] else ' (if it fitted there)'}; efficiency {found['strong_efficiency']:.0%} "
        f"with the same global batch, {found['weak_efficiency']:.0%} with the same batch a rank",
        f"assumed: {machine.stream / 1e12:.2f} TB/s of memory, {machine.matrix / 1e12:.0f} TFLOP/s of matrices, "
        f"{machine.link / 1e9:.0f} GB/s within {machine.per_node} ranks and {machine.network / 1e9:.0f} GB/s beyond, "
        f"each way; {1e6 * machine.latency:.0f} us a collective, {1e6 * machine.overhead:.0f} us of launches a step; "
        "16-bit MLPs; data always there; no measurement",
    ]  # fmt: skip
    print("\n".join(words), file=sys.stderr)
    return found


if __name__ == "__main__":
    sys.exit(main())
