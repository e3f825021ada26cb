"""The stages of an encode one by one, and which of them limits the host of a GPU on a machine with 16 cores.

Each stage runs alone on the same synthetic rows, with 1 thread and with 2. Its rate a core is by processor time, which
other work on the machine changes less than the clock's. See PREDICTION for what is made of it.
"""

import hashlib
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import ModuleType

import numpy as np

from gpu_etl.backend.cpu import slab as cpu
from gpu_etl.common.append import append, open_cut
from gpu_etl.common.buffers import ScratchBuffer
from gpu_etl.common.codecs import read_gzip
from gpu_etl.common.threads import Crew
from gpu_etl.passes.buckets import Buckets
from gpu_etl.passes.count import CountPass
from gpu_etl.passes.journal import Journal
from gpu_etl.raw.reader import open_sources, read_day
from gpu_etl.raw.synthetic import write_days
from gpu_etl.rows.numbered import NUMBERED
from gpu_etl.rows.random_keys import keys_of
from gpu_etl.rows.statistics import Summary
from gpu_etl.schema import COLUMNS, SPARSE, choose_preset

CORES, BUCKETS, THREADS = 16, 32, (1, 2)
PREDICTION = (
    f"{CORES} cores, a GPU that parses, codes, groups and sorts: rates a core times the threads that a stage may use, "
    "by the device's CORES_PER_READER and CORES_PER_WRITER; one for records and one for their SHA-256, as file systems "
    "take buffered writes to one file one by one and SHA-256 cannot be cut. Assumed: cores like this one, "
    "files in the page cache, memory that carries them all"
)


def _timed(call: Callable[[], object], size: int, repeat: int) -> tuple[float, float]:
    """GB/s of `size` bytes: the best by the clock, the best by processor time."""
    found = []
    for _ in range(repeat + 1):
        start = time.perf_counter(), time.process_time()
        call()
        found.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    clock, processor = (min(times) for times in zip(*found[1:], strict=True))
    return size / clock / 1e9, size / max(processor, 1e-9) / 1e9


def _read(path: Path, threads: int) -> None:
    for slab in read_day(open_sources([path])[0], 0, cpu.SLAB_BYTES, threads=threads):
        slab.release()


def _inflate(path: Path, threads: int) -> None:
    """A file a thread, as packed text cannot be cut."""

    def one() -> None:
        with open(path, "rb") as stored, read_gzip(stored) as file:
            while file.read(1 << 20):
                pass

    with Crew(threads) as crew:
        crew.run([one] * threads)


def _buckets(folder: Path) -> Buckets:
    folder.mkdir()
    return Buckets(folder, BUCKETS, 0, [0])


def _write_buckets(buckets: Buckets, rows: tuple[np.ndarray, np.ndarray], threads: int) -> None:
    """Behind what is there, as truncating a file costs too."""
    with Crew(threads) as buckets.crew:
        buckets.add(*rows)


def _read_buckets(buckets: Buckets, memory: ScratchBuffer, threads: int) -> None:
    with Crew(threads) as buckets.crew:
        for bucket in range(BUCKETS):
            buckets.read(bucket, memory)


def _stages(folder: Path, text: np.ndarray) -> dict[str, tuple[Callable[[int], object], int]]:
    """Stage -> what runs it with so many threads, and the bytes of text of a thread (0: of all together)."""
    ends = cpu.find_rows(text)
    values, missing, _ = cpu.parse(text, ends)
    raw, preset = values.copy(order="F"), choose_preset("count")
    dictionaries = {threads: cpu.Dictionaries(preset, threads) for threads in THREADS}
    cpu.integers(values, missing)
    dictionaries[1].code(values, missing, 0)
    numbered, bucket_ends = cpu.group(values, 0, 0, BUCKETS, ScratchBuffer())()
    numbers = np.ascontiguousarray(numbered["row"])
    ids = tuple(np.arange(1 + values[:, 14 + c].max(), dtype=np.int32) for c in range(SPARSE))
    finisher, records = cpu.Finisher(ids, np.zeros(1, np.int64)), np.empty((len(ends), COLUMNS), np.int32)
    finisher.take_shuffled(numbered, 0)
    memory, file = ScratchBuffer(), open_cut(folder / "records", 0)
    written, read = _buckets(folder / "written"), _buckets(folder / "read")
    read.add(numbered, bucket_ends)

    def summarize(threads: int) -> None:
        cpu.summarize(raw, missing)
        cpu.integers(raw, missing)

    return {
        "read": (lambda threads: _read(folder / "day_0", threads), 0),
        "inflate": (lambda threads: _inflate(folder / "packed" / "day_0.gz", threads), 1),
        "find rows": (lambda threads: cpu.find_rows(text), 0),
        "parse": (lambda threads: cpu.parse(text, ends, memory), 0),
        "summarize and integers": (summarize, 0),
        "code": (lambda threads: dictionaries[threads].code(raw.copy(order="F"), missing, 0), 0),
        "group": (lambda threads: cpu.group(values, 0, 0, BUCKETS, memory)(), 0),
        "write buckets": (lambda threads: _write_buckets(written, (numbered, bucket_ends), threads), 0),
        "read buckets": (lambda threads: _read_buckets(read, memory, threads), 0),
        "argsort keys": (lambda threads: np.argsort(keys_of(0, numbers)), 0),
        "finish": (lambda threads: finisher.finish(0, len(records), records)(), 0),
        "write records": (lambda threads: (append(file, records), file.truncate(0)), 0),
        "sha256 of records": (lambda threads: hashlib.sha256(records), 0),
    }


