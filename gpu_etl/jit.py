"""Numba decorators whose on-disk cache notices a change in any module of this package (leaf).

Numba keys its cache by the file of the decorated function alone: after an edit of rows.py, loops of cpu.py that had
inlined it would go on running the old code. Here the folder's name holds a digest of all sources instead.
"""

import hashlib
import os
import tempfile
from pathlib import Path

import numba

if not os.environ.get("NUMBA_CACHE_DIR"):
    package = Path(__file__).parent
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(package.rglob("*.py")))).hexdigest()[:12]
    home = package / "__pycache__"
    if not os.access(home if home.exists() else package, os.W_OK):
        home = Path(tempfile.gettempdir()) / f"gpu_etl-{os.getuid()}"
    numba.config.CACHE_DIR = str(home / f"numba-{digest}")

compiled = numba.njit(nogil=True, cache=True)
compiled_parallel = numba.njit(nogil=True, cache=True, parallel=True)
