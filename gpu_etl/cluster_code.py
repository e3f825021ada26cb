"""How a worker of a Dask cluster gets this project's code where it has none; by value, like cluster_probe.py."""

import importlib
import io
import sys
import zipfile
from pathlib import Path

from distributed.diagnostics.plugin import WorkerPlugin

from gpu_etl.cluster_probe import PACKAGE, code_files, code_root


def packed_code(root: Path) -> bytes:
    """A zip file of code_files()."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in code_files(root):
            archive.write(path, path.relative_to(root).as_posix())
    return packed.getvalue()


class Code(WorkerPlugin):
    """Gives the project's code to workers that do not have it, also to those that come later; others keep theirs."""

    def __init__(self, packed: bytes, digest: str):
        self.packed, self.digest, self.name = packed, digest, f"{PACKAGE}-{digest[:12]}"

    def setup(self, worker) -> None:
        """Unpack the code into the worker's own folder, and import it from there."""
        if code_root() is not None:
            return
        folder = Path(worker.local_directory) / self.name
        with zipfile.ZipFile(io.BytesIO(self.packed)) as archive:
            archive.extractall(folder)
        sys.path.insert(0, str(folder))
        importlib.invalidate_caches()
