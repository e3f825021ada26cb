"""Parquet day files on a GPU: libcudf decodes the columns there, a kernel a column makes parsed rows of them.

Values, missing fields and faults are those of parquet.py. Strings go through the digits' parser of rows.py.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
from numba import cuda

from gpu_etl import parquet_limits, rows
from gpu_etl.cuda_kernel import Kernel, blocks_for, kernel
from gpu_etl.cuda_launch import Mark, Memory, budget, device_array, download, launch, stream
from gpu_etl.cuda_rows import (
    BAD,
    COUNTERS,
    MISSING,
    ROWS,
    VALUES,
    Rows,
    Table,
    parser,
    summarize_on_device,
)
from gpu_etl.errors import DataError
from gpu_etl.parquet import INT32_MIN, ROW_BYTES, describe_row
from gpu_etl.schema import FIRST_SPARSE
from gpu_etl.source import Source

PASS_FACTOR = 4  # packed and decoded pages that libcudf holds at a time, per byte of what it gives out; a soft limit


class Field(NamedTuple):
    """A decoded column of n rows on the device, in Arrow's layout. data: its numbers, or the bytes of all strings,
    uint8; offsets: int32 or int64 [n + 1], None for numbers; valid: uint8, bit i says that row i is not null; no bytes
    where none is."""

    data: object
    offsets: object
    valid: object


def _parse_strings(data, offsets, valid, column, values, missing, faults, numbers):
    """One thread a row, as the two kernels below: values[row, column], bit `column` of missing[row], the row's first
    fault. Moves 8 bytes of digits and 4 + 4 of offset and value a row."""
    row = cuda.grid(1)
    if row < numbers[ROWS]:
        begin, end = np.int64(offsets[row]), np.int64(offsets[row + 1])
        if begin == end or not rows.is_valid(valid, row):
            rows.put_empty(row, column, values, missing)
        else:
            value, kind = rows.hex_string(data, begin, end)
            values[row, column] = value
            if kind and not faults[row]:
                faults[row] = kind * rows.FAULT_STRIDE + column
                cuda.atomic.add(numbers, BAD, 1)


def _parse_integers(data, valid, column, least, most, fault, values, missing, faults, numbers):
    """`fault`: the kind of numbers below `least` or above `most`; of a null, too, where it is a label's."""
    row = cuda.grid(1)
    if row < numbers[ROWS]:
        is_valid, kind = rows.is_valid(valid, row), 0
        if is_valid:
            number = data[row]
            values[row, column] = np.int64(number) & rows.UINT32_MASK
            if number < least or number > most:
                kind = fault
        else:
            rows.put_empty(row, column, values, missing)
            if column == 0:
                kind = fault
        if kind and not faults[row]:
            faults[row] = kind * rows.FAULT_STRIDE + column
            cuda.atomic.add(numbers, BAD, 1)


def _parse_floats(data, valid, column, values, missing, faults, numbers):
    """Integers with gaps as pandas keeps them: NaN is a gap too."""
    row = cuda.grid(1)
    if row < numbers[ROWS]:
        number = np.float64(data[row])
        if not rows.is_valid(valid, row) or number != number:
            rows.put_empty(row, column, values, missing)
        else:
            value, kind = rows.whole_number(number)
            values[row, column] = value & rows.UINT32_MASK
            if kind and not faults[row]:
                faults[row] = kind * rows.FAULT_STRIDE + column
                cuda.atomic.add(numbers, BAD, 1)


_FOUND = VALUES, MISSING, "int32[::1]", COUNTERS
_LIMITS = "int64", "int64", "int64"


@cache
def kernel_of(data: str, offsets: str | None = None) -> Kernel:
    """The kernel that parses a column of this type: one each, as a declared kernel takes no other."""
    if offsets is not None:
        return Kernel(_parse_strings, ("uint8[::1]", f"{offsets}[::1]", "uint8[::1]", "int64", *_FOUND))
    if np.dtype(data).kind == "f":
        return Kernel(_parse_floats, (f"{data}[::1]", "uint8[::1]", "int64", *_FOUND))
    return Kernel(_parse_integers, (f"{data}[::1]", "uint8[::1]", "int64", *_LIMITS, *_FOUND))


@kernel(MISSING, "int32[::1]", "int64")
def _blank(missing, faults, count):
    """No row has an empty field or a fault so far."""
    row = cuda.grid(1)
    if row < count:
        missing[row], faults[row] = 0, 0


_table, _faults = Table("parsed rows"), Memory("slab", np.int32)


def parse_fields(fields: Sequence[Field], count: int) -> tuple[Rows, object, np.ndarray]:
    """Parse 40 columns of `count` rows. Returns the rows, until the next call, and their missing on the device, faults
    int32 [n] on the host."""
    made, faults, numbers = _table.take(count), _faults.take(count), parser.numbers.begin(count)
    launch(_blank, blocks_for(count), made.missing, faults, count)
    for column, (data, offsets, valid) in enumerate(fields):
        limits = () if offsets is not None or np.dtype(data.dtype).kind == "f" else _limits(column)
        kernel_ = kernel_of(str(data.dtype), None if offsets is None else str(offsets.dtype))
        arrays = (data, valid) if offsets is None else (data, offsets, valid)
        launch(kernel_, blocks_for(count), *arrays, column, *limits, made.values, made.missing, faults, numbers)
    summarize_on_device(made, numbers, count)
    _, bad, summary = parser.numbers.read()
    made.summary = None if bad else summary
    return made, made.missing, download(faults[:count]) if bad else np.zeros(count, np.int32)


