"""What a plan looks like and what it costs, for people and programs."""

from dataclasses import asdict, replace

from model.placement import make_plan, total_bytes
from model.predict import Job, Machine, alone, costs
from model.sharding import Plan


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
