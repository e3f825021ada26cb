"""Cases of test_cuda.py, each run in a process of its own: in Numba's simulator, or on a GPU.

NUMBA_ENABLE_CUDASIM=1 NUMBA_DISABLE_JIT=1 python -m tests.gpu_etl.simulated parse
"""

import hashlib
import sys
import tempfile
import warnings
import zlib
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numba import config

from gpu_etl.backend.cuda import kernel as cuda_kernel

SIMULATED = bool(config.ENABLE_CUDASIM)
if SIMULATED:
    cuda_kernel.THREADS = 8  # a thread of the simulator is one of the operating system
    warnings.filterwarnings("ignore", "overflow encountered")  # uint64 wraps around, as it should

from gpu_etl.backend.cpu import slab as cpu  # noqa: E402
from gpu_etl.backend.cuda import (  # noqa: E402 - after THREADS
    dictionary as cuda_dictionary,
    gds as cuda_direct,
    launch as cuda_launch,
    parquet as cuda_parquet,
    slab as cuda,
)
from gpu_etl.common.buffers import ScratchBuffer  # noqa: E402
from gpu_etl.common.errors import DataError, DeviceMemoryError  # noqa: E402
from gpu_etl.passes import count as counting  # noqa: E402
from gpu_etl.pipeline import Settings, encode_days  # noqa: E402
from gpu_etl.raw.parquet import ROW_BYTES, _plain  # noqa: E402
from gpu_etl.raw.reader import open_sources, read_day  # noqa: E402
from gpu_etl.raw.source import Source  # noqa: E402
from gpu_etl.rows import scalar as rows  # noqa: E402
from gpu_etl.rows.numbered import NUMBERED, first_number  # noqa: E402
from gpu_etl.schema import COLUMN_NAMES, choose_preset  # noqa: E402
from tests import reference  # noqa: E402
from tests.gpu_etl import test_inputs as inputs  # noqa: E402

ROWS = 40 if SIMULATED else 200_000
if SIMULATED:
    cuda_dictionary.HOT, cuda_dictionary.FIRST_SLOTS = 4, 16


def texts() -> dict[str, bytes]:
    """Slabs of every kind."""
    plain = reference.write_rows(seed=3, rows=ROWS)
    row = plain.splitlines()[0]
    bad = [b"", b"0", b"2" + b"\t" * 39, b"1" + b"\tx" * 39, b"1" + b"\t99999999999" * 13 + b"\t" * 26, row + b"\t"]
    return {
        "ragged": plain, "no last newline": plain[:-1], "crlf": plain.replace(b"\n", b"\r\n"), "one row": row,
        "equal": (row + b"\n") * 20, "empty fields": (b"0" + b"\t" * 39 + b"\n") * 5, "nothing": b"",
        "extremes": b"1" + b"\t-2147483648" * 13 + b"\tffffffff" * 26 + b"\n0" + b"\t2147483647" * 13 + b"\t0" * 26,
        "bad rows": b"\n".join([row, *bad, row, *bad]) + b"\n",
    }  # fmt: skip


def parsed(text: bytes):
    """(values, missing, faults) of the CPU, and the same on the device."""
    array = np.frombuffer(text, np.uint8)
    return cpu.parse(array, cpu.find_rows(array)), cuda.parse(array, cuda.find_rows(array))


def columns_of(device) -> np.ndarray:
    """Values of a slab on the device, on the host: uint32 [n, 40]."""
    return cuda.rows_of(device, ScratchBuffer(cuda.host_bytes))().view(np.uint32)


def missing_of(missing, rows) -> np.ndarray:
    """What is missing of the rows of a slab on the device, on the host: uint64 [n]."""
    return cuda_launch.download(missing)[: len(rows)]


def same(missing, rows, host) -> None:
    np.testing.assert_array_equal(missing_of(missing, rows), host)


def same_values(device, host) -> None:
    np.testing.assert_array_equal(columns_of(device), host)


def parse() -> None:
    for name, text in texts().items():
        (values, missing, faults), (on_device, missing_there, faults_there) = parsed(text)
        np.testing.assert_array_equal(faults, faults_there, err_msg=name)
        good = faults == 0
        np.testing.assert_array_equal(columns_of(on_device)[good], values[good], err_msg=name)
        np.testing.assert_array_equal(missing_of(missing_there, on_device)[good], missing[good], err_msg=name)