def _limits(column: int) -> tuple[int, int, int]:
    """Least and most of an integer column, and the kind of fault beyond."""
    if column == 0:
        return 0, 1, rows.FAULT_LABEL
    return INT32_MIN, rows.INT32_MAX if column < FIRST_SPARSE else rows.UINT32_MASK, rows.FAULT_RANGE


@dataclass
class DeviceSlab:
    """Some decoded rows of a Parquet file, a slab as of source.Slab. `end` counts rows."""

    day: int
    end: int
    source: Source
    count: int
    fields: Sequence[Field] | None
    decoded: Mark
    part: int = 0

    def prepare(self, kernels) -> None:
        """Nothing to do: the rows are decoded."""

    def parse(self, kernels, memory):
        """See source.Slab."""
        self.decoded.hold("compute")
        return parse_fields(self.fields, self.count)

    def release(self) -> None:
        """See source.Slab. parse() has waited for its kernels: libcudf may use the columns' memory again."""
        self.fields = None

    def describe(self, rows, codes) -> list[str]:
        """See source.Slab; the rows are read again."""
        first = self.end - self.count
        return [describe_row(self.source, first + row, code) for row, code in zip(rows, codes, strict=True)]

    def rest(self, kernels) -> None:
        """None: all rows are parsed at once."""


class _View:
    """Device memory that `owner` keeps alive, for Numba."""

    def __init__(self, owner, pointer: int, count: int, dtype: np.dtype):
        self._owner = owner
        self.__cuda_array_interface__ = {
            "version": 3, "shape": (count,), "typestr": dtype.str, "data": (pointer, False), "strides": None,
        }  # fmt: skip


def _array(span, count: int, dtype):
    """`count` items of a libcudf buffer, which may be missing where there are none."""
    dtype = np.dtype(dtype)
    if span is None or not count:
        return device_array(count, dtype)
    return cuda.as_cuda_array(_View(span, span.ptr, count, dtype), sync=False)


def _field(column) -> Field:
    """A column of libcudf."""
    count, mask = column.size(), column.null_mask()
    valid = _array(mask, (count + 7) // 8 if mask is not None else 0, np.uint8)
    kind = column.type().id().name
    if kind == "STRING":
        offsets = column.child(0)
        width = np.dtype(offsets.type().id().name.lower())
        data = column.data()
        return Field(
            _array(data, data.size if data is not None else 0, np.uint8),
            _array(offsets.data(), count + 1, width), valid,
        )  # fmt: skip
    if column.null_count() == count:
        return Field(device_array(count, np.int8), None, valid)
    return Field(_array(column.data(), count, np.uint8 if kind == "BOOL8" else kind.lower()), None, valid)


@cache
def _pool_memory() -> None:
    """Let libcudf take its memory from the driver's pool: by default each buffer of each column is allocated for
    itself."""
    import rmm

    if type(rmm.mr.get_current_device_resource()) is rmm.mr.CudaMemoryResource:
        rmm.mr.set_current_device_resource(rmm.mr.CudaAsyncMemoryResource())


def _decoded(
    source: Source, slab_bytes: int, skip: int, names: Sequence[str]
) -> Iterator[tuple[list[Field], int, int]]:
    """Columns in the order of their names, rows and bytes of some rows after another, decoded on the stream "read"."""
    try:
        import pylibcudf
    except ImportError as error:
        raise DataError(
            f"{source.path}: Parquet on a GPU is decoded by cuDF, which is missing ({error}); "
            "`pip install -r requirements-gpu.txt`, or --device cpu"
        ) from error
    _pool_memory()
    info = pylibcudf.io.SourceInfo([str(source.path)])
    builder, unique = pylibcudf.io.parquet.ParquetReaderOptions.builder(info), len(set(names)) == len(names)
    options = (builder.columns(list(names)) if unique else builder).build()
    options.set_skip_rows(skip)
    try:
        reader = pylibcudf.io.parquet.ChunkedParquetReader(
            options, stream=stream("read"), chunk_read_limit=slab_bytes, pass_read_limit=PASS_FACTOR * slab_bytes
        )
        while reader.has_next():
            chunk = reader.read_chunk()
            columns = chunk.columns
            if unique and chunk.column_names() != list(names):
                found = dict(zip(chunk.column_names(), columns, strict=True))
                columns = [found[name] for name in names]
            size = sum(column.device_buffer_size() for column in columns)
            yield [_field(column) for column in columns], columns[0].size(), size
    except RuntimeError as error:  # of libcudf, for all that it cannot read
        raise DataError(f"{source.path}: cuDF cannot read this Parquet file ({error}); try --device cpu") from error


def parquet_slabs(
    file: pq.ParquetFile, source: Source, day: int, slab_bytes: int, skip: int, names: Sequence[str]
) -> Iterator[DeviceSlab]:
    """See parquet.read_parquet. libcudf chooses how many rows a slab has, by its bytes: ROW_BYTES a row of text are
    about as many on the device."""
    end, held = skip, 0
    if end == file.metadata.num_rows:
        return
    for group in range(file.num_row_groups):  # libcudf holds the size of what it gives out, but not that of pages
        parquet_limits.rows_at_a_time(file, source.path, group, names, 1)
    for fields, count, size in _decoded(source, max(slab_bytes, ROW_BYTES), skip, names):
        budget.take("Parquet columns", 2 * size - held)  # those being parsed, and the next ones
        held = 2 * size
        end += count
        yield DeviceSlab(day, end, source, count, fields, Mark().put("read"))
    budget.take("Parquet columns", -held)
    if end != file.metadata.num_rows:
        raise DataError(f"{source.path}: {file.metadata.num_rows} rows by its footer, {end} read; fetch it again")
