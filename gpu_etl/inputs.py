"""What the user names -> day files: files, patterns and folders, in natural order."""

import glob
import re
from pathlib import Path

from gpu_etl.errors import DataError

ENDINGS = ("", ".gz", ".zst", ".tsv", ".txt", ".parquet")
HIDDEN = (".", "_")  # the second as Spark has it: _SUCCESS, _metadata


def natural(path: Path) -> tuple:
    """Sort key that compares runs of digits as numbers: day_2 comes before day_10."""
    parts = re.split(r"(\d+)", str(path))
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], str(path)


def _bare(path: Path) -> Path:
    """The path without any of the endings: day_0 of day_0.tsv.gz."""
    while path.suffix and path.suffix in ENDINGS:
        path = path.with_suffix("")
    return path


def _day_files(folder: Path) -> list[Path]:
    files = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(HIDDEN)]
    files = [path for path in files if path.suffix in ENDINGS]
    days = sorted([path for path in files if path.name.startswith("day_")] or files, key=natural)
    if not days:
        raise DataError(
            f"{folder}: expected day files in the folder (day_0, day_1.gz, ...; endings: none, "
            f"{', '.join(ENDINGS[1:])}), found none; name the files themselves"
        )
    seen: dict[Path, Path] = {}
    for path in days:
        other = seen.setdefault(_bare(path), path)
        if other is not path:
            raise DataError(
                f"{folder}: expected each day once, found both {other.name} and {path.name}; "
                "delete one, or name the files themselves"
            )
    return days


def _matches(pattern: str) -> list[Path]:
    files = sorted((path for path in map(Path, glob.glob(pattern)) if path.is_file()), key=natural)
    if not files:
        raise DataError(f"{pattern}: expected a pattern of day files, found no file that matches; check the name")
    return files


def expand(words: list[str | Path]) -> list[Path]:
    """Day files, in the order of `words`, each of which is a file, a pattern (*, ?, [...]) or a folder.

    A folder stands for those of its files that are called day_*, or for all where none is; they must end in one of
    ENDINGS and not be hidden. A pattern stands for all files that match. Both are in natural order. A name without a
    pattern that is not there is returned as it is; open_sources tells. Raises DataError where a folder or a pattern
    yields nothing, and where a folder holds a day twice (day_0 and day_0.gz).
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
