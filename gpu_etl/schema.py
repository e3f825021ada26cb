"""Columns, the 160-byte record and the presets' rules."""

from dataclasses import dataclass, replace

import numpy as np

from common import typed
from gpu_etl.common.errors import DataError

DENSE = 13
SPARSE = 26
FIRST_DENSE = 1
FIRST_SPARSE = FIRST_DENSE + DENSE
COLUMNS = FIRST_SPARSE + SPARSE
COLUMN_NAMES = ("label", *(f"I{i}" for i in range(1, DENSE + 1)), *(f"C{i}" for i in range(1, SPARSE + 1)))

# Row-major, little-endian, no header: label, 13 integers (missing and negative -> 0, not logged), 26 category ids.
# The same record is read by facebookresearch/dlrm --mlperf-bin-loader, HugeCTR "Raw" and the MLPerf v0.7 loaders.
RECORD_DTYPE = np.dtype("<i4")
RECORD_BYTES = COLUMNS * RECORD_DTYPE.itemsize

SPLITS = ("train", "test", "val")


def split_file(split: str) -> str:
    """Name of a split's file of records inside a data set."""
    return f"terabyte_processed_{split}.bin"


ORDERS = ("first", "count")
DENSE_RULES = ("clamp", "min", "plus2")
LARGEST_FIRST_ID = 2**16 - 1  # all ids below the first one's are rows of every table
LAST_DAY_RULES = ("test-ceil", "test-floor", "val-ceil", "test-all")


@dataclass(frozen=True)
class Preset:
    """How values become ids, and which rows are kept.

    Categories. A value is the 32-bit number its hex digits spell, taken modulo `max_index_range` if that is not 0. With
    `missing_is_zero` an empty field is the value 0, merged with a real 0; without, it gets `rare_id`. Values seen fewer
    than `min_count` times (over all rows of all days that are kept) get `rare_id` too. The others are numbered from
    `first_id` on, by first appearance in file order (`order` "first") or by (-count, value) ("count"), as long as ids
    stay below `max_table_size` (0: no limit); the rest gets `rare_id`.

    Integers, as the record holds them; loaders take log(x + 1) of that. `dense` "clamp": max(x, 0), missing 0. "min":
    x - (smallest integer of the day file, missing ones counting as 0) + 1, so that loaders see log(x - min + 2).
    "plus2": max(x + 2, 0), missing 0, so that they see log(x + 3), and 0 for missing. All held within int32.

    Rows. `sample`, `sample_last`: share of the rows kept of all days but the last, and of the last. `drop_negatives`:
    share of the rows with label 0 dropped after that. `last_day`: which half of the last day tests, and how an odd
    number of rows is rounded; or "test-all", and there is no validation split.
    """

    __pydantic_config__ = typed.STRICT
    name: str
    order: str
    first_id: int
    missing_is_zero: bool
    min_count: int
    rare_id: int = 0
    max_index_range: int = 0
    max_table_size: int = 0
    dense: str = "clamp"
    last_day: str = "test-ceil"
    sample: float = 1.0
    sample_last: float = 1.0
    drop_negatives: float = 0.0

    def check(self) -> None:
        """Raise DataError where a rule is out of range or contradicts another."""
        for name, known in (("order", ORDERS), ("dense", DENSE_RULES), ("last_day", LAST_DAY_RULES)):
            if getattr(self, name) not in known:
                flag = name.replace("_", "-")
                raise DataError(f"--{flag}: expected one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name in ("min_count", "max_index_range", "max_table_size"):
            if not 0 <= getattr(self, name) < 2**31:
                flag = name.replace("_", "-")
                raise DataError(f"--{flag}: expected 0 (off) to 2147483647, got {getattr(self, name)}")
        for name in ("sample", "sample_last", "drop_negatives"):
            if not 0 <= getattr(self, name) <= 1:
                flag = name.replace("_", "-")
                raise DataError(f"--{flag}: expected a share from 0 to 1, got {getattr(self, name)}")
        if not 0 <= self.first_id <= LARGEST_FIRST_ID:
            raise DataError(f"--first-id: expected 0 to {LARGEST_FIRST_ID}, got {self.first_id}")
        if not 0 <= self.rare_id < max(1, self.first_id):
            raise DataError(f"--rare-id: expected 0, or an id below --first-id {self.first_id}, got {self.rare_id}")
        if self.first_id == 0 and (self.min_count > 1 or self.max_table_size):
            raise DataError(
                f"--first-id 0 --min-count {self.min_count} --max-table-size {self.max_table_size}: expected to keep "
                f"every value, as preset {self.name!r} has no id for rare ones; use --preset count"
            )
        if 0 < self.max_table_size <= self.first_id:
            raise DataError(f"--max-table-size: expected more than {self.first_id}, got {self.max_table_size}")


PRESETS = {
    preset.name: preset
    for preset in (
        # What facebookresearch/dlrm's data_utils.py makes, and MLPerf trains on: nothing is dropped.
        Preset("mlperf", order="first", first_id=0, missing_is_zero=True, min_count=0),
        # Ours: id 0 for rare and missing, then popular ids first, so that hot embedding rows lie together.
        Preset("count", order="count", first_id=1, missing_is_zero=False, min_count=10),
        # torchrec's datasets/criteo.py; its scripts pass no threshold.
        Preset("torchrec", order="first", first_id=2, missing_is_zero=True, min_count=0, rare_id=1, dense="min",
               last_day="val-ceil"),
        # NVIDIA DeepLearningExamples' Spark preprocessing.
        Preset("dle", order="count", first_id=1, missing_is_zero=False, min_count=15, dense="plus2",
               last_day="test-floor"),
        # DeepSparkHub's recipe: days 0 and 1 at 10 %, day 2 at 1 %, then 87.5 % of the negatives dropped.
        Preset("deepspark", order="first", first_id=0, missing_is_zero=True, min_count=0, sample=0.1, sample_last=0.01,
               drop_negatives=0.875),
    )
}  # fmt: skip


def choose_preset(name: str, **rules) -> Preset:
    """The preset called `name` with the given rules replaced; those that are None stay. Raises DataError, see check."""
    if name not in PRESETS:
        raise DataError(f"--preset: expected one of {', '.join(PRESETS)}, got {name!r}")
    preset = replace(PRESETS[name], **{rule: value for rule, value in rules.items() if value is not None})
    preset.check()
    return preset
