"""Which rows train and which test: ranges of rows in file order."""

from gpu_etl.errors import DataError


def equal_days(rows: int, days: int) -> list[int]:
    """Rows per day when one file is cut into `days` in file order; the first ones are a row longer where it does not
    divide, as in facebookresearch/dlrm's data_utils.py (Kaggle, 7 days)."""
    return [rows // days + (day < rows % days) for day in range(days)]


def plan(day_rows: list[int]) -> dict[str, tuple[int, int]]:
    """Row range (begin, end) of each split: all days but the last train, the first half of the last one (rounded up)
    tests, its other half validates.

    Raises DataError where there is no training or no test row.
    """
    total = sum(day_rows)
    train = total - day_rows[-1]
    test = train + (day_rows[-1] + 1) // 2
    if not 0 < train < total:
        raise DataError(
            f"expected two days or more with rows in them (the last one tests), got days of {day_rows} rows; "
            "name more day files, or cut one file into N days with --days N"
        )
    return {"train": (0, train), "test": (train, test), "val": (test, total)}
