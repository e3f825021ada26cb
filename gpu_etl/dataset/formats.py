"""The forms a data set is written in: records, and the two split forms, MLPerf v0.7's ("dist") and NVIDIA's ("dle").

A form is a table with a row per file: which columns of the record it holds, as what dtype, logged or not. Writing,
cutting to a row and reading (load/dataset.py) know nothing else of it.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from gpu_etl.common.append import append, open_cut
from gpu_etl.common.errors import DataError
from gpu_etl.common.threads import ALONE, Crew
from gpu_etl.schema import COLUMNS, DENSE, FIRST_DENSE, FIRST_SPARSE, RECORD_DTYPE, SPARSE, SPLITS, split_file

SPEC_FILE = "feature_spec.yaml"
ID_DTYPES = tuple(np.dtype(name) for name in ("i1", "<i2", "<i4"))

ANY_SIZES = [1] * SPARSE  # for where they do not matter: paths, and the dtypes of all but category ids
_LABEL = slice(0, FIRST_DENSE)
_DENSE = slice(FIRST_DENSE, FIRST_SPARSE)


@dataclass(frozen=True)
class SplitFile:
    """One file of a split: `columns` of the record as `dtype` [n, width], row-major, no header; `logged`: log(x + 1).

    path: relative to the data set's folder, with {} in place of the split's name until parts() fills it in.
    """

    path: str
    columns: slice
    dtype: np.dtype
    logged: bool = False

    @property
    def row_bytes(self) -> int:
        """Bytes of one row in this file."""
        return (self.columns.stop - self.columns.start) * self.dtype.itemsize

    def convert(self, records: np.ndarray) -> np.ndarray:
        """The file's share of records int32 [n, 40]: contiguous, `dtype` [n, width].

        float32 holds integers up to 2^24 exactly and rounds larger ones, just as a loader does that reads records.
        Raises DataError where an id does not fit an integer `dtype`.
        """
        values = records[:, self.columns]
        if self.logged:
            # In double precision: a float32 log differs between libraries and CPUs, and the bytes must not.
            return np.log(values + 1.0).astype(self.dtype, order="C")
        converted = np.ascontiguousarray(values, self.dtype)
        if self.dtype in ID_DTYPES[:2] and not np.array_equal(converted, values):
            raise DataError(
                f"{self.path}: expected ids that fit {self.dtype}, chosen by the table size, got {values.min()} to "
                f"{values.max()}; the table sizes do not belong to these records"
            )
        return converted


@dataclass(frozen=True)
class Form:
    """layout: 26 table sizes -> a split's parts; val: the form's name for the validation split; logged: its integers
    are stored as log(x + 1); extra_files: 26 table sizes -> {relative path: text} that lies beside the splits.
    """

    layout: Callable[[Sequence[int]], list[SplitFile]]
    val: str = "val"
    logged: bool = False
    extra_files: Callable[[Sequence[int]], dict[str, str]] = lambda table_sizes: {}


def parts(form: str, split: str, table_sizes: Sequence[int]) -> list[SplitFile]:
    """The files of "train", "test" or "val" in one of FORMS. Raises DataError where there are not 26 table sizes."""
    if len(table_sizes) != SPARSE:
        raise DataError(f"expected {SPARSE} table sizes, one per category column, got {len(table_sizes)}")
    name = FORMS[form].val if split == "val" else split
    return [replace(part, path=part.path.format(name)) for part in FORMS[form].layout(table_sizes)]


def files(form: str, split: str) -> list[str]:
    """Paths of a split's files, relative to the data set's folder."""
    return [part.path for part in parts(form, split, ANY_SIZES)]


def expected_files(form: str) -> list[str]:
    """Paths of all files of a data set in one of FORMS, but for the id maps and the manifest."""
    return [name for split in SPLITS for name in files(form, split)] + list(FORMS[form].extra_files(ANY_SIZES))


def write_extra_files(form: str, folder: Path, table_sizes: Sequence[int]) -> list[str]:
    """Write what lies beside the splits; returns the relative paths."""
    texts = FORMS[form].extra_files(table_sizes)
    for name, text in texts.items():
        (Path(folder) / name).write_text(text)
    return list(texts)


class SplitWriter:
    """Appends blocks of records to the files of a split; for use in `with`, or with close().

    Every file is cut to exactly `rows_done` rows first, so that a killed run can go on behind the rows it is sure of;
    0 starts anew. crew: its threads write, and sum up, side by side. Raises WorkDamagedError where a file holds fewer
    rows than that.
    """

    def __init__(
        self, form: str, folder: Path, split: str, table_sizes: Sequence[int], rows_done: int = 0, crew: Crew = ALONE
    ):
        self._crew = crew
        self._parts, self._files = parts(form, split, table_sizes), []
        self._digests = []
        with ExitStack() as opened:
            for part in self._parts:
                path = Path(folder) / part.path
                path.parent.mkdir(parents=True, exist_ok=True)
                self._files.append(opened.enter_context(open_cut(path, part.row_bytes * rows_done)))
                with open(path, "rb") as done:
                    self._digests.append(hashlib.file_digest(done, "sha256"))
            self._opened = opened.pop_all()

    def write(self, records: np.ndarray) -> None:
        """Append records int32 [n, 40]; the operating system has them when this returns, so a kill loses none.

        Raises DataError on another shape, and where an id does not fit its file; the files may differ in rows then.
        """
        if records.ndim != 2 or records.shape[1] != COLUMNS or records.dtype != RECORD_DTYPE:
            raise DataError(f"expected records {RECORD_DTYPE} [n, {COLUMNS}], got {records.dtype} {records.shape}")
        converted = [part.convert(records) for part in self._parts]
        appends = [partial(append, *of) for of in zip(self._files, converted, strict=True)]
        updates = [partial(of.update, array) for of, array in zip(self._digests, converted, strict=True)]
        self._crew.run([*updates, *appends])

    def described(self) -> dict[str, dict]:
        """The manifest's entries for the files as they are: path -> bytes and SHA-256."""
        sums = zip(self._parts, self._files, self._digests, strict=True)
        return {part.path: {"bytes": file.tell(), "sha256": digest.hexdigest()} for part, file, digest in sums}

    def digest(self) -> str:
        """One SHA-256 of what all files hold so far."""
        return hashlib.sha256(b"".join(digest.digest() for digest in self._digests)).hexdigest()

    def close(self) -> None:
        """Bring everything to the disk and close the files."""
        with self._opened:
            for file in self._files:
                os.fsync(file.fileno())

    def __enter__(self) -> "SplitWriter":
        return self

    def __exit__(self, *error) -> None:
        self.close()


