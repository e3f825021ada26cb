"""A day that lies in a folder as part files (part-00000, part-00001.gz, ...), as Spark and Hadoop write one.

Such a day reads as if its files were joined to one, in the order of their numbers.
"""

import re
import sys
from pathlib import Path

from gpu_etl.common.errors import DataError

HIDDEN = (".", "_")  # the second as Spark has it: _SUCCESS, _metadata
PACKED = (".gz", ".zst")  # day_0 beside day_0.gz is the same day twice
PART = re.compile(r"part-\d+")
SHOWN = 10


def natural(path: Path) -> tuple:
    """Sort key that compares runs of digits as numbers: day_2 comes before day_10."""
    parts = re.split(r"(\d+)", str(path))
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], str(path)


def is_day(folder: Path) -> bool:
    """Whether a folder holds part files, so that it is one day."""
    return folder.is_dir() and any(PART.match(path.name) for path in folder.iterdir())


def part_files(folder: Path) -> list[Path]:
    """The part files of a day, in order. What else is there, and what the names leave open, is said on stderr.

    Raises DataError where a job still writes there, and where a part is there both packed and unpacked.
    """
    there = sorted(folder.iterdir(), key=natural)
    if any(path.name == "_temporary" for path in there):
        raise DataError(
            f"{folder / '_temporary'}: a job writes part files there and has not ended, or was killed; wait for it, or "
            "have it run again"
        )
    parts = [path for path in there if PART.match(path.name) and not path.is_dir()]
    _check_once(folder, parts)
    _tell(folder, parts, there)
    return parts


def _check_once(folder: Path, parts: list[Path]) -> None:
    seen: dict[str, Path] = {}
    for path in parts:
        other = seen.setdefault(path.stem if path.suffix in PACKED else path.name, path)
        if other is not path:
            raise DataError(f"{folder}: expected each part once, found both {other.name} and {path.name}; delete one")


def _tell(folder: Path, parts: list[Path], there: list[Path]) -> None:
    left = [path.name for path in there if path not in parts and not path.name.startswith(HIDDEN)]
    if left:
        more = f" and {len(left) - SHOWN} more" if len(left) > SHOWN else ""
        print(f"{folder}: left out, as they are no part files: {', '.join(left[:SHOWN])}{more}", file=sys.stderr)
    if not (folder / "_SUCCESS").exists():
        print(f"{folder}: no _SUCCESS, so whether the job that wrote these files ended is not known", file=sys.stderr)
    numbers = {int(path.name[5:].partition("-")[0].partition(".")[0]) for path in parts}
    absent = len(range(max(numbers) + 1)) - len(numbers)
    if absent:
        print(
            f"{folder}: {absent} of the part numbers 0 to {max(numbers)} are not there (Spark may leave out parts "
            "without rows)",
            file=sys.stderr,
        )