def slab_functions() -> None:
    for name in ("ragged", "empty fields", "nothing"):
        (values, missing, _), (on_device, missing_there, _) = parsed(texts()[name])
        np.testing.assert_array_equal(cuda.labels(on_device), cpu.labels(values))
        assert cuda.summarize(on_device, missing_there) == cpu.summarize(values, missing)
        keep = np.arange(len(values)) % 3 != 1
        kept, kept_there = cpu.keep_rows(values, missing, keep), cuda.keep_rows(on_device, missing_there, keep)
        same_values(kept_there[0], kept[0])
        same(kept_there[1], kept_there[0], kept[1])
        same_values(*reversed([kept[0], cuda.upload(*kept)[0]]))
        for shift, empty_value in ((0, 0), (2, 0), (5, 7)):
            host, there = values.copy(order="F"), cuda.upload(values, missing)[0]
            cpu.integers(host, missing, shift, empty_value)
            cuda.integers(there, missing_there, shift, empty_value)
            same_values(there, host)
        np.testing.assert_array_equal(columns_of(on_device), cpu.rows_of(values, ScratchBuffer())().view(np.uint32))
        first = first_number(3) + 5
        for buckets in (1, 7):
            numbered, ends = cpu.group(values, first, 9, buckets, ScratchBuffer())()
            there, ends_there = cuda.group(on_device, first, 9, buckets, ScratchBuffer(cuda.host_bytes))()
            np.testing.assert_array_equal(ends, ends_there)
            for begin, end in zip([0, *ends[:-1]], ends, strict=True):
                np.testing.assert_array_equal(np.sort(there[begin:end], order="row"), numbered[begin:end])


def as_set(column) -> set:
    return set(zip(column.keys.tolist(), column.counts.tolist(), column.first_rows.tolist(), strict=True))


