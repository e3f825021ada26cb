"""Numba decorators whose on-disk cache notices changes in what compiled functions share (leaf).

Numba keys its cache by the file of the decorated function alone: after an edit of rows.py, loops of cpu.py that had
inlined it would go on running the old code. Here the folder's name holds a digest of the modules whose functions and
constants are compiled into those of others.
"""

import hashlib
import os
import tempfile
from pathlib import Path

import numba

SHARED = ("rows.py", "schema.py", "random_keys.py", "cuda_kernel.py")


def _cache_folder() -> str:
    """Folder of what Numba compiled from this state of the code: what NUMBA_CACHE_DIR says, or one beside it."""
    if named := os.environ.get("NUMBA_CACHE_DIR"):
        return named
    package = Path(__file__).parent
    digest = hashlib.sha256(b"".join((package / name).read_bytes() for name in SHARED)).hexdigest()[:12]
    home = package / "__pycache__"
    if not os.access(home if home.exists() else package, os.W_OK):
        home = Path(tempfile.gettempdir()) / f"gpu_etl-{os.getuid()}"
    return str(home / f"numba-{digest}")


CACHE_FOLDER = numba.config.CACHE_DIR = _cache_folder()
compiled = numba.njit(nogil=True, cache=True)
compiled_parallel = numba.njit(nogil=True, cache=True, parallel=True)