def _null_device(text: np.ndarray) -> ModuleType:
    """The CPU's functions, but for those that a GPU has: they hand out rows of the right shape and compute nothing."""
    ends = cpu.find_rows(text)
    row_bytes, most = len(text) / len(ends), 2 * len(ends)
    values, missing, faults = np.zeros((most, 1), np.uint32), np.zeros(most, np.uint64), np.zeros(most, np.int32)
    numbered = np.zeros(most, NUMBERED)

    class Dictionaries:
        nbytes = 0

        def __init__(self, *_):
            pass

        def new_keys(self):
            return lambda: [np.empty(0, np.uint32)] * SPARSE

        code = counts = close = lambda self, *_: None

    def parse(text: np.ndarray, ends, memory):
        rows = min(most, round(len(text) / row_bytes))
        return values[:rows], missing[:rows], faults[:rows]

    def group(values: np.ndarray, first: int, seed: int, buckets: int, memory: ScratchBuffer):
        rows = len(values)
        return lambda: (numbered[:rows], np.arange(1, buckets + 1) * rows // buckets)

    module = ModuleType("null_device")
    vars(module).update({name: value for name, value in vars(cpu).items() if name[0] != "_"})
    vars(module).update(
        Dictionaries=Dictionaries, find_rows=lambda text: None, parse=parse, rows_end=lambda text, _: len(text),
        group=group, summarize=lambda *_: Summary(0, [0] * COLUMNS, 0), integers=lambda *_: None,
    )  # fmt: skip
    return module


def _whole_pass(folder: Path, device: ModuleType, threads: int) -> None:
    """The count pass with `threads` readers and writers."""
    device.CORES_PER_READER = device.CORES_PER_WRITER = 1
    with tempfile.TemporaryDirectory(dir=folder) as work, closing(Journal(Path(work) / "journal.jsonl")) as journal:
        counting = CountPass(
            device, open_sources([folder / "day_0"]), choose_preset("count"), 0, journal, Path(work), threads,
            "error", 0, [True],
        )  # fmt: skip
        with closing(Buckets(Path(work), BUCKETS, 0, [0])) as buckets, Crew(threads) as buckets.crew:
            counting.run(cpu.SLAB_BYTES, buckets)


def predict(rates: dict[str, float]) -> dict:
    """rates: GB/s of text a core by stage -> those of each host stage and pass on CORES cores, and what limits."""
    from gpu_etl.backend.cuda import slab as cuda

    readers, writers = CORES // cuda.CORES_PER_READER, CORES // cuda.CORES_PER_WRITER
    threads = {
        "count": {"read": readers, "write buckets": writers},
        "encode": {"read buckets": writers, "write records": 1, "sha256 of records": 1},
    }
    stages = {name: {stage: rates[stage] * n for stage, n in of.items()} for name, of in threads.items()}
    return {
        "assumptions": PREDICTION, "threads": threads,
        "text_gigabytes_per_second": {
            name: {stage: round(rate, 2) for stage, rate in of.items()} for name, of in stages.items()
        },
        "passes": {name: round(min(of.values()), 2) for name, of in stages.items()},
        "limited_by": {name: min(of, key=of.get) for name, of in stages.items()},
    }  # fmt: skip


def measure(rows: int, repeat: int) -> dict:
    """GB/s of text of each stage, of the whole count pass with a device that computes nothing, and the prediction."""
    found, rates = {}, {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_days(folder, rows=2 * rows, days=2, seed=0, compress=False)
        write_days(folder / "packed", rows=2 * rows, days=2, seed=0, compress=True)
        text = np.fromfile(folder / "day_0", np.uint8)
        for stage, (call, per_thread) in _stages(folder, text).items():
            by_threads = []
            for n in THREADS:
                cpu.set_threads(n)
                size = len(text) * (n if per_thread else 1)
                by_threads.append(_timed(lambda call=call, n=n: call(n), size, repeat))
            (one, rates[stage]), (two, _) = by_threads
            shown = {"per_core": rates[stage], "one_thread": one, "two_threads": two}
            found[stage] = {name: round(rate, 3) for name, rate in shown.items()}
            print(f"{stage:24} {found[stage]}", file=sys.stderr)
        device, passes = _null_device(text), {}
        for n in THREADS:
            done = _timed(lambda n=n: _whole_pass(folder, device, n), len(text), repeat)
            passes[f"{n}_threads"] = [round(rate, 3) for rate in done]
    return {
        "rows": rows, "text_bytes_a_row": round(len(text) / rows, 1), "stages_text_gigabytes_per_second": found,
        "count_pass_with_null_device": passes | {"figures": ["by the clock", "by processor time"]},
        "prediction": predict(rates),
    }  # fmt: skip
