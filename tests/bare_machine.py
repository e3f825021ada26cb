"""Runs a command as if packages were not installed:

    python -m tests.bare_machine MODULE WORDS...

The packages are those that a machine with torch, Triton, CuPy, numba, numba-cuda, pandas, pyarrow and pytest may lack.
Processes that the command starts lack them too.
"""

import os
import runpy
import sys
from functools import partial
from importlib.machinery import PathFinder
from pathlib import Path

LACKING = (
    "nvidia.dali", "cudf", "pylibcudf", "kvikio", "dask", "distributed", "dask_cuda", "isal", "zstandard", "sklearn",
    "polars", "hypothesis", "onnx", "onnxscript", "mlperf_logging", "tensorboard", "matplotlib", "fbgemm_gpu",
)  # fmt: skip


def _find_spec(real, name: str, path=None, target=None):
    lacking = any(name == other or name.startswith(f"{other}.") for other in LACKING)
    return None if lacking else real(name, path, target)


def hide() -> None:
    """Let Python's search of folders find none of LACKING: importing them fails, find_spec gives None."""
    PathFinder.find_spec = partial(_find_spec, PathFinder.find_spec)


if __name__ == "__main__":
    # A folder of sitecustomize.py on PYTHONPATH reaches the processes that this one starts.
    here = Path(__file__).parent
    own = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(here / "bare_site"), str(here.parent), *([own] if own else [])])
    hide()
    module, sys.argv = sys.argv[1], sys.argv[1:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
