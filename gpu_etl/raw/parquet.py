"""Parquet day files -> slabs: the same values, missing fields and faults as the text form of the same rows."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gpu_etl.common.buffers import ScratchBuffer
from gpu_etl.common.errors import DataError
from gpu_etl.common.jit import compiled
from gpu_etl.raw import columns, parquet_limits
from gpu_etl.raw.source import ChecksummedFile, Slab, Source, skip_bytes
from gpu_etl.rows import scalar as rows
from gpu_etl.rows.faults import EXPECTED, SHOWN
from gpu_etl.schema import COLUMN_NAMES, COLUMNS, FIRST_SPARSE

ROW_BYTES = 256  # what a row takes as text, so that a slab of either form holds about as many rows
DESCRIBED_ROWS = 1 << 12  # read at a time on the way to a row that is described
READ_BYTES = 1 << 16  # of a column at a time; without it a whole row group is read at once
INT32_MIN = -rows.INT32_MAX - 1

Parsed = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Of one column: numbers uint32 [n] (0 where empty), empty bool [n], kinds of fault uint8 [n] (0: none)."""


@compiled
def _parse_hex(data, offsets, empty, numbers, kinds):
    """Strings data[offsets[i]:offsets[i + 1]] -> numbers[i], kinds[i]; empty ones are marked in `empty`.

    data uint8 [bytes], offsets int32 or int64 [n + 1]; empty bool [n], set beforehand where the string is null;
    numbers uint32 [n] and kinds uint8 [n], zeroed beforehand.
    """
    for row in range(len(numbers)):
        begin, end = np.int64(offsets[row]), np.int64(offsets[row + 1])
        if empty[row] or begin == end:
            empty[row] = True
            continue
        numbers[row], kinds[row] = rows.hex_string(data, begin, end)


@compiled
def _whole_numbers(found, numbers, kinds):
    """found float64 [n] -> numbers uint32 [n] and kinds uint8 [n], zeroed beforehand; NaN stays 0."""
    for row in range(len(found)):
        if found[row] == found[row]:
            value, kinds[row] = rows.whole_number(found[row])
            numbers[row] = value & rows.UINT32_MASK


def _strings(array: pa.Array) -> Parsed:
    if pa.types.is_string_view(array.type):
        array = array.cast(pa.large_string())
    offset_dtype = np.int64 if pa.types.is_large_string(array.type) else np.int32
    _, offsets, data = array.buffers()
    offsets = np.frombuffer(offsets, offset_dtype)[array.offset : array.offset + len(array) + 1]
    empty = array.is_null().to_numpy(zero_copy_only=False)
    numbers, kinds = np.zeros(len(array), np.uint32), np.zeros(len(array), np.uint8)
    _parse_hex(np.frombuffer(data or b"", np.uint8), offsets, empty, numbers, kinds)
    return numbers, empty, kinds


def _floats(array: pa.Array) -> Parsed:
    """Floats are integers with gaps as pandas keeps them: NaN is a gap too."""
    found = array.cast(pa.float64()).fill_null(np.nan).to_numpy()
    numbers, kinds = np.zeros(len(found), np.uint32), np.zeros(len(found), np.uint8)
    _whole_numbers(found, numbers, kinds)
    return numbers, np.isnan(found), kinds


def _integers(array: pa.Array, least: int, most: int, kind: int) -> Parsed:
    """`kind`: the fault of numbers below `least` or above `most`."""
    empty = array.is_null().to_numpy(zero_copy_only=False)
    numbers = array.fill_null(0).to_numpy()
    outside = (numbers < least) | (numbers > most)
    return numbers.astype(np.uint32), empty, outside.astype(np.uint8) * np.uint8(kind)


