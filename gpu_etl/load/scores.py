"""Scores of rows as a Parquet file."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gpu_etl.errors import DataError


class ScoreWriter:
    """Appends blocks of scores to a Parquet file: column "score" float32, and "label" int8 where rows have labels.

    For use in `with`: the file gets its name when all is written, and nothing stays after an error. Raises DataError
    where the name does not end in .parquet.
    """

    def __init__(self, path: Path, labelled: bool):
        if path.suffix != ".parquet":
            raise DataError(f"--output {path}: expected a name that ends in .parquet")
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
            self._part.rename(self._path)
        else:
            self._part.unlink()
