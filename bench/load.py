"""Data set -> batches: this project's loaders beside torch's DataLoader, alone and with the training step."""

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch

from bench import load_show, machine
from bench.command import BenchError
from bench.load_peers import Blocks, data_loader, per_row
from gpu_etl.common.packages import install_command, is_there, require
from gpu_etl.load.dali import DaliLoader
from gpu_etl.load.dataset import DataSet, open_dataset
from gpu_etl.load.plain import CpuLoader
from gpu_etl.load.resident import ResidentLoader
from gpu_etl.load.sources import Source
from gpu_etl.load.unpack import CHUNK_ROWS, empty_block
from gpu_etl.schema import COLUMNS, DENSE, FIRST_DENSE, FIRST_SPARSE, RECORD_DTYPE
from model.config import ModelConfig, read_config
from model.dlrm import DLRM
from model.training.device import choose_device
from model.training.schedule import Schedule
from model.training.trainer import Precision, Trainer

PEER = "DataLoader, blocks"  # ratios are to this one
NO_DISK = ("device-resident", "DataLoader, rows")  # one reads nothing, of the other too little is read
FRESH_BATCHES = 4
STEP_BATCH_SIZE = {"cuda": 65536, "cpu": 2048}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of this benchmark."""
    parser.add_argument("--rows", type=int, default=1_000_000, metavar="N", help="records to read (default: 1,000,000)")
    parser.add_argument("--batch_size", type=int, nargs="+", default=[2048, 16384, 65536, 131072], metavar="B")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"), help="that batches go to")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="rounds over all loaders; medians count")
    parser.add_argument("--seconds", type=float, default=0.2, help="of each measurement, at least (default: 0.2)")
    parser.add_argument(
        "--shuffle_buffer_size", type=int, nargs="+", default=[0, 1 << 18], metavar="ROWS",
        help="as train.py's flag, for its loaders; the first one counts in the training step (default: 0 262144)",
    )  # fmt: skip
    parser.add_argument("--model_config", default="official_config", metavar="NAME|FILE", help="of the training step")
    parser.add_argument("--step_batch_size", type=int, metavar="B", help="default: 65,536 on a GPU, 2,048 on a CPU")
    parser.add_argument("--steps", type=int, default=8, metavar="N", help="training steps a measurement (default: 8)")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the results there")


def write_records(folder: Path, rows: int, sizes: tuple[int, ...]) -> DataSet:
    """A data set of random rows: numbers as widely spread as Criteo's, ids popular as 1 / rank."""
    random = np.random.default_rng(0)
    records = np.empty((rows, COLUMNS), RECORD_DTYPE)
    records[:, 0] = random.random(rows) < 0.25
    records[:, FIRST_DENSE:FIRST_SPARSE] = random.lognormal(2.5, 2.5, (rows, DENSE)).clip(0, 2**31 - 1)
    for c, size in enumerate(sizes):
        records[:, FIRST_SPARSE + c] = float(size) ** random.random(rows) - 1
    for split in ("train", "test"):
        (records if split == "train" else records[:1]).tofile(folder / f"{split}_data.bin")
    return open_dataset(folder)


def loaders(source: Source, batch_size: int, device: torch.device, buffers: list[int]) -> dict[str, Callable]:
    """Every way to read the split, by name: each gives an iterator over the batches of an epoch."""
    found = {"DataLoader, rows": per_row(source, batch_size, device)}
    for workers, name in ((0, PEER), (2, "DataLoader, blocks, 2 workers")):
        found[name] = data_loader(Blocks(source, batch_size), workers, device)
    for buffer in buffers:
        kinds = {"CPU loader": CpuLoader, "DALI": DaliLoader, "device-resident": ResidentLoader}
        if not is_there("nvidia.dali"):
            del kinds["DALI"]
        for name, kind in kinds.items():
            reader = kind(source, batch_size, device, True, buffer=buffer)
            found[name + ", rows shuffled" * bool(buffer)] = reader.batches
    return found


def wait_for(device: torch.device) -> None:
    """Until the device has done all it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rate(batches: Callable[[], Iterator], device: torch.device, least: float = 0.0, most: float = math.inf) -> float:
    """Millions of rows/s over whole epochs, as many as take `least` seconds, cut off after `most`."""
    rows, start = 0, time.perf_counter()
    while not rows or time.perf_counter() - start < least:
        for batch in batches():
            rows += len(batch[2])
            if time.perf_counter() - start > most:
                break
    wait_for(device)
    return rows / (time.perf_counter() - start) / 1e6


def in_rounds(found: dict[str, Callable[[], float]], rounds: int) -> dict[str, dict]:
    """Medians over rounds in which each takes its turn: of the rates, and of their ratios to the peer's."""
    rates = {name: [] for name in found}
    for _ in range(rounds):
        for name, measured in found.items():
            rates[name].append(measured())
    return {
        name: {
            "million_rows_per_second": round(statistics.median(values), 3),
            "times_peer": round(statistics.median(a / b for a, b in zip(values, rates[PEER], strict=True)), 2),
        }
        for name, values in rates.items()
    }


