"""The step on 1, 2, 4 ranks at one global batch: time by part, bytes sent beside the least, measured and predicted."""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import asdict, replace

import torch
import torch.distributed as dist

from bench import timing
from bench.batches import make_batches
from bench.command import BenchError
from bench.machine import ROOT
from bench.train_limits import matrix_operations
from common.jsonable import jsonable
from gpu_etl.load.batch import rank_range
from model.config import read_config
from model.distributed.all_to_all import Exchange
from model.distributed.gradient_reducer import GradientReducer
from model.distributed.process_group import Ranks, choose_device, join
from model.distributed.sharded_embedding import ShardedEmbedding
from model.distributed.trainer import RankLoader, RankTrainer, make_model
from model.dlrm import DLRM
from model.planner import placement
from model.planner.cost_model import MACHINES, Job, alone, exchange_bytes, rank_bytes, step_seconds
from model.training.schedule import Schedule
from model.training.trainer import Precision, Trainer

# What a rank does in a step, by the function that does it; what is left of forward and backward are the MLPs and the
# interaction, and for one process alone the tables too.
PARTS = {
    "ids": (ShardedEmbedding, "route"),
    "look-up, vectors off": (ShardedEmbedding, "begin"),
    "vectors in": (Exchange, "received_vectors"),
    "gradients off": (Exchange, "send_gradients"),
    "gradients in": (Exchange, "received_gradients"),
    "sums of gradients": (GradientReducer, "_finish"),
}
WARM_UP, TURN = 3, 5  # steps before measuring, and from one look at the clock to the next


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of this benchmark."""
    parser.add_argument("--model_config", default="official_config", metavar="NAME|FILE")
    parser.add_argument("--world", type=int, nargs="+", default=[1, 2, 4], metavar="N")
    parser.add_argument("--batch_size", type=int, default=4096, metavar="B", help="global (default: 4096)")
    parser.add_argument("--seconds", type=float, default=8.0, help="of measuring, each (default: 8)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of all ranks together (default: 2)")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    parser.add_argument("--wire_dtype", default="fp32", choices=sorted(placement.WIRES))


class Meter:
    """Seconds by part, and bytes that leave this rank."""

    def __init__(self, ranks: Ranks):
        self.seconds: dict[str, float] = defaultdict(float)
        self.bytes: dict[str, int] = defaultdict(int)
        self._ranks = ranks
        for name, (owner, method) in PARTS.items():
            self._time(name, owner, method)
        self._count()

    def _time(self, name: str, owner: type, method: str) -> None:
        real = getattr(owner, method)

        def timed(*args, **kwargs):
            start = self._now()
            found = real(*args, **kwargs)
            self.seconds[name] += self._now() - start
            return found

        setattr(owner, method, timed)

    def _now(self) -> float:
        if self._ranks.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _count(self) -> None:
        """Count what the collectives are given. A ring's all-reduce sends 2 (N - 1) / N of its bytes."""
        rank, world = self._ranks.rank, self._ranks.world
        exchange, reduce = dist.all_to_all_single, dist.all_reduce

        def all_to_all_single(received, sent, received_sizes, sent_sizes, group=None, **more):
            kind = "ids" if group is not None else "vectors and gradients"
            self.bytes[kind] += (sum(sent_sizes) - sent_sizes[rank]) * sent.element_size()
            return exchange(received, sent, received_sizes, sent_sizes, group=group, **more)

        def all_reduce(tensor, *args, **more):
            if more.get("group") is None:
                self.bytes["all_reduce"] += 2 * (world - 1) * tensor.numel() * tensor.element_size() // world
            return reduce(tensor, *args, **more)

        dist.all_to_all_single, dist.all_reduce = all_to_all_single, all_reduce

    def clear(self) -> None:
        """Start anew."""
        self.seconds.clear()
        self.bytes.clear()


class Rounds:
    """A rank's shares of a few batches, round and round, with the interface of gpu_etl.load."""

    def __init__(self, batches: list, ranks: Ranks):
        begin, end = rank_range(0, len(batches[0].label), ranks.rank, ranks.world)
        self._batches = [type(batch)(*(tensor[begin:end].contiguous() for tensor in batch)) for batch in batches]

    def batches(self, epoch: int, start: int):
        """Without end."""
        while True:
            yield from self._batches