def _plain(column: pa.Array) -> pa.Array:
    """The column as integers, floats or strings."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_boolean(column.type) or pa.types.is_null(column.type):
        column = column.cast(pa.int8())
    return column


def _parse_column(array: pa.Array, column: int) -> Parsed:
    """Parse a plain array as the given column of the 40."""
    if column == 0:
        numbers, empty, kinds = _integers(array, 0, 1, rows.FAULT_LABEL)
        kinds[empty] = rows.FAULT_LABEL
        return numbers, empty, kinds
    if pa.types.is_floating(array.type):
        return _floats(array)
    if not pa.types.is_integer(array.type):
        return _strings(array)
    # Categories come as the 32-bit number itself or, from NVTabular, as the int32 of the same bits.
    return _integers(array, INT32_MIN, rows.INT32_MAX if column < FIRST_SPARSE else rows.UINT32_MASK, rows.FAULT_RANGE)


@dataclass
class ParquetSlab:
    """Some rows of a Parquet file: a batch of 40 columns whose types _check let pass, or of 39 without a label, which
    is 0 then. `end` counts rows."""

    day: int
    end: int
    batch: pa.RecordBatch
    part: int = 0

    @property
    def labelled(self) -> bool:
        """Whether there is a label."""
        return self.batch.num_columns == COLUMNS

    def _column(self, column: int) -> pa.Array:
        return _plain(self.batch.column(column - (not self.labelled)))

    def prepare(self, kernels: ModuleType) -> None:
        """Nothing to do: Arrow finds the rows."""

    def release(self) -> None:
        """Nothing to give back: Arrow frees the batch."""

    def parse(self, kernels: ModuleType, memory: ScratchBuffer) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """values uint32 [n, 40], missing uint64 [n], faults int32 [n] as kernels.parse gives them.

        Computed here, where Arrow decodes: nothing of the text parser in `kernels` is used.
        """
        count = len(self.batch)
        values = memory.empty((COLUMNS, count), np.uint32).T
        missing, faults = np.zeros(count, np.uint64), np.zeros(count, np.int32)
        values[:, 0] = 0
        for column in range(0 if self.labelled else 1, COLUMNS):
            numbers, empty, kinds = _parse_column(self._column(column), column)
            values[:, column] = numbers
            missing |= empty.astype(np.uint64) << np.uint64(column)
            if kinds.any():
                new = (kinds != 0) & (faults == 0)
                faults[new] = kinds[new].astype(np.int32) * rows.FAULT_STRIDE + column
        return *kernels.upload(values, missing), faults

    def rest(self, kernels: ModuleType) -> None:
        """None: all rows are parsed at once."""

    def describe(self, rows_: Sequence[int], codes: Sequence[int]) -> list[str]:
        """See source.Slab."""
        return [self._describe(row, code) for row, code in zip(rows_, codes, strict=True)]

    def _describe(self, row: int, code: int) -> str:
        kind, column = divmod(int(code), rows.FAULT_STRIDE)
        field = self._column(column)[row]
        is_text = hasattr(field, "as_buffer") and field.is_valid
        shown = repr(field.as_buffer().to_pybytes().decode("utf-8", "replace") if is_text else field.as_py())
        shown = shown if len(shown) <= SHOWN else shown[:SHOWN] + "..."
        return f"column {COLUMN_NAMES[column]}: {EXPECTED[kind]}, got {shown}"


def _fits(kind: pa.DataType, column: int) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_integer(kind):
        return True
    if column == 0:
        return pa.types.is_boolean(kind)
    if column < FIRST_SPARSE:
        return pa.types.is_null(kind) or pa.types.is_floating(kind)
    strings = (pa.types.is_null, pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return any(is_kind(kind) for is_kind in strings)


def _check(schema: pa.Schema, names: list[str], source: Source) -> None:
    """Raise DataError where a column is of a type that cannot be read. names: as columns.resolve() gives them."""
    in_place = schema.names == names
    for column, name in enumerate(names):
        if not name:
            continue
        field = schema.field(column if in_place else schema.get_field_index(name))
        if not _fits(field.type, column):
            dense, sparse = "integers, or floats that hold whole numbers", "hex strings or integers"
            wanted = "integers or bools" if column == 0 else dense if column < FIRST_SPARSE else sparse
            place, told_by = schema.names.index(name) + 1, "place" if in_place else "name"
            raise DataError(
                f"{source.path}: column {place} ({name!r}), which is {COLUMN_NAMES[column]} by its {told_by}: expected "
                f"{wanted}, got the type {field.type}; check the order and the names of the columns, or convert it"
            )


def _batches(
    file: pq.ParquetFile, path: Path, batch_rows: int, skip: int, names: list[str]
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """(end, batch) of the rows behind the first `skip`; row groups before them are not read, nor columns without a
    name in `names`, whose order is that of the batch."""
    wanted = [name for name in names if name]
    in_place = file.schema_arrow.names == wanted  # names may be there twice then
    ends = np.cumsum([0] + [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)])
    first = int(np.searchsorted(ends[1:], skip, side="right"))
    end = int(ends[first])
    for group in range(first, file.num_row_groups):
        fits = parquet_limits.rows_at_a_time(file, path, group, wanted, batch_rows)
        for batch in file.iter_batches(fits, row_groups=[group], columns=None if in_place else wanted):
            end += len(batch)
            if end > skip:
                behind = batch.slice(max(0, len(batch) - (end - skip)))
                yield end, behind if in_place else behind.select(wanted)
    if not end == ends[-1] == file.metadata.num_rows:
        raise pa.ArrowInvalid(f"{file.metadata.num_rows} rows by its footer, {ends[-1]} by its row groups, read {end}")


def arrow_slabs(
    file: pq.ParquetFile, source: Source, day: int, slab_bytes: int, skip: int, names: list[str]
) -> Iterator[ParquetSlab]:
    """Slabs of about slab_bytes / 256 rows, decoded by Arrow."""
    for end, batch in _batches(file, source.path, max(1, slab_bytes // ROW_BYTES), skip, names):
        yield ParquetSlab(day, end, batch)


def read_parquet(
    source: Source, day: int, slab_bytes: int, skip: int = 0, decoded: Callable[..., Iterator[Slab]] = arrow_slabs,
    label_optional: bool = False,
) -> Iterator[Slab]:  # fmt: skip
    """Slabs of a Parquet file from row `skip` on, as decoded(file, source, day, slab_bytes, skip, names) makes them.

    Columns are told by name or place (columns.resolve, which gives the names): a label (integer or bool), 13 columns of
    integers (or of floats that hold whole numbers, NaN for nothing), 26 of hex strings or of integers of 32 bits,
    signed or not. Null is empty. Checksums of pages are held against the pages, where a file has them. Raises DataError
    for other columns, other types and damaged files.
    """
    try:
        # Decoders read by seeking, so the checksum takes its own way through the file, in step with the rows.
        with (
            ChecksummedFile(source) as stored,
            pq.ParquetFile(source.path, buffer_size=READ_BYTES, page_checksum_verification=True) as file,
        ):
            names = columns.resolve(file.schema_arrow.names, str(source.path), label_optional)
            _check(file.schema_arrow, names, source)
            parquet_limits.check_rows(file, source.path, source.size)
            for slab in decoded(file, source, day, slab_bytes, skip, names):
                skip_bytes(stored, source.size * slab.end // file.metadata.num_rows - source.read)
                yield slab
            skip_bytes(stored, source.size - source.read)
    except MemoryError as error:  # of Arrow, too
        raise DataError(f"{source.path}: too little memory to decode it ({error}); {parquet_limits.REMEDY}") from error
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # the last from damaged names of columns
        raise DataError(f"{source.path}: damaged or cut-off Parquet file ({error}); fetch it again") from error


def describe_row(source: Source, row: int, code: int) -> str:
    """Words for the fault `code` of row `row` of a Parquet file."""
    with closing(read_parquet(Source(source.path, source.size), 0, DESCRIBED_ROWS * ROW_BYTES, row)) as slabs:
        return next(slabs).describe([0], [code])[0]
