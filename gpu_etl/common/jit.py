"""Numba decorators whose on-disk cache notices changes in what compiled functions share.

Numba keys its cache by the file of the decorated function alone: after an edit of rows/scalar.py, loops of
backend/cpu/slab.py that had inlined it would go on running the old code. Here the folder's name holds a digest of all
files whose functions are compiled, and of those whose constants they use.
"""

import hashlib
import os
import re
import tempfile
from pathlib import Path

import numba

PACKAGE = Path(__file__).parent.parent
_IMPORT = re.compile(r"^from gpu_etl((?:\.\w+)*) import (\([^)]*\)|[^\n#]+)", re.MULTILINE)
_CONSTANT = re.compile(r"\b[A-Z][A-Z0-9_]+\b")
_COMPILES = re.compile(r"^from gpu_etl\.(common\.jit|backend\.cuda\.kernel) import", re.MULTILINE)


def compiled_files(package: Path = PACKAGE) -> list[Path]:
    """The files under `package` with functions that Numba compiles, and those that they import constants from."""
    texts = {path: path.read_text() for path in package.rglob("*.py")}
    found = {path for path, text in texts.items() if _COMPILES.search(text)}
    waiting = list(found)
    while waiting:
        for module, names in _IMPORT.findall(texts[waiting.pop()]):
            source = package.joinpath(*module.split(".")[1:]).with_suffix(".py")
            if source in texts and source not in found and _CONSTANT.search(names):
                found.add(source)
                waiting.append(source)
    return sorted(found)


def _cache_folder() -> str:
    """Folder of what Numba compiled from this state of the code: what NUMBA_CACHE_DIR says, or one beside it."""
    if named := os.environ.get("NUMBA_CACHE_DIR"):
        return named
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in compiled_files())).hexdigest()[:12]
    home = PACKAGE / "__pycache__"
    if not os.access(home if home.exists() else PACKAGE, os.W_OK):
        home = Path(tempfile.gettempdir()) / f"gpu_etl-{os.getuid()}"
    return str(home / f"numba-{digest}")


CACHE_FOLDER = numba.config.CACHE_DIR = _cache_folder()
compiled = numba.njit(nogil=True, cache=True)
compiled_parallel = numba.njit(nogil=True, cache=True, parallel=True)
