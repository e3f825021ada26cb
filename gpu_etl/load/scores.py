"""Scores of rows as a Parquet file."""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gpu_etl.errors import DataError


def _holds_scores(path: Path) -> bool:
    try:
        return pq.read_schema(path).names in (["score"], ["score", "label"])
    except (pa.ArrowInvalid, OSError):
        return False


class ScoreWriter:
    """Appends blocks of scores to a Parquet file: column "score" float32, and "label" int8 where rows have labels.

    For use in `with`: the file gets its name when all is written, and nothing stays after an error. Raises DataError
    where the name does not end in .parquet.
    """

    def __init__(self, path: Path, labelled: bool):
        if path.suffix != ".parquet" or path.is_dir():
            raise DataError(f"--output {path}: expected a name that ends in .parquet, of a file")
        if path.exists() and not _holds_scores(path):
            raise DataError(f"--output {path}: is there, and holds no scores; it would be replaced: name another file")
        fields = [pa.field("score", pa.float32())] + [pa.field("label", pa.int8())] * labelled
        self._path, self._part, self._labelled = path, path.with_name(path.name + ".part"), labelled
        path.parent.mkdir(parents=True, exist_ok=True)
        self._writer = pq.ParquetWriter(self._part, pa.schema(fields))

    def write(self, scores: np.ndarray, labels: np.ndarray) -> None:
        """Append scores float32 [n] and labels [n]; these are dropped where there are none."""
        columns = [scores] + [labels.astype(np.int8)] * self._labelled
        self._writer.write_table(pa.table(columns, schema=self._writer.schema))

    def __enter__(self) -> "ScoreWriter":
        return self

    def __exit__(self, kind, *_) -> None:
        self._writer.close()
        if kind is None:
            with open(self._part, "rb") as file:
                os.fsync(file.fileno())
            self._part.replace(self._path)
        else:
            self._part.unlink()