def limits(source: Source, device: torch.device, seconds: float) -> dict[str, float | None]:
    """Millions of rows/s that one thread copies out of the page cache, and that move from pinned memory to the GPU."""
    rows = min(CHUNK_ROWS, source.rows)
    chunk = empty_block(rows)

    def chunks() -> Iterator:
        for begin in range(0, source.rows - rows + 1, rows):
            source.read_into(begin, begin + rows, chunk.numpy())
            yield None, None, chunk

    found = {"page_cache_to_memory": round(rate(chunks, device, seconds), 2), "memory_to_gpu": None}
    if device.type == "cuda":
        pinned = empty_block(1 << 18, pinned=True)
        moved = [(None, None, pinned)] * 20
        found["memory_to_gpu"] = round(
            rate(lambda: ((*_, block.to(device, non_blocking=True)) for *_, block in moved), device, seconds), 2
        )
    return found


def from_page_cache(data: DataSet, args: argparse.Namespace, device: torch.device) -> list[dict]:
    """Rates per batch size and loader, the files' contents in memory."""
    results, least = [], args.seconds
    for batch_size in args.batch_size:
        ways = loaders(data.splits["train"], batch_size, device, args.shuffle_buffer_size)
        for batches in ways.values():
            next(iter(batches()))  # compiled, and read into the page cache
        found = in_rounds({n: lambda b=b: rate(b, device, least, 2 * least) for n, b in ways.items()}, args.repeat)
        results.append({"batch_size": batch_size, "loaders": found})
        print(load_show.table(results[-1]), file=sys.stderr, flush=True)
    return results


def from_disk(data: DataSet, args: argparse.Namespace, device: torch.device) -> dict:
    """Rates of one epoch right after the system forgot the files' contents; each at the largest batch."""
    ways = loaders(data.splits["train"], max(args.batch_size), device, args.shuffle_buffer_size)
    ways = {name: batches for name, batches in ways.items() if not name.startswith(NO_DISK)}

    def cold(batches: Callable) -> float:
        data.drop_from_page_cache()
        return rate(batches, device)

    found = in_rounds({name: lambda b=b: cold(b) for name, b in ways.items()}, args.repeat)
    return {"batch_size": max(args.batch_size), "cold": True, "loaders": found}


def waiting_and_all(trainer: Trainer, batches: Iterator, steps: int) -> tuple[float, float]:
    """Seconds from asking for a batch until it is on the device, and seconds in all, over so many steps. The device has
    done the last step when the next batch is asked for. The first batch, for which a loader starts up, is left out."""
    trainer.step(next(batches))
    wait_for(trainer.device)
    waited, start = 0.0, time.perf_counter()
    for _ in range(steps):
        asked = time.perf_counter()
        batch = next(batches)
        wait_for(trainer.device)
        waited += time.perf_counter() - asked
        trainer.step(batch)
        wait_for(trainer.device)
    return waited, time.perf_counter() - start


def with_training_step(data: DataSet, args: argparse.Namespace, device: torch.device, config: ModelConfig) -> dict:
    """Data wait share: of the time of training steps, the part from asking for a batch until it is on the device. The
    device does nothing else meanwhile, so no run waits more. Median of rounds in which each loader takes its turn.
    samples_per_second: of the steps and the waiting, the fastest round."""
    batch_size = args.step_batch_size or STEP_BATCH_SIZE[device.type]
    torch.manual_seed(0)
    with device:
        trainer = Trainer(DLRM(config), Schedule(0.1), Precision(torch.bfloat16))
    source = data.splits["train"]
    ways = loaders(source, batch_size, device, args.shuffle_buffer_size[:1])
    held = list(islice(ResidentLoader(source, batch_size, device, True).batches(), FRESH_BATCHES))
    ways["batches that are there"] = lambda: cycle(held)
    steps = min(args.steps, len(Blocks(source, batch_size)) - 1)
    if steps < 1:
        raise BenchError(f"--rows {args.rows}: expected two batches or more of --step_batch_size {batch_size}")
    shares, rates = {name: [] for name in ways}, {name: [] for name in ways}
    for _ in range(args.repeat):
        for name, batches in ways.items():
            few = 1 if name == "DataLoader, rows" else steps
            waited, seconds = waiting_and_all(trainer, iter(batches()), few)
            shares[name].append(waited / seconds)
            rates[name].append(few * batch_size / seconds)
    found = {
        name: {"data_wait_share": round(statistics.median(shares[name]), 4), "samples_per_second": round(max(found))}
        for name, found in rates.items()
    }
    return {"batch_size": batch_size, "steps": steps, "loaders": found}


def measure(args: argparse.Namespace) -> dict:
    """Rates from page cache and disk, and the share of a training step's time that each loader costs."""
    if args.png:
        require("matplotlib", "--png")
    if not is_there("nvidia.dali"):
        print(f"DALI is missing, so it is left out: {install_command('nvidia.dali')}", file=sys.stderr)
    device = choose_device(args.device)
    config, _ = read_config(args.model_config)
    with tempfile.TemporaryDirectory() as folder:
        data = write_records(Path(folder), args.rows, config.categorical_feature_sizes)
        result = {"rows": args.rows, "device": str(device), "peer": PEER, "model_config": args.model_config}
        result["limits_million_rows_per_second"] = limits(data.splits["train"], device, args.seconds)
        result["page_cache"] = from_page_cache(data, args, device)
        result["disk"] = from_disk(data, args, device)
        print(load_show.table(result["disk"]), file=sys.stderr, flush=True)
        result["training"] = with_training_step(data, args, device, config)
        print(load_show.table(result["training"]), file=sys.stderr, flush=True)
    if args.png:
        load_show.plot(result, machine.describe(), args.png)
    return result
