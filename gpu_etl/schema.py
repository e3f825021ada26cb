"""Columns, the 160-byte record and the presets' rules (leaf)."""

from dataclasses import dataclass, replace

import numpy as np

from gpu_etl.errors import DataError

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
LOG_CONVENTION = "unlogged; loaders take log(x + 1)"

SPLITS = ("train", "test", "val")


def split_file(split: str) -> str:
    """Name of a split's file of records inside a data set."""
    return f"terabyte_processed_{split}.bin"


@dataclass(frozen=True)
class Preset:
    """How category values become ids.

    A category value is the 32-bit number its hex digits spell, taken modulo `max_index_range` if that is not 0.
    Values counted fewer than `min_count` times (over all rows of all days) and, if `missing_is_zero` is off, empty
    fields get id 0; the others are numbered from `first_id` on, by first appearance in file order (`order` "first") or
    by (-count, value) (`order` "count"). With `missing_is_zero` an empty field is the value 0, merged with a real 0.
    """

    name: str
    order: str
    first_id: int
    missing_is_zero: bool
    min_count: int
    max_index_range: int = 0


PRESETS = {
    # What facebookresearch/dlrm's data_utils.py makes, and MLPerf trains on: nothing is dropped.
    "mlperf": Preset("mlperf", order="first", first_id=0, missing_is_zero=True, min_count=0),
    # Ours: id 0 for rare and missing, then popular ids first, so that hot embedding rows lie together.
    "count": Preset("count", order="count", first_id=1, missing_is_zero=False, min_count=10),
}


def choose_preset(name: str, min_count: int | None = None, max_index_range: int | None = None) -> Preset:
    """The preset called `name` with the given rules replaced.

    Raises DataError for an unknown name, for numbers out of range, and where `min_count` above 1 meets a preset that
    has no id for rare values.
    """
    if name not in PRESETS:
        raise DataError(f"--preset: expected one of {', '.join(PRESETS)}, got {name!r}")
    changes = {}
    if min_count is not None:
        if min_count < 0:
            raise DataError(f"--min-count: expected 0 or more, got {min_count}")
        changes["min_count"] = min_count
    if max_index_range is not None:
        if not 0 <= max_index_range < 2**31:
            raise DataError(f"--max-index-range: expected 0 (off) to 2147483647, got {max_index_range}")
        changes["max_index_range"] = max_index_range
    preset = replace(PRESETS[name], **changes)
    if preset.min_count > 1 and preset.first_id == 0:
        raise DataError(
            f"--min-count {preset.min_count}: preset {name!r} keeps every value and has no id for rare ones; "
            "use --preset count"
        )
    return preset
