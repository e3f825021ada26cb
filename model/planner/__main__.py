"""The command python -m model.planner: a plan, and what a step of it costs on machines that need not be here."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from common.numbers import number, whole
from model import outcome
from model.config import ModelConfig, names, read_config
from model.layers.optimizers import NAMES
from model.planner import plan as sharding
from model.planner.cost_model import MACHINES, Job, Machine
from model.planner.placement import WIRES, check_memory, make_plan
from model.planner.plan import read_plan
from model.planner.report import forecast, show


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m model.planner", description=sharding.__doc__,
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
    return outcome.run(lambda: _report(args, read_config(args.model_config)[0], machine), (), debug=False)


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
