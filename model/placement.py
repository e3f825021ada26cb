"""Make a plan: small tables on every rank, the others where they fit and load and memory are even."""

import math
from dataclasses import replace

from model.predict import Job, Machine, fixed_bytes, rank_bytes, step_seconds, table_bytes
from model.sharding import COLUMN_OPTIMIZERS, Piece, Plan, PlanError

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
