"""Each slab function by itself, on the CPU or a GPU: GB/s of text, and the share of the device's own copy speed."""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np

from bench import frames
from bench.kernels import ROW_BYTES
from gpu_etl.backend import select as backend
from gpu_etl.common.buffers import ScratchBuffer
from gpu_etl.raw.synthetic import write_days
from gpu_etl.schema import COLUMNS, FIRST_SPARSE, choose_preset

COPY_BYTES = 256 << 20
BUCKETS = 64
# The kernels behind each function; what they move is least for the CPU too.
KERNELS = {
    "find rows": ("_count_newlines", "_write_newlines"), "parse": ("_parse",), "summarize": ("_summarize",),
    "integers": ("_integers",), "code": ("_insert", "_code"), "group": ("_count_buckets", "_take_places", "_to_rows"),
    "shuffled": ("_keys",), "finish": ("_finish",),
}  # fmt: skip


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of this benchmark."""
    parser.add_argument("--device", default="auto", choices=backend.DEVICES, help="auto: the CPU (default)")
    parser.add_argument("--rows", type=int, default=1 << 18, metavar="N", help="of the slab (default: 262,144)")
    parser.add_argument("--repeat", type=int, default=9, metavar="N", help="of which the median counts (default: 9)")
    parser.add_argument("--no-peer", action="store_true", help="without pandas, or cuDF on a GPU")


def seconds_of(
    function: Callable[..., object], wait: Callable[[], None], repeat: int, prepare: Callable[[], tuple] = tuple
) -> float:
    """Median seconds of function(*prepare()), its work on the device included, that of prepare() left out."""
    times = []
    for _ in range(repeat + 1):
        arguments = prepare()
        wait()
        start = time.perf_counter()
        function(*arguments)
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def _waiter(device: str) -> Callable[[], None]:
    """What waits for the device's work."""
    if device == "cuda":
        from numba import cuda

        return cuda.synchronize
    return lambda: None


def _copy_speed(device: str, wait: Callable[[], None]) -> float:
    """Bytes/s that a copy within the device's memory reads and writes."""
    if device == "cuda":
        from numba import cuda

        here, there = (cuda.device_array(COPY_BYTES, np.uint8) for _ in range(2))
        return 2 * COPY_BYTES / seconds_of(lambda: there.copy_to_device(here), wait, 9)
    here, there = np.ones(COPY_BYTES, np.uint8), np.empty(COPY_BYTES, np.uint8)
    return 2 * COPY_BYTES / seconds_of(lambda: np.copyto(there, here), wait, 3)


def _functions(kernels: ModuleType, text: np.ndarray) -> dict[str, tuple[Callable, Callable[[], tuple]]]:
    """The passes over one slab, function by function, each with what makes its arguments anew: some work in place, and
    a slab's memory is used again."""
    dictionaries = kernels.Dictionaries(choose_preset("count"), kernels.set_threads(0))

    def parsed() -> tuple:
        return kernels.parse(text, kernels.find_rows(text))[:2]

    def coded() -> tuple:
        values, missing = parsed()
        dictionaries.code(values, missing, 0)
        return (values,)

    (values,) = coded()
    n, memory = len(values), ScratchBuffer(kernels.host_bytes)
    numbered = kernels.group(values, 0, 0, 1, memory)()[0].copy()
    most = numbered["coded"][:, FIRST_SPARSE:].max(0)
    ids = tuple(np.arange(1 + column, dtype=np.int32) for column in most)
    finisher = kernels.Finisher(ids, np.zeros(1, np.int64))
    records = kernels.host_bytes(n * COLUMNS * 4).view(np.int32).reshape(n, COLUMNS)
    found: list = []

    def find_rows() -> None:
        found.append(kernels.find_rows(text))

    def given_back() -> tuple:
        while found:
            kernels.parse(text, found.pop())  # which gives back the memory of its text
        return ()

    def all_kept() -> tuple:
        values, missing = parsed()
        return kernels.keep_rows(values, missing, np.ones(n, bool))  # of other rows, statistics may be known

    return {
        "find rows": (find_rows, given_back),
        "parse": (lambda rows: kernels.parse(text, rows), lambda: given_back() or (kernels.find_rows(text),)),
        "summarize": (kernels.summarize, all_kept),
        "integers": (kernels.integers, parsed),
        "code": (lambda values, missing: dictionaries.code(values, missing, 0), parsed),
        "group": (lambda values: kernels.group(values, 0, 0, BUCKETS, memory)(), coded),
        "shuffled": (lambda: finisher.take_shuffled(numbered, 0)(), tuple),
        "finish": (lambda: finisher.finish(0, n, records)(), tuple),
    }


def measure(args: argparse.Namespace) -> dict:
    """GB/s of text of each function; those of a GPU hold the copies that they wait for."""
    device = "cuda" if args.device == "cuda" else "cpu"
    kernels = backend.device(args.device)
    wait = _waiter(device)
    with tempfile.TemporaryDirectory() as folder:
        write_days(Path(folder), rows=2 * args.rows, days=2, seed=0, compress=False)
        stored = (Path(folder) / "day_0").read_bytes()
    text = kernels.host_bytes(len(stored))
    text[:] = np.frombuffer(stored, np.uint8)
    copy = _copy_speed(device, wait)
    found = {}
    for name, (function, prepare) in _functions(kernels, text).items():
        seconds = seconds_of(function, wait, args.repeat, prepare)
        moved = args.rows * sum(ROW_BYTES[kernel] for kernel in KERNELS[name])
        found[name] = {
            "text_gigabytes_per_second": round(len(text) / seconds / 1e9, 3),
            "share_of_copy_speed": round(moved / seconds / copy, 4),
        }
        print(f"{name:10} {found[name]}", file=sys.stderr)
    together = 1 / sum(1 / figures["text_gigabytes_per_second"] for figures in found.values())
    result = {
        "device": device, "rows": args.rows, "text_bytes_a_row": round(len(text) / args.rows, 1),
        "copy_gigabytes_per_second": round(copy / 1e9, 1), "functions": found,
        "together_text_gigabytes_per_second": round(together, 3),
        "together_rows_per_second": round(together * 1e9 * args.rows / len(text)),
    }  # fmt: skip
    peer = None if args.no_peer else frames.choose(device)
    if peer:
        frame = frames.parse(peer, stored)
        parse = seconds_of(lambda: frames.parse(peer, stored), wait, 1)
        count = seconds_of(lambda: frames.count(peer, frame), wait, 1)
        ours = (1 / found[name]["text_gigabytes_per_second"] for name in ("find rows", "parse"))
        result["peer"] = {
            "name": peer.__name__, "parse_text_gigabytes_per_second": round(len(text) / parse / 1e9, 3),
            "times_parse": round(parse / (sum(ours) * len(text) / 1e9), 1),
            "count_text_gigabytes_per_second": round(len(text) / count / 1e9, 3),
            "times_count": round(count * 1e9 / len(text) * found["code"]["text_gigabytes_per_second"], 1),
        }  # fmt: skip
        print(f"{peer.__name__:10} {result['peer']}", file=sys.stderr)
    return result
