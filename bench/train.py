"""The training step, fed by the loader, beside the limits of the machine and others' embeddings in the same run.

Peers: torch's EmbeddingBag with sparse gradients (as facebookresearch/dlrm trains), and FBGEMM's table-batched
embeddings where fbgemm-gpu (or fbgemm-gpu-cpu) is installed; each in the same model, a few steps of each in turns.
Ids are drawn by a power law, as popular as those of the synthetic days; every step has a batch of its own.
"""

import argparse
import gc
import statistics
import tempfile
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from bench import train_limits, train_show
from bench.batches import draw_ids, fit_tables
from bench.timing import Laps
from bench.train_peers import GRAPH, OURS, ours, peers
from gpu_etl.common.packages import require
from gpu_etl.load.dataset import RecordFile
from gpu_etl.load.plain import CpuLoader
from gpu_etl.schema import COLUMNS, FIRST_SPARSE, RECORD_DTYPE
from model.config import ModelConfig, read_config
from model.training.device import choose_device
from model.training.trainer import Precision, Trainer

BATCHES = 8  # different ones, read in turns: no step finds its rows in the cache because the last one used them
# Steps before measuring (a CUDA graph is recorded for each slot after some), in one turn, and measured at least.
WARM_UP, TURN, LEAST = {"cpu": 2, "cuda": 8}, {"cpu": 2, "cuda": 20}, {"cpu": 4, "cuda": 40}
PRECISIONS = {"float32": Precision(), "amp": Precision(torch.bfloat16), "fp16": Precision(torch.float16, 1024.0, True)}
USUAL = {"cpu": ["float32", "amp"], "cuda": ["float32", "amp", "fp16"]}
DEFAULT = [("official_config", {"cpu": [2048, 16384], "cuda": [2048, 8192, 16384, 32768, 65536]}),
           ("mlperf_40m.limit", {"cpu": [2048], "cuda": [2048, 8192, 16384, 32768, 65536]})]  # fmt: skip


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of this benchmark."""
    parser.add_argument(
        "--model_config", nargs="+", metavar="NAME|FILE", help="default: official_config mlperf_40m.limit"
    )
    parser.add_argument(
        "--batch_size", type=int, nargs="+", metavar="B",
        help="default: 2048 and 16384 on a CPU (mlperf_40m: 2048), 2048 to 65536 on a GPU",
    )  # fmt: skip
    parser.add_argument("--seconds", type=float, default=3.0, help="of measuring each, at 4 steps or more (default: 3)")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    parser.add_argument(
        "--table_gib", type=float, default=0.0, metavar="G",
        help="memory for tables; the largest are cut to fit (default: 1.5 on a CPU, 70 %% of what is free on a GPU, "
        "half of that beside FBGEMM's)",
    )  # fmt: skip
    parser.add_argument(
        "--precision", nargs="+", choices=PRECISIONS, help="default: float32 amp, on a GPU fp16 too, which peers lack"
    )
    parser.add_argument("--quick", action="store_true", help="a few steps of a small batch: does it run at all?")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a PNG there")


@dataclass
class Timed:
    """A trainer, and the seconds of its measured steps: feeding (on a GPU, what it waits for that), and the step."""

    trainer: Trainer
    batches: object
    feed: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)

    def turn(self, steps: int, count: bool) -> None:
        """Some steps, with batches from the loader; nothing waits for the device in between."""
        laps = Laps(self.trainer.device)
        for _ in range(steps):
            batch = next(self.batches)
            laps.mark()
            self.trainer.step(batch)
            laps.mark()
        times = laps.take()
        if count:
            self.feed += times[::2]
            self.step += times[1::2]

    def figures(self, rows: int) -> dict:
        """Median samples/s, feeding included, and its spread (quartiles' distance over the median); time per part."""
        whole = [a + b for a, b in zip(self.feed, self.step, strict=True)]
        low, middle, high = statistics.quantiles(whole, n=4)
        shares = self.trainer.clock.shares()
        feed, step = (statistics.median(seconds) / rows * 1e6 for seconds in (self.feed, self.step))
        return {
            "samples_per_second": round(rows / middle), "spread": round((high - low) / middle, 3), "steps": len(whole),
            "microseconds_per_sample": {
                "feed": round(feed, 3), **{part: round(share * step, 3) for part, share in shares.items()}
            },
        }  # fmt: skip


def write_records(path: Path, sizes: tuple[int, ...], rows: int) -> None:
    """Records int32 [rows, 40]: integers below 1,000, ids by a power law."""
    generator = np.random.default_rng(0)
    records = generator.integers(0, 1000, (rows, COLUMNS), RECORD_DTYPE)
    records[:, 0] &= 1
    records[:, FIRST_SPARSE:] = draw_ids(sizes, rows, generator)
    records.tofile(path)


def endless(loader: CpuLoader):
    """Batches, epoch after epoch."""
    while True:
        yield from loader.batches()


def measure_one(config: ModelConfig, rows: int, precision: Precision, device: torch.device, seconds: float) -> dict:
    """Figures of all trainers by name, at one batch size and precision; a few steps of each in turns. On a GPU, then
    those of ours as a CUDA graph."""
    gc.collect()  # trainers refer to themselves, and hold gigabytes
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "records.bin"
        write_records(path, config.categorical_feature_sizes, BATCHES * rows)
        loader = CpuLoader(RecordFile(path), rows, device)
        mine = ours(config, precision, device)
        trainers = {OURS: mine, **({} if mine.loss_scale else peers(mine))}  # which know of no step to skip
        figures = in_turns({name: Timed(trainer, endless(loader)) for name, trainer in trainers.items()}, rows, seconds)
        if device.type == "cuda":
            del trainers
            mine.use_cuda_graphs()
            figures |= in_turns({GRAPH: Timed(mine, endless(loader))}, rows, seconds)
    figures[OURS]["matrices"] = str(mine.matrices).removeprefix("torch.")
    return figures


def in_turns(timed: dict[str, Timed], rows: int, seconds: float) -> dict:
    """Figures by name, over so many seconds of steps each."""
    kind = next(iter(timed.values())).trainer.device.type
    for one in timed.values():
        one.turn(WARM_UP[kind], False)
        one.trainer.clock.clear()
    while any(sum(one.step) < seconds or len(one.step) < LEAST[kind] for one in timed.values()):
        for one in timed.values():
            if sum(one.step) < seconds or len(one.step) < LEAST[kind]:
                one.turn(TURN[kind], True)
    return {name: one.figures(rows) for name, one in timed.items()}


def default_table_bytes(device: torch.device) -> float:
    """Memory for tables: on a CPU, and on a GPU where FBGEMM brings tables of its own, what leaves room for as many
    again; else most of a GPU's. The rest is for activations and sparse gradients."""
    if device.type == "cpu":
        return 1.5 * 2**30
    return (0.35 if find_spec("fbgemm_gpu") else 0.7) * torch.cuda.mem_get_info()[0]


def plan(args: argparse.Namespace, device: torch.device) -> list[tuple[str, list[int]]]:
    """Configurations by name, and their batch sizes."""
    chosen = dict(DEFAULT)
    names = args.model_config or list(chosen)
    if args.quick:
        return [(name, args.batch_size or [64]) for name in names[:1]]
    return [(name, args.batch_size or chosen.get(name, chosen["official_config"])[device.type]) for name in names]


def measure(args: argparse.Namespace) -> dict:
    """Samples/s and shares of the limits for every configuration, batch size and precision; those of our fastest."""
    if args.plot:
        require("matplotlib", "--plot")
    device = choose_device(args.device)
    rates = {dtype: train_limits.matrix_operations(dtype, device) for dtype in (torch.float32, torch.bfloat16)}
    bandwidth, measured = train_limits.copy_bytes(device), []
    for name, batch_sizes in plan(args, device):
        whole, _ = read_config(name)
        config = fit_tables(whole, args.table_gib * 2**30 or default_table_bytes(device))
        rows_kept, rows_asked = (sum(c.categorical_feature_sizes) for c in (config, whole))
        for rows in batch_sizes:
            for label in args.precision or USUAL[device.type]:
                found = measure_one(config, rows, PRECISIONS[label], device, 0.0 if args.quick else args.seconds)
                fastest = rates[torch.float32] if label == "float32" else max(rates.values())
                limits = {"operations": fastest / train_limits.operations(config),
                          "bytes": bandwidth / train_limits.table_bytes(config)}  # fmt: skip
                mine = max(found[name]["samples_per_second"] for name in (OURS, GRAPH) if name in found)
                measured.append({
                    "model_config": name, "embedding_rows": rows_kept, "embedding_rows_asked": rows_asked,
                    "batch_size": rows, "precision": label, "results": found,
                    "limits_samples_per_second": {key: round(value) for key, value in limits.items()},
                    "share_of_limit": {key: round(mine / value, 3) for key, value in limits.items()},
                    "times_peer": {peer: round(mine / figures["samples_per_second"], 2)
                                   for peer, figures in found.items() if peer not in (OURS, GRAPH)},
                })  # fmt: skip
                train_show.say(measured[-1])
    result = {
        "device": str(device), "threads": torch.get_num_threads(), "measured": measured,
        "matrix_operations_per_second": {str(dtype)[6:]: round(rate) for dtype, rate in rates.items()},
        "copy_bytes_per_second": round(bandwidth),
    }  # fmt: skip
    train_show.table(result)
    if args.plot:
        train_show.plot(result, args.plot)
    return result
