"""Whether two folders hold the same files: `python -m bench.same_bytes A B`; exit status 1 where not."""

import filecmp
import json
import sys
from pathlib import Path


def differing(one: Path, other: Path) -> list[str]:
    """Names of the files that only one folder has, or that differ."""
    names = {path.name for folder in (one, other) for path in folder.iterdir()}
    _, differ, missing = filecmp.cmpfiles(one, other, names, shallow=False)
    return sorted([*differ, *missing])


def main(argv: list[str]) -> int:
    """Compare; returns the exit status."""
    one, other = map(Path, argv)
    found = differing(one, other)
    if found:
        print(f"error: {one} and {other} differ in {', '.join(found)}", file=sys.stderr)
        return 1
    print(json.dumps({"same_files": sum(1 for _ in one.iterdir())}, allow_nan=False))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
