"""Hold a data set against its manifest."""

from pathlib import Path

from gpu_etl.errors import DataError
from gpu_etl.load.dataset import open_dataset
from gpu_etl.manifest import VOCABULARY, Manifest, describe_file
from gpu_etl.vocabulary import Vocabulary


def verify(folder: Path, progress=lambda rows: None) -> dict:
    """Check a data set of any form against its manifest: that it lists all files, their sizes and checksums, the id
    maps against the table sizes, labels and ids. Returns what was checked.

    `progress` is called with the number of rows checked since the last call. Raises DataError at the first mismatch.
    """
    folder = Path(folder)
    manifest = Manifest.read(folder)
    for name, expected in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise DataError(f"{path}: no such file, but the manifest lists it; encode the days again")
        found = describe_file(path)
        if found != expected:
            what = "another SHA-256" if found["bytes"] == expected["bytes"] else f"{found['bytes']:,} bytes"
            raise DataError(
                f"{path}: expected the {expected['bytes']:,} bytes of the manifest, found {what}; the file was "
                "changed or damaged: encode the days again"
            )
    sizes = manifest.table_sizes
    Vocabulary.load(folder, sizes).check(manifest.preset().first_id, sizes, folder / VOCABULARY)
    dataset = open_dataset(folder, "auto")
    lacking = [split for split, rows in manifest.rows.items() if rows and split not in dataset.splits]
    if lacking:
        raise DataError(f"{folder}: the manifest tells of rows of {', '.join(lacking)}, but there are no files of it")
    dataset.check_ids(sizes, progress)
    return {"rows": manifest.rows, "files": len(manifest.files), "table_sizes": sizes}
