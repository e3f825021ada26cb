"""Cases of test_fake_driver.py beside those of simulated.py: whole encodes, what a slab costs, and faults put back.

A case named seeded_* puts a fault back that the code once had, and holds that the fake driver finds it.
"""

import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from numba import cuda as numba_cuda

from gpu_etl import pipeline
from gpu_etl.backend.cpu import slab as cpu
from gpu_etl.backend.cuda import (
    dictionary as cuda_dictionary,
    encode as cuda_encode,
    keep as cuda_keep,
    launch as cuda_launch,
    parse as cuda_rows,
    slab as cuda,
    text as cuda_text,
)
from gpu_etl.cluster import start as cluster_start
from gpu_etl.common import buffers as memory, threads as prefetch
from gpu_etl.common.errors import DataError
from gpu_etl.passes import kept
from gpu_etl.pipeline import Settings, encode_days
from gpu_etl.rows.random_keys import start_of_keys
from gpu_etl.schema import choose_preset
from tests import reference
from tests.gpu_etl import fake_driver

SLAB = 3000  # bytes, some 11 rows


@contextmanager
def days(*rows: int) -> Iterator[list[Path]]:
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"day_{day}" for day in range(len(rows))]
        for day, (path, count) in enumerate(zip(paths, rows, strict=True)):
            path.write_bytes(reference.write_rows(seed=day, rows=count))
        yield paths


