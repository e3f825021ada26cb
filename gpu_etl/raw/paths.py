"""What the user names -> day files: files, patterns and folders, in natural order; what is left out is said."""

import glob
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from gpu_etl.common.errors import DataError
from gpu_etl.raw import part_files
from gpu_etl.raw.part_files import HIDDEN, natural

ENDINGS = ("", ".gz", ".zst", ".tsv", ".txt", ".parquet")
DAY = re.compile(r"day\W?_?(\d+)", re.IGNORECASE)  # what looks like a day: day_2.csv, Day_2, day-2, day2
SHOWN = 30


def _bare(path: Path) -> Path:
    """The path without any of the endings: day_0 of day_0.tsv.gz."""
    while path.suffix and path.suffix in ENDINGS:
        path = path.with_suffix("")
    return path


def _number(path: Path) -> int | None:
    """The number of the day that a name looks like."""
    found = DAY.match(path.name)
    return int(found[1]) if found else None


def _day_files(folder: Path) -> list[Path]:
    if part_files.is_day(folder):
        return [folder]
    there = [path for path in folder.iterdir() if not path.name.startswith(HIDDEN)]
    files = [path for path in there if path.is_file() and path.suffix in ENDINGS]
    days = [path for path in files if path.name.startswith("day_")]
    days += [path for path in there if _number(path) is not None and part_files.is_day(path)]
    days = sorted(days or files, key=natural)
    _tell_left_out(folder, days, there)
    if not days:
        raise DataError(
            f"{folder}: expected day files in the folder (day_0, day_1.gz, ...; endings: none, "
            f"{', '.join(ENDINGS[1:])}; or folders of part files), found none; name the files themselves"
        )
    _check_once(folder, days)
    return days


def _tell_left_out(where: Path | str, days: list[Path], there: Iterable[Path]) -> None:
    """Say what is left out. Raises DataError where that looks like a day that is not among those taken."""
    left = sorted(set(there) - set(days), key=natural)
    taken = {_number(path) for path in days}
    for path in left:
        if _number(path) is None or _number(path) in taken:
            continue
        if path.is_dir():
            what = "it looks like a day, but is a folder without part files; move it, or name the files"
        elif path.is_symlink() and not path.exists():
            what = f"it looks like a day, but the link leads nowhere ({path.readlink()}); is that disk mounted?"
        else:
            what = (
                f"it looks like a day, but is not called like one (day_N with one of the endings none, "
                f"{', '.join(ENDINGS[1:])}); rename or convert it, move it away, or name the files themselves"
            )
        raise DataError(f"{path}: {what}")
    if left:
        print(f"{where}: left out: {_listed([path.name for path in left])}", file=sys.stderr)
    numbers = sorted(number for number in taken if number is not None)
    gaps = sorted(set(range(numbers[0], numbers[-1])) - set(numbers)) if numbers else []
    if gaps:
        print(f"{where}: between its days there is none of number {_listed(map(str, gaps))}", file=sys.stderr)


def _check_once(where: Path | str, days: list[Path]) -> None:
    seen: dict[Path, Path] = {}
    for path in days:
        other = seen.setdefault(_bare(path), path)
        if other is not path:
            raise DataError(
                f"{where}: expected each day once, found both {other.name} and {path.name}; "
                "delete one, or name the files themselves"
            )


def _matches(pattern: str) -> list[Path]:
    there = [Path(path) for path in glob.glob(pattern)]
    files = sorted((path for path in there if path.is_file() or part_files.is_day(path)), key=natural)
    _tell_left_out(pattern, files, there)
    if not files:
        raise DataError(f"{pattern}: expected a pattern of day files, found no file that matches; check the name")
    _check_once(pattern, files)
    return files


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    middle = [f"... {len(names) - SHOWN} more ..."] if len(names) > SHOWN else []
    return ", ".join(names if not middle else [*names[: SHOWN // 2], *middle, *names[-SHOWN // 2 :]])


def list_days(days: list[Path]) -> str:
    """Words for the list of days that an encode takes, with the first and the last."""
    if len(days) == 1:
        return f"one {'day of part files' if days[0].is_dir() else 'file'}: {days[0]}"
    return f"{len(days)} days, first {days[0]}, last {days[-1]}: {_listed(path.name for path in days)}"


def expand(words: list[str | Path]) -> list[Path]:
    """Day files, in the order of `words`, each of which is a file, a pattern (*, ?, [...]) or a folder.

    A folder of part files is one day, and comes as it is. Any other stands for those of its files that are called
    day_*, and such folders of part files, or for all files where none is; files must end in one of ENDINGS and not be
    hidden. A pattern stands for all that match. All are in natural order; what is there beside them is said on stderr.
    A name without a pattern that is not there is returned as it is; open_sources tells.
    Raises DataError where a folder or a pattern yields nothing or holds a day twice (day_0 and day_0.gz), where
    something in it looks like a day that is not taken.
    """
    paths: list[Path] = []
    for word in map(Path, words):
        if word.is_dir():
            paths += _day_files(word)
        elif not word.is_file() and glob.has_magic(str(word)):
            paths += _matches(str(word))
        else:
            paths.append(word)
    return paths
