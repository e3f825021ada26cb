"""Which rows train and which test: ranges of rows in file order."""

from gpu_etl.common.errors import DataError


def equal_days(rows: int, days: int) -> list[int]:
    """Rows per day when one file is cut into `days` in file order; the first ones are a row longer where it does not
    divide, as in facebookresearch/dlrm's data_utils.py (Kaggle, 7 days)."""
    return [rows // days + (day < rows % days) for day in range(days)]


def by_last_day(day_rows: list[int], rule: str) -> dict[str, tuple[int, int]]:
    """Row range (begin, end) of each split: all days but the last train; the last one is halved.

    rule: "test-all" makes all of it the test split, and none is left to validate. "test-ceil" and "test-floor" make its
    first half the test split, rounded up or down; "val-ceil" makes its first half, rounded up, the validation split.
    Raises DataError where there is no training or no test row.
    """
    total = sum(day_rows)
    last = day_rows[-1]
    train = total - last
    halves = {"test-all": last, "test-floor": last // 2}
    middle = train + halves.get(rule, (last + 1) // 2)
    first, second = (train, middle), (middle, total)
    test, val = (second, first) if rule == "val-ceil" else (first, second)
    if not train or test[0] == test[1]:
        raise DataError(
            f"expected two days or more with rows in them (the last one tests), got days of {day_rows} rows; "
            "name more day files, or cut one file into N days with --days N"
        )
    return {"train": (0, train), "test": test, "val": val}


def by_fractions(rows: int, fractions: tuple[float, ...]) -> dict[str, tuple[int, int]]:
    """Row range (begin, end) of each split: shares (train, test, val) of all rows in file order, rounded.

    Raises DataError where there is no training or no test row.
    """
    train = round(rows * fractions[0])
    test = train + round(rows * fractions[1])
    if not 0 < train < test <= rows:
        raise DataError(f"--fractions {fractions}: expected rows to train and to test on, out of {rows} rows")
    return {"train": (0, train), "test": (train, test), "val": (test, rows)}