def files_of(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def agrees_with_the_cpu(paths: list[Path], **settings) -> None:
    """Both devices write the same files."""
    found = []
    for device in ("cpu", "cuda"):
        with tempfile.TemporaryDirectory() as out:
            more = settings if device == "cuda" else {k: v for k, v in settings.items() if k != "workers"}
            encode_days(paths, Path(out) / "set", Settings(**{"device": device, "slab_bytes": SLAB} | more))
            found.append(files_of(Path(out) / "set"))
    assert found[0] == found[1], settings


def seeds() -> None:
    with days(14, 4) as paths:
        for seed in range(12):
            agrees_with_the_cpu(paths, seed=seed, keep_on_device=False)


def kept_rows() -> None:
    """Rows that stay on the device between the passes, whatever is made of them."""
    with days(14, 9, 4) as paths:
        agrees_with_the_cpu(paths, seed=4)
        agrees_with_the_cpu(paths, seed=2, fractions=(0.6, 0.2, 0.2), preset=choose_preset("torchrec"))
        agrees_with_the_cpu(paths[:1], days=3)
        agrees_with_the_cpu(paths, shuffle=False, form="dist")


def more_rows_than_expected() -> None:
    """Where more rows come than the device has room for, they go into files, and so does what an earlier run kept."""
    cuda_keep.budget.left = lambda: int(1.3 * 21 * (168 + cuda_keep.SORT_BYTES) / cuda_keep.SHARE)
    pipeline.guess_rows = lambda *_: 21
    moved, real = [], kept.Store.move_to_files
    kept.Store.move_to_files = lambda self, *more: moved.append(self.kept.count) or real(self, *more)
    with days(30, 9, 4) as paths:
        agrees_with_the_cpu(paths, seed=4)
        agrees_with_the_cpu(paths, fractions=(0.6, 0.2, 0.2))
    assert len(moved) == 2 and min(moved) > 10, moved


def a_killed_run_begins_anew() -> None:
    """A run that kept its rows on the device and was killed in the encode pass; whether they are kept again or not."""
    real = kept.KeptEncodePass.run

    def killed(*_):
        raise KeyboardInterrupt

    with days(14, 4) as paths, tempfile.TemporaryDirectory() as folder:
        encode_days(paths, Path(folder) / "cpu", Settings(slab_bytes=SLAB))
        for keep in (True, False):
            settings = Settings(device="cuda", slab_bytes=SLAB)
            kept.KeptEncodePass.run = killed
            out = Path(folder) / str(keep)
            try:
                encode_days(paths, out, settings)
            except KeyboardInterrupt:
                cuda_launch.synchronize()  # this process goes on
                assert {line for line in (out / ".work" / "journal.jsonl").read_text().splitlines()}
            else:
                raise AssertionError("was not killed")
            kept.KeptEncodePass.run = real
            encode_days(paths, out, replace(settings, keep_on_device=keep))
            assert files_of(out) == files_of(Path(folder) / "cpu")


def two_readers() -> None:
    cpu.CORES_PER_READER = cuda.CORES_PER_READER = 0.5
    with days(30, 30, 10) as paths:
        agrees_with_the_cpu(paths, threads=2)


def workers() -> None:
    """Two workers of Dask, as threads of this process: each must enter the device, and leave it to the other."""
    from dask.distributed import LocalCluster

    # Without a limit: where memory is short, Dask has Python collect what is unreachable, in a thread of its own.
    workers = partial(LocalCluster, n_workers=2, threads_per_worker=1, processes=False, memory_limit=0)
    cluster_start._local_cluster = lambda settings, security: workers(dashboard_address="127.0.0.1:0")
    with days(20, 20, 10) as paths:
        agrees_with_the_cpu(paths, workers=2)


def too_many_workers() -> None:
    """More workers than there are GPUs: words, not an error of dask-cuda's."""
    sys.modules["dask_cuda"] = SimpleNamespace(LocalCUDACluster=None)
    with days(5, 5) as paths, tempfile.TemporaryDirectory() as out:
        try:
            encode_days(paths, Path(out) / "set", Settings(device="cuda", workers=2))
        except DataError as error:
            assert "each takes a GPU, and 1 are visible" in str(error)
        else:
            raise AssertionError("not refused")


WAITS = {"cuStreamSynchronize", "cuEventSynchronize", "cuCtxSynchronize"}
NEW = {
    "cuMemAlloc", "cuMemFree", "cuMemHostAlloc", "cuMemFreeHost", "cuEventCreate", "cuEventDestroy", "cuStreamCreate",
}  # fmt: skip
WARM = 9  # slabs until every buffer has its size


def slab_costs(keep: bool) -> dict[str, float]:
    """Driver calls a slab of one day, once memory has its size."""
    cuts: list[dict[str, int]] = []
    real = cuda_rows._Parser.parse

    def parse(self, text):
        cuts.append(dict(fake_driver.calls))
        return real(self, text)

    # Rows of these texts are short, and few: what grows with them has its size from the start.
    cuda_rows._Parser.parse, cuda_dictionary.FIRST_SLOTS, cuda_rows.ROW_BYTES = parse, 1 << 12, 32
    with days(220, 1) as paths, tempfile.TemporaryDirectory() as out:
        encode_days(paths, Path(out) / "set", Settings(device="cuda", slab_bytes=SLAB, keep_on_device=keep))
    slabs = len(cuts) - 2 - WARM
    assert slabs > 4
    return {name: count / slabs for name, count in (Counter(cuts[-2]) - Counter(cuts[WARM])).items()}


def steady_state() -> None:
    costs(slab_costs(keep=False), waits=2)


def steady_state_of_kept_rows() -> None:
    costs(slab_costs(keep=True), waits=1)


def costs(found: dict[str, float], waits: int) -> None:
    unwanted = {name: found[name] for name in found if name in NEW or "pageable" in name}
    assert not unwanted, unwanted
    # One in the thread that computes, for the slab's numbers; one in the thread that writes, for the rows themselves.
    waited = sum(found.get(name, 0) for name in WAITS)
    assert waited < waits + 0.5, waited  # at times a wait finds done what the next one would wait for, or not
    print({name: round(found[name], 1) for name in sorted(found) if not name.startswith("launch ")})


def found(*words: str) -> None:
    """The fault that was put back was found: it is named by these words."""
    hits = [fault for fault in fake_driver.faults if all(word in fault for word in words)]
    assert hits, (words, set(fake_driver.faults))
    fake_driver.faults.clear()


def seeded_stream_handle() -> None:
    """E1: the stream's handle taken for a ctypes number."""
    cuda_launch.stream_handle = lambda name: cuda_launch.stream(name).handle
    with days(14, 2) as paths:
        try:
            agrees_with_the_cpu(paths, keep_on_device=False)
        except AssertionError as error:
            assert "ExternalStream: expected an int" in str(error)
        else:
            raise AssertionError("not found")


def seeded_types() -> None:
    """E2: a kernel that takes its types from the first launch: for most seeds, the start of the keys is an int64."""
    undeclared = numba_cuda.jit(cuda_encode._count_buckets.py_func)

    class Undeclared:
        def launch(self, blocks, stream, *arguments):
            undeclared[blocks, 8, stream](*arguments)

    cuda_encode._count_buckets = Undeclared()
    assert [s for s in range(12) if int(start_of_keys(np.uint64(s))) < 2**63] == [2, 4, 5, 6, 9, 10, 11]
    wrong = []
    for seed in (0, 1, 2):
        try:
            with days(14, 2) as paths:
                agrees_with_the_cpu(paths, seed=seed, keep_on_device=False)
        except (AssertionError, TypeError):
            wrong.append(seed)
    assert wrong == [2], wrong
    assert {types[0] for types in fake_driver.launched_types["_count_buckets"]} == {"int64", "uint64"}
    fake_driver.faults.clear()


def seeded_streams() -> None:
    """E3: two threads that come first each make a stream of the same name."""
    real, twice = cuda_launch.stream, []

    def stream(name):
        if name != "up":
            return real(name)
        twice.append(numba_cuda.stream())
        return twice[-1]

    cuda_launch.stream = cuda_text.stream = stream
    text = cuda_launch.host_bytes(SLAB)
    rows = np.frombuffer(reference.write_rows(seed=1, rows=20), np.uint8)[:SLAB]
    text[:] = rows
    cuda.parse(text, cuda.find_rows(text))
    found("nothing puts HtoD before _count_newlines")


def seeded_context() -> None:
    """E4: a thread that waits for the device without having entered it."""
    prefetch.BackgroundWorker.__init__ = _without_initializer(prefetch.BackgroundWorker.__init__)
    with days(30, 2) as paths:
        agrees_with_the_cpu(paths, keep_on_device=False)
    found("no context is current in the thread", "cuEventSynchronize")


def _without_initializer(real):
    def init(self, *_):
        real(self)

    return init


def seeded_pinned() -> None:
    """E11: a bucket is read into memory that an earlier one is still copied from."""
    memory.ScratchBuffer.hold = lambda self, wait: None
    real = cuda.Finisher.finish

    def finish(self, *arguments):
        wait = real(self, *arguments)
        return lambda: time.sleep(0.3) or wait()  # a device that is behind, and a reader that is not

    cuda.Finisher.finish = finish
    cpu.BUCKET_BYTES = cuda.BUCKET_BYTES = 1 << 10
    with days(60, 2) as paths, suppress(AssertionError):
        agrees_with_the_cpu(paths, keep_on_device=False)
    found("pinned memory changed before it was copied")


def rules() -> None:
    """Presets, forms and rows that are left out."""
    with days(24, 12) as paths:
        paths[0].write_bytes(paths[0].read_bytes() + b"not a row\n\n")
        agrees_with_the_cpu(paths, bad_rows="skip", preset=choose_preset("torchrec"))
        agrees_with_the_cpu(paths, bad_rows="skip", preset=choose_preset("deepspark", sample=0.7, sample_last=0.8))
        agrees_with_the_cpu(paths, bad_rows="skip", form="dle", shuffle=False)
