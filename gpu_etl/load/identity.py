"""What tells one data set from another: digests of what gives a model's inputs their meaning, and of the rows."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from gpu_etl.errors import DataError
from gpu_etl.load.dataset import DataSet
from gpu_etl.manifest import FILE_NAME, VOCABULARY, Manifest, describe_file
from gpu_etl.schema import DENSE, SPARSE, split_file

SAMPLES, SAMPLE_BYTES = 256, 1 << 16  # of a file of more than 16 MiB


def _sha256(manifest: Manifest, name: str) -> str | None:
    return manifest.files.get(name, {}).get("sha256")


def meaning(data: DataSet) -> dict[str, str]:
    """What must be the same wherever a model is used: "vocabulary", the id maps (SHA-256); "integers", how the 13
    numbers are made; "schema". Of a data set without a manifest, the schema alone is known."""
    found = {"schema": f"{DENSE} + {SPARSE}"}
    if data.manifest:
        found["integers"] = str(data.manifest.settings["preset"]["dense"])
        if vocabulary := _sha256(data.manifest, VOCABULARY):
            found["vocabulary"] = vocabulary
    return found


def rows_digest(data: DataSet, split: str = "train") -> str:
    """SHA-256 of a split's rows: by the manifest's of its files; without one, of the bytes at many places (sample)."""
    if data.manifest:
        names = [
            name for name in sorted(data.manifest.files) if name == split_file(split) or name.startswith(f"{split}/")
        ]
        sums = [(name, _sha256(data.manifest, name)) for name in names]
        return hashlib.sha256(json.dumps(sums, allow_nan=False).encode()).hexdigest()
    return sample(data.splits[split].paths)


def sample(paths: Iterable[Path]) -> str:
    """SHA-256 of files' names, sizes and bytes: all of a file of up to 16 MiB, 256 evenly spread pieces of 64 KiB of a
    larger one. Tells copies of a data set apart that differ in more than a few places, in the time of 16 MiB a file."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(f"{path.name} {size}\n".encode())
            if size <= SAMPLES * SAMPLE_BYTES:
                digest.update(file.read(size))
                continue
            for number in range(SAMPLES):
                file.seek(number * (size - SAMPLE_BYTES) // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def check_vocabulary(folder: Path, manifest: Manifest) -> None:
    """Raise DataError where a data set's id maps are not those that its manifest tells of."""
    path = Path(folder) / VOCABULARY
    if not path.is_file():
        raise DataError(f"{path}: no such file; `python -m gpu_etl encode` writes it beside the data set")
    expected, found = manifest.files[VOCABULARY], describe_file(path)
    if found != expected:
        what = "another SHA-256" if found["bytes"] == expected["bytes"] else f"{found['bytes']:,} bytes"
        raise DataError(
            f"{path}: expected the {expected['bytes']:,} bytes of {FILE_NAME}, found {what}; the id maps were "
            "changed, or are another data set's: encode the days again"
        )