def machine_here(ranks: Ranks, name: str):
    """The rates of this machine while all its ranks work at once, as predict.Machine takes them."""
    device, least = ranks.device, torch.zeros(4, dtype=torch.float64)
    table, rows = torch.zeros(1 << 20, 64, device=device), torch.randint(1 << 20, (1 << 18,), device=device)
    least[0] = matrix_operations(torch.float32 if device.type == "cpu" else torch.float16, device)
    least[1] = 2 * 4 * 64 * len(rows) / _median(lambda: table[rows], device)
    for place, size in ((2, 1 << 22), (3, ranks.world)):
        sent = torch.zeros(size // ranks.world * ranks.world, device=device)
        received, sizes = torch.empty_like(sent), [len(sent) // ranks.world] * ranks.world
        seconds = _median(lambda s=sent, r=received, z=sizes: ranks.all_to_all(r, s, z, z).wait(), device)
        least[place] = seconds if place == 3 else 4 * len(sent) * (ranks.world - 1) / ranks.world / seconds
    everyone = torch.tensor(ranks.everyone(least.tolist()), dtype=torch.float64)
    matrix, stream, link = everyone[:, :3].min(0).values.tolist()
    latency = everyone[:, 3].max().item() if ranks.world > 1 else 0.0
    known = MACHINES["cpu" if device.type == "cpu" else "h100"]
    rates = {"matrix": matrix, "stream": stream, "link": max(link, 1.0), "latency": latency, "overhead": 0.0}
    return replace(known, name=name, **rates)


def _median(action, device: torch.device) -> float:
    calls = 10 if device.type == "cuda" else 1
    return statistics.median([timing.seconds(action, device, calls) for _ in range(8)][2:])


def _steps(trainer: Trainer, batches, seconds: float, ranks: Ranks, meter: Meter | None) -> list[float]:
    """Seconds of each step; as many on every rank."""
    stop, batches = time.perf_counter() + seconds, iter(batches)
    for _ in range(WARM_UP):
        trainer.step(next(batches))
    trainer.clock.clear()
    if meter:
        meter.clear()
    times, laps = [], timing.Laps(ranks.device)
    while True:
        for _ in range(TURN):
            trainer.step(next(batches))
            laps.mark()
        times += laps.take()
        if ranks.first(len(times) > 5 and time.perf_counter() > stop):
            return times
        laps = timing.Laps(ranks.device)  # the ranks' agreement is no part of a step


def rank_main(args: argparse.Namespace) -> None:
    """One rank's measuring; rank 0 prints what all found."""
    device = choose_device(args.device)
    store, _, world = next(iter(dist.rendezvous("env://")))
    torch.set_num_threads(max(1, args.threads // world))
    ranks = join("auto", device, store)
    config, _ = read_config(args.model_config)
    precision = Precision() if device.type == "cpu" else Precision(torch.float16, 1024.0)
    machine = machine_here(ranks, str(device))
    job = Job(config, args.batch_size, "sgd", placement.WIRES[args.wire_dtype], 4 if device.type == "cpu" else 2)
    plan = placement.make_plan(job, world, machine)
    torch.manual_seed(0)
    batches = make_batches(config.categorical_feature_sizes, args.batch_size, device)
    plain = None
    if world == 1:
        with device:
            model = DLRM(config)
        rounds = Rounds(batches, ranks).batches(0, 0)
        plain = statistics.median(_steps(Trainer(model, Schedule(0.1), precision), rounds, args.seconds, ranks, None))
    wire = {4: torch.float32, 2: torch.bfloat16}[job.wire]
    trainer = RankTrainer(ranks, make_model(config, plan, ranks, wire=wire), Schedule(0.1), precision)
    loader = RankLoader(Rounds(batches, ranks), trainer.model.embedding, args.batch_size, 1 << 62)
    rounds = loader.batches(0, 0)
    times = _steps(trainer, rounds, args.seconds, ranks, None)
    # Which costs time (a GPU has to be waited for): the parts get rounds of their own, every step of which is timed.
    meter, trainer.clock.every = Meter(ranks), 1
    steps, parts = len(_steps(trainer, rounds, args.seconds, ranks, meter)), dict(meter.seconds)
    inside = trainer.clock.seconds
    own = {name: parts.get(name, 0.0) for name in PARTS}
    own["forward, the rest"] = inside["forward"] - own["look-up, vectors off"] - own["vectors in"]
    own["backward, the rest"] = (
        inside["backward, tables"] - own["gradients off"] - own["gradients in"] - own["sums of gradients"]
    )
    own["update of the MLPs"] = inside["update of the MLPs"]
    found = ranks.everyone({
        "times": times, "parts": {name: 1e3 * s / steps for name, s in own.items()},
        "bytes": {kind: count / steps for kind, count in meter.bytes.items()},
        "least": exchange_bytes(plan, job, ranks.rank), "gigabytes": rank_bytes(plan, job, ranks.rank) / 1e9,
    })  # fmt: skip
    if ranks.rank == 0:
        print(json.dumps(jsonable(_judge(found, job, plan, machine, plain)), allow_nan=False))
    ranks.everyone(None)
    ranks.end()


def _judge(found: list[dict], job: Job, plan, machine, plain: float | None) -> dict:
    """What the ranks measured, as one."""
    slowest = [max(times) for times in zip(*(rank["times"] for rank in found), strict=True)]
    low, middle, high = statistics.quantiles(slowest, n=4)
    sent = [sum(rank["bytes"].values()) for rank in found]
    least = [sum(rank["least"].values()) for rank in found]
    return {
        "world": plan.world, "placement": plan.kinds(), "milliseconds": 1e3 * middle, "spread": (high - low) / middle,
        "parts_ms": {part: statistics.mean(rank["parts"][part] for rank in found) for part in found[0]["parts"]},
        "bytes_sent": max(sent), "bytes_by_kind": found[sent.index(max(sent))]["bytes"], "bytes_least": max(least),
        "bytes_over_least": max(s / n for s, n in zip(sent, least, strict=True)) if plan.world > 1 else 1.0,
        "train_py_ms": 1e3 * plain if plain else None, "predicted_bare_ms": 1e3 * step_seconds(plan, job, machine),
        "predicted_alone_bare_ms": 1e3 * alone(job, machine), "machine": asdict(machine),
    }  # fmt: skip


def _rounded(value):
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def measure(args: argparse.Namespace) -> dict:
    """Each world size in turn, started as users start it."""
    measured = []
    for world in args.world:
        words = [
            "--model_config", args.model_config, "--batch_size", args.batch_size, "--seconds", args.seconds,
            "--threads", args.threads, "--device", args.device, "--wire_dtype", args.wire_dtype,
        ]  # fmt: skip
        line = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}", "-m",
                "bench.scaling", *map(str, words)]  # fmt: skip
        done = subprocess.run(line, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise BenchError(f"could not run {world} ranks: {' '.join(line)}")
        measured.append(json.loads(done.stdout.splitlines()[-1]))
    first = measured[0]
    for found in measured:
        # What neither bytes nor operations explain, taken from the first world size, is expected of the others too.
        rest = max(0.0, first["milliseconds"] - first["predicted_bare_ms"])
        found["predicted_ms"] = found["predicted_bare_ms"] + rest
        found["times_first"] = first["milliseconds"] / found["milliseconds"]
        found["predicted_times_first"] = first["predicted_ms"] / found["predicted_ms"]
        found["over_first_ms"] = {
            part: value - first["parts_ms"].get(part, 0.0) for part, value in found["parts_ms"].items()
        }
        shown = {k: v for k, v in found.items() if k != "machine"}
        print(json.dumps(jsonable(_rounded(shown)), allow_nan=False), file=sys.stderr)
    return {"model_config": args.model_config, "batch_size": args.batch_size, "threads": args.threads,
            "wire_dtype": args.wire_dtype, "measured": [_rounded(found) for found in measured]}  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    add_flags(parser)
    parser.set_defaults(world=None)
    rank_main(parser.parse_args())