def id_dtype(cardinality: int) -> np.dtype:
    """The smallest of int8, int16, int32 that holds cardinality - 1."""
    return next((dtype for dtype in ID_DTYPES if cardinality - 1 <= np.iinfo(dtype).max), ID_DTYPES[-1])


def _ids(dtypes: Sequence[np.dtype]) -> list[SplitFile]:
    return [
        SplitFile(f"{{}}/cat_{c}.bin", slice(FIRST_SPARSE + c, FIRST_SPARSE + c + 1), dtype)
        for c, dtype in enumerate(dtypes)
    ]  # fmt: skip


def _records(table_sizes: Sequence[int]) -> list[SplitFile]:
    return [SplitFile(split_file("{}"), slice(0, COLUMNS), RECORD_DTYPE)]


def _dist(table_sizes: Sequence[int]) -> list[SplitFile]:
    single = np.dtype("<f4")
    return [
        SplitFile("{}/label.bin", _LABEL, single),
        SplitFile("{}/numerical.bin", _DENSE, single),
        *_ids([RECORD_DTYPE] * SPARSE),
    ]


def _dle(table_sizes: Sequence[int]) -> list[SplitFile]:
    return [
        # The bytes are NumPy's bool; as a number, so that a reader can tell that a byte is neither 0 nor 1.
        SplitFile("{}/label.bin", _LABEL, np.dtype("u1")),
        SplitFile("{}/numerical.bin", _DENSE, np.dtype("<f2"), logged=True),
        *_ids([id_dtype(int(size)) for size in table_sizes]),
    ]


def _feature_spec(table_sizes: Sequence[int]) -> dict[str, str]:
    """feature_spec.yaml as DeepLearningExamples' DLRM reads it, in JSON, which is YAML too.

    Its reader takes exactly the mappings "train" and "test", so the validation split is on disk but not listed, and
    finds each dtype here, so that types other than its own writer's (int16 from cardinality 127 on) are fine.
    """
    ids = {f"cat_{c}.bin": int(size) for c, size in enumerate(table_sizes)}
    numbers = [f"num_{i}" for i in range(DENSE)]
    features = {name: {"cardinality": size, "dtype": id_dtype(size).name} for name, size in ids.items()}
    features |= {name: {"dtype": "float16"} for name in numbers} | {"label": {"dtype": "bool"}}
    chunks = [(numbers, "numerical.bin"), (["label"], "label.bin"), *(([name], name) for name in ids)]
    spec = {
        "channel_spec": {"categorical": list(ids), "numerical": numbers, "label": ["label"]},
        "feature_spec": features,
        "metadata": {},
        "source_spec": {
            split: [{"type": "split_binary", "features": held, "files": [f"{split}/{file}"]} for held, file in chunks]
            for split in ("train", "test")
        },
    }
    return {SPEC_FILE: json.dumps(spec, indent=1, allow_nan=False) + "\n"}


FORMS = {
    "records": Form(_records),
    "dist": Form(_dist),
    "dle": Form(_dle, val="validation", logged=True, extra_files=_feature_spec),
}
