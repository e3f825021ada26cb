"""Scores of rows as a Parquet file."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gpu_etl.common.errors import DataError


def _holds_scores(path: Path) -> bool:
    try:
        return pq.read_schema(path).names in (["score"], ["score", "label"])
    except (pa.ArrowInvalid, OSError):
        return False


def _with_gaps(values: np.ndarray, gaps: np.ndarray) -> pa.Array:
    """Values [n], with null at the places `gaps` [k] of the n + k that there are then."""
    empty = np.zeros(len(values) + len(gaps), bool)
    empty[gaps] = True
    whole = np.zeros(len(empty), values.dtype)
    whole[~empty] = values
    return pa.array(whole, mask=empty)


class ScoreWriter:
    """Appends blocks of scores to a Parquet file: column "score" float32, and "label" int8 where rows have labels.

    For use in `with`: the file gets its name when all is written, and nothing stays after an error, or after a signal
    that raises one; what a process that was killed left, the next one for that name replaces. rows: written so far.
    Raises DataError where the name does not end in .parquet.
    """

    def __init__(self, path: Path, labelled: bool):
        if path.suffix != ".parquet" or path.is_dir():
            raise DataError(f"--output {path}: expected a name that ends in .parquet, of a file")
        if path.exists() and not _holds_scores(path):
            raise DataError(f"--output {path}: is there, and holds no scores; it would be replaced: name another file")
        fields = [pa.field("score", pa.float32())] + [pa.field("label", pa.int8())] * labelled
        self.rows, self._skipped = 0, 0
        self._path, self._part, self._labelled = path, path.with_name(path.name + ".part"), labelled
        self._schema, self._file, self._writer = pa.schema(fields), None, None

    def _open(self) -> None:
        """Begin the file: within the `with`, as a signal may end this process at any moment."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self._part, "wb")  # noqa: SIM115 - closed in __exit__
        self._writer = pq.ParquetWriter(self._file, self._schema)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Errors of the disk in this block tell the file."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror or str(error), str(self._path)) from error

    def write(self, scores: np.ndarray, labels: np.ndarray, skipped: Sequence[int] = ()) -> None:
        """Append scores float32 [n] and labels [n]; these are dropped where there are none.

        skipped: numbers, from 1 and rising, of all rows so far that have no score: they get null in both columns, so
        that row for row the file is that of the input.
        """
        columns = [scores] + [labels.astype(np.int8)] * self._labelled
        gaps = np.asarray(skipped[self._skipped :], np.int64) - 1 - self.rows
        if len(gaps):
            columns = [_with_gaps(column, gaps) for column in columns]
        elif not len(scores):
            return
        with self._named():
            if self._writer is None:
                self._open()
            self._writer.write_table(pa.table(columns, schema=self._schema))
        self.rows, self._skipped = self.rows + len(columns[0]), len(skipped)

    def __enter__(self) -> "ScoreWriter":
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is not None:  # its error comes first
            for opened in filter(None, (self._writer, self._file)):  # in this order, or Arrow complains later on
                with suppress(OSError, ValueError):
                    opened.close()
            self._part.unlink(missing_ok=True)
            return
        try:
            with self._named():
                if self._writer is None:
                    self._open()
                self._writer.close()
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
            self._part.replace(self._path)
        except BaseException:
            self._part.unlink(missing_ok=True)
            raise
