"""Hold a data set against its manifest."""

from pathlib import Path

from gpu_etl.errors import DataError
from gpu_etl.load.dataset import open_dataset
from gpu_etl.manifest import Manifest, describe_file
from gpu_etl.schema import SPARSE


def verify(folder: Path, progress=lambda rows: None) -> dict:
    """Check a data set of any form against its manifest: sizes, checksums, labels and ids. Returns what was checked.

    `progress` is called with the number of rows checked since the last call. Raises DataError at the first mismatch.
    """
    folder = Path(folder)
    manifest = Manifest.read(folder)
    if len(manifest.table_sizes) != SPARSE:
        raise DataError(f"{folder}: expected {SPARSE} table sizes in the manifest, got {len(manifest.table_sizes)}")
    for name, expected in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise DataError(f"{path}: no such file, but the manifest lists it; encode the days again")
        found = describe_file(path)
        if found != expected:
            raise DataError(f"{path}: expected {expected}, found {found}; the file was changed or damaged")
    open_dataset(folder, "auto").check_ids(manifest.table_sizes, progress)
    return {"rows": manifest.rows, "files": len(manifest.files), "table_sizes": manifest.table_sizes}
