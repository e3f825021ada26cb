"""The end of an encode: what was written is looked at once more, brought to the disk, and gets its final names."""

import os
from collections.abc import Iterable
from pathlib import Path

from common.atomic import to_disk
from gpu_etl.common.errors import KeepWorkError, WorkDamagedError
from gpu_etl.dataset.manifest import FILE_NAME, Manifest, describe_file
from gpu_etl.passes.integrity import check_file
from gpu_etl.raw.stamps import Stamp, stamp_of


def stamps(work: Path, names: Iterable[str]) -> dict[str, Stamp]:
    """Stamps of files that this process has just written and described, for publish()."""
    return {name: stamp_of(work / name) for name in names}


def publish(work: Path, out: Path, description: Manifest, written: dict[str, Stamp]) -> None:
    """Give all files their final names; the manifest comes last and marks the data set as whole.

    Files that this process wrote must have their stamps still; those of an earlier one are read, and must have the
    checksums that it took. All is checked before the first file gets its name. Raises WorkDamagedError where one is
    another file or missing, KeepWorkError where the data set would replace a file of somebody else's.
    """
    moving = [name for name, entry in description.files.items() if _is_to_move(work, out, name, entry, written)]
    for name in moving:
        (out / name).parent.mkdir(exist_ok=True)
        with open(work / name, "rb") as file:
            os.fsync(file.fileno())
        (work / name).rename(out / name)
    for folder in {(out / name).parent for name in moving}:
        to_disk(folder)
    description.write(out)
    to_disk(out)


def _is_to_move(work: Path, out: Path, name: str, entry: dict, written: dict[str, Stamp]) -> bool:
    """Whether a file has not its final name yet; it is checked wherever it is."""
    path = work / name
    if not path.exists():
        check_file(out / name, entry)  # a run that was killed here has moved it
        return False
    if name not in written:
        check_file(path, entry)
    elif stamp_of(path) != written[name] or written[name].size != entry["bytes"]:
        raise WorkDamagedError(f"{path}: the file was written to since this run wrote it")
    if (out / name).exists() and describe_file(out / name) != entry:
        raise KeepWorkError(
            f"{out / name}: there is such a file already, without a {FILE_NAME} that says where it comes from, and it "
            "is not replaced; move it away, and give the same command again"
        )
    return True