def dictionaries() -> None:
    for preset in (choose_preset("count"), choose_preset("mlperf", max_index_range=50)):
        (values, missing, _), (on_device, missing_there, _) = parsed(texts()["ragged"])
        host, there = cpu.Dictionaries(preset, 1), cuda.Dictionaries(preset, 1)
        keys = [[] for _ in range(26)]
        cuts = [0, ROWS // 4, ROWS // 4 + 1, ROWS]
        for begin, end in pairwise(cuts):
            keep = (np.arange(ROWS) >= begin) & (np.arange(ROWS) < end)
            piece, piece_there = cpu.keep_rows(values, missing, keep), cuda.keep_rows(on_device, missing_there, keep)
            host.code(*piece, begin)
            there.code(*piece_there, begin)
            for column, new in zip(keys, there.new_keys()(), strict=True):
                column.append(new)
            coded = columns_of(piece_there[0])
            found = [counts.keys for counts in there.counts().columns]
            for c in range(26):
                values_there = np.concatenate([[0], found[c]])[coded[:, 14 + c]]
                values_here = np.concatenate([[0], host.counts().columns[c].keys])[piece[0][:, 14 + c]]
                np.testing.assert_array_equal(values_there, values_here)
        again = cuda.Dictionaries(preset, 1, [np.concatenate(column) for column in keys])
        again.recount(coded.view(np.int32), np.arange(cuts[2], ROWS))
        for c in range(26):
            one, other = host.counts().columns[c], there.counts().columns[c]
            assert as_set(one) == as_set(other)
            np.testing.assert_array_equal(again.counts().columns[c].keys, other.keys)
            expected = np.bincount(coded[:, 14 + c], minlength=len(other.keys) + 1)[1:]
            np.testing.assert_array_equal(again.counts().columns[c].counts, expected)
        assert there.nbytes > 26 * 16 * 8


def finish() -> None:
    random = np.random.default_rng(0)
    ids = tuple(random.integers(0, 1000, 30 + c).astype(np.int32) for c in range(26))
    coded = random.integers(0, 30, (ROWS, 40)).astype(np.int32)
    coded[0, 1:14] = 2**31 - 1
    numbered = np.empty(ROWS, NUMBERED)
    numbered["coded"], numbered["row"] = coded, random.permutation(ROWS) + first_number(0)
    numbered["row"][::3] += first_number(2)
    for seed in (None, *range(12)):
        found = []
        for kernels in (cpu, cuda):
            finisher = kernels.Finisher(ids, np.array([2, 0, -3]))
            records = kernels.host_bytes(ROWS * 160).view(np.int32).reshape(ROWS, 40)
            finisher.take(coded, 2) if seed is None else finisher.take_shuffled(numbered, seed)
            for begin in range(0, ROWS, ROWS // 2 - 3):
                end = min(begin + ROWS // 2 - 3, ROWS)
                assert finisher.finish(begin, end, records[begin:end])() is not None
            found.append(records)
        np.testing.assert_array_equal(*found)


def rows_on_the_device() -> None:
    """Rows that stay on the device come out as those that went through files: in order, shuffled, and as they are."""
    (values, missing, _), _ = parsed(texts()["ragged"])
    ids = tuple(np.zeros(1, np.int32) for _ in range(26))
    values[:, 14:], expected = 0, []
    there = cuda.upload(values, missing)[0]
    store = cuda.keep(5 * ROWS)
    for first in (first_number(2), first_number(0) + ROWS, first_number(1), first_number(0)):
        assert store.has_room(ROWS)
        store.add(there, first)
        numbered = np.empty(ROWS, NUMBERED)
        numbered["coded"], numbered["row"] = values.view(np.int32), np.arange(ROWS) + first
        expected.append(numbered)
    together = np.concatenate(expected)
    np.testing.assert_array_equal(np.concatenate([rows for _, rows in store.numbered()]), together)
    assert store.ranges(first_number(0) + 3, first_number(1)) == [(3 * ROWS + 3, 4 * ROWS), (ROWS, 2 * ROWS)]
    for seed in range(3):
        for first, end in ((0, first_number(2)), (first_number(1), first_number(3))):
            taken = np.sort(together[(together["row"] >= first) & (together["row"] < end)], order="row")
            ranges = store.ranges(first, end)
            assert sum(stop - begin for begin, stop in ranges) == len(taken)
            found = []
            for kernels in (cpu, cuda):
                finisher = kernels.Finisher(ids, np.array([2, 0, -3]))
                records = kernels.host_bytes(len(taken) * 160).view(np.int32).reshape(-1, 40)
                if kernels is cpu:
                    finisher.take_shuffled(taken, seed)
                else:
                    finisher.take_there(store.words, order=store.shuffled(ranges, seed))
                finisher.finish(0, len(taken), records)()
                found.append(records)
            np.testing.assert_array_equal(*found)
    begin, stop = store.ranges(first_number(1) + 2, first_number(2))[0]
    records = cuda.host_bytes((stop - begin) * 160).view(np.int32).reshape(-1, 40)
    finisher.take_there(store.words, begin)
    finisher.finish(0, stop - begin, records)()
    host, into = cpu.Finisher(ids, np.array([2, 0, -3])), np.empty_like(records)
    host.take(np.ascontiguousarray(expected[2]["coded"][2:]), 1)
    np.testing.assert_array_equal(records, host.finish(0, len(into), into)())
    assert store.has_room(2 * ROWS) and not store.has_room(3 * ROWS)  # a quarter more than was asked for
    store.release()


def encode() -> None:
    with tempfile.TemporaryDirectory() as folder:
        days = [Path(folder) / f"day_{day}" for day in range(3)]
        for day, path in enumerate(days):
            path.write_bytes(reference.write_rows(seed=day, rows=(ROWS // 2, ROWS // 3, ROWS // 4)[day]))
        for name, rules, more in (
            ("count", {"min_count": 2}, {}),
            ("torchrec", {"drop_negatives": 0.3}, {"shuffle": False}),
            ("mlperf", {}, {"fractions": (0.6, 0.2, 0.2)}),
        ):
            found = []
            for device in ("cpu", "cuda"):
                out = Path(folder) / f"{name}_{device}"
                slab_bytes = 3000 if SIMULATED else 1 << 22
                preset = choose_preset(name, **rules)
                encode_days(days, out, Settings(preset=preset, device=device, slab_bytes=slab_bytes, threads=1, **more))
                found.append({p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(out.iterdir())})
            assert found[0] == found[1], name


def decoded_by_arrow(source, slab_bytes, skip, names):
    """What libcudf does on a GPU: the same layout of columns, out of Arrow's buffers."""
    for batch in pq.ParquetFile(source.path).iter_batches(max(1, slab_bytes // ROW_BYTES)):
        left = max(0, len(batch) - skip)
        skip -= len(batch) - left
        if left:
            behind = np.arange(len(batch) - left, len(batch))
            columns = [narrow(_plain(column)).take(behind) for column in batch.select(names).columns]
            yield [field_of(column) for column in columns], left, batch.nbytes


def narrow(column: pa.Array) -> pa.Array:
    return column.cast(pa.large_string()) if pa.types.is_string_view(column.type) else column


def field_of(column: pa.Array) -> cuda_parquet.Field:
    mask, *offsets, data = column.buffers()
    wide = pa.types.is_large_string(column.type)
    text = bool(offsets)
    numbers = np.frombuffer(data or b"", np.uint8 if text else column.type.to_pandas_dtype())
    return cuda_parquet.Field(
        cuda.upload_array(numbers[: None if text else len(column)]),
        cuda.upload_array(np.frombuffer(offsets[0], np.int64 if wide else np.int32)) if text else None,
        cuda.upload_array(np.frombuffer(mask or b"", np.uint8)),
    )


def parquet() -> None:
    """Slabs, faults and words of the two ways to read the same files; then whole data sets."""
    if SIMULATED:
        cuda_parquet._decoded = decoded_by_arrow
    lines = inputs.LINES[:ROWS]
    columns = [[line[c] for line in lines] for c in range(40)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "day"
        for label in range(4):
            ways = [("label", label), *(("dense", c) for c in range(13)), *(("sparse", c) for c in range(26))]
            ways = [inputs.WAYS[part][number % len(inputs.WAYS[part])] for part, number in ways]
            arrays = [inputs.array_of(fields, *way) for fields, way in zip(columns, ways, strict=True)]
            inputs.write_parquet(path, arrays, row_group_size=17)
            for skip in (0, 7, 17, len(lines)) if label == 0 else (0,):
                same_slabs(path, skip, 256 * 15, len(lines))
        for _, arrays in inputs.FAULTS:
            table = inputs.table_of([inputs.row_of({})] * 3)
            for place, array in arrays.items():
                table[place] = pa.concat_arrays([table[place].slice(0, 1).cast(array.type), array, array])
            inputs.write_parquet(path, table)
            same_slabs(path, 0, 256 * 15, 3)
        names = [*reversed(COLUMN_NAMES), "__index_level_0__"]  # told by name, one left out
        arrays = [*reversed(inputs.table_of(lines)), pa.array(range(len(lines)))]
        days = [Path(folder) / f"day_{day}" for day in range(2)]
        for day in days:
            pq.write_table(pa.table(arrays, names), day)
        same_sets(days, Path(folder), 256 * 15)


def same_sets(days: list[Path], folder: Path, slab_bytes: int) -> None:
    """CPU and device write the same files."""
    found = []
    for device in ("cpu", "cuda"):
        encode_days(days, folder / device, Settings(device=device, slab_bytes=slab_bytes, threads=1))
        found.append({p.name: p.read_bytes() for p in sorted((folder / device).iterdir())})
    assert found[0] == found[1]


def same_slabs(path: Path, skip: int, slab_bytes: int, size: int) -> None:
    """Both ways give the same rows, faults and words behind `skip` of `size` (bytes or rows)."""
    results = []
    for kernels in (cpu, cuda):
        (source,) = open_sources([path])
        values, missing, words = [], [], []
        for slab in read_day(source, 0, slab_bytes, skip, readers=kernels.readers()):
            slab.prepare(kernels)
            while slab is not None:
                found, empty, faults = slab.parse(kernels, ScratchBuffer())
                good, bad = faults == 0, np.flatnonzero(faults)
                values.append((columns_of(found) if kernels is cuda else found)[good])
                missing.append((missing_of(empty, found) if kernels is cuda else empty)[good])
                words += slab.describe(bad, faults[bad])
                end = slab.end
                slab.release()
                slab = slab.rest(kernels)
        assert source.read == source.size and (not values or end == size)
        rows = [row for array in (*values, *missing) for row in array.tolist()]
        results.append((rows, words, source.crc32))
    assert results[0] == results[1]


class CuFile:
    """What kvikio.CuFile does where nothing is read directly, in place of KvikIO, which wants a GPU's driver."""

    def __init__(self, path: Path):
        self._path = path

    def pread(self, buffer, size: int, file_offset: int):
        assert file_offset % cuda_direct.PAGE == 0 and len(buffer) == size
        found = np.fromfile(self._path, np.uint8, size, offset=file_offset)
        buffer[: len(found)].copy_to_device(found)
        return SimpleNamespace(get=lambda: len(found))

    def close(self) -> None:
        pass


def direct() -> None:
    """Slabs read directly: their text, checksum and words for faults; resuming; whole data sets."""
    assert not cuda_direct.is_there() or not SIMULATED
    sys.modules["kvikio"] = SimpleNamespace(CuFile=CuFile)
    cuda_direct.is_there = lambda: True
    slab_bytes, count = (3000, ROWS) if SIMULATED else (1 << 20, 20_000)  # a GPU has its sizes, a test its minutes
    plain = reference.write_rows(seed=3, rows=count)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "day"
        for text in (plain, plain[:-1], plain + texts()["bad rows"]):
            path.write_bytes(text)
            for skip in (0, 1 + plain.index(b"\n"), len(plain) // 2 + plain[len(plain) // 2 :].index(b"\n") + 1):
                same_slabs(path, skip, slab_bytes, len(text))
        for part in (Source(path, 2000, 100), Source(path, len(text) - 77, 77)):
            slabs = list(cuda_direct.direct_slabs(part, 0, 900, 0))
            found = b"".join(cuda.download(slab.text.bytes).tobytes()[: slab.text.size] for slab in slabs)
            assert found == text[part.begin : part.begin + part.size] and part.crc32 == zlib.crc32(found)
        path.write_bytes(b"1" * 5000)
        with pytest.raises(DataError, match="no end of row within 3000 bytes"):
            list(cuda_direct.direct_slabs(*open_sources([path]), 0, 3000, 0))
        (source,) = open_sources([path])
        path.write_bytes(plain[:3000])
        with pytest.raises(DataError, match="2000 bytes fewer than when it was opened"):
            list(cuda_direct.direct_slabs(source, 0, 8000, 0))
        if SIMULATED:  # kernels of two threads at a time are beyond it
            counting.side_by_side = lambda sources, *_: chain.from_iterable(sources)
        days = [Path(folder) / f"day_{day}" for day in range(2)]
        for day, path in enumerate(days):
            path.write_bytes(reference.write_rows(seed=day, rows=count))
        same_sets(days, Path(folder), slab_bytes + 1000)


def many_rows() -> None:
    """More rows than good ones can be, in parts; the same where text is read directly; blank lines at the end."""
    sys.modules["kvikio"], rows.LEAST_ROWS = SimpleNamespace(CuFile=CuFile), 4
    plain = reference.write_rows(seed=3, rows=6)
    with tempfile.TemporaryDirectory() as folder:
        path, text = Path(folder) / "day", plain + b"\n" * 90 + plain + b"\n" * 70 + b"x"
        path.write_bytes(text)
        blank = Path(folder) / "blank"
        blank.write_bytes(plain + b"\n\r\n\n")
        for there in (False, True):
            cuda_direct.is_there = lambda there=there: there
            same_slabs(path, 0, len(text) // 2, len(text))
            same_slabs(blank, 0, len(plain) // 2, len(plain))
            same_slabs(blank, len(plain), len(plain), len(plain))


def memory_limit() -> None:
    with tempfile.TemporaryDirectory() as folder:
        days = [Path(folder) / f"day_{day}" for day in range(2)]
        for day, path in enumerate(days):
            path.write_bytes(reference.write_rows(seed=day, rows=ROWS // 3))
        settings = Settings(
            preset=choose_preset("mlperf"), device="cuda", slab_bytes=3000 if SIMULATED else 1 << 22,
            keep_on_device=False,
        )  # fmt: skip
        _, report = encode_days(days, Path(folder) / "whole", settings)
        assert report.device_bytes > 4 * 3000
        cuda_launch.budget.__init__()
        with pytest.raises(DeviceMemoryError, match=r"--memory-limit \d+: .* take .* bytes of device memory"):
            encode_days(days, Path(folder) / "held", replace(settings, memory_limit=report.device_bytes * 3 // 4))
        cuda_launch.budget.__init__()
        _, again = encode_days(days, Path(folder) / "held", replace(settings, memory_limit=report.device_bytes))
        assert again.device_bytes <= report.device_bytes
        for path in (Path(folder) / "whole").iterdir():
            assert path.read_bytes() == (Path(folder) / "held" / path.name).read_bytes()


if __name__ == "__main__":
    globals()[sys.argv[1]]()
    print("agrees")
