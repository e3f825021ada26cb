"""Says on stdout, as one JSON object, what a package finds on this machine; each in a process of its own, since what
does not fit together may crash.

    python -m gpu_etl.doctor.probe numba
"""

import json
import os
import re
import sys
import tempfile
from importlib import metadata
from pathlib import Path

NVIDIA_FS = Path("/proc/driver/nvidia-fs/stats")
DIRECT_BYTES = 16 << 20


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def numba() -> dict:
    """Numba's compiler for GPUs: its own version, and that of the IR its nvvm takes."""
    import numba
    from numba import cuda
    from numba.cuda.cudadrv import nvvm

    found = {"numba": numba.__version__, "numba_cuda": _version("numba-cuda"), "nvvm": None, "runtime": None}
    try:
        found["nvvm"] = "IR {}.{}".format(*nvvm.NVVM().get_ir_version()[:2])
    except Exception as error:
        found["nvvm_error"] = str(error).strip().splitlines()[0]
    for name in ("nvidia-nvvm", "nvidia-cuda-nvrtc", "nvidia-cuda-nvcc"):
        found[name] = _version(name)
    try:
        found["runtime"] = ".".join(map(str, cuda.runtime.get_version()))
    except Exception as error:
        found["runtime_error"] = str(error).strip().splitlines()[0]
    return found


def cupy() -> dict:
    """CuPy, and the CUDA runtime that it has."""
    import cupy

    number = cupy.cuda.runtime.runtimeGetVersion()
    return {"version": cupy.__version__, "runtime": f"{number // 1000}.{number % 1000 // 10}"}


def cudf() -> dict:
    """cuDF's reader of Parquet."""
    import pylibcudf

    return {"version": pylibcudf.__version__}


def dali() -> dict:
    """NVIDIA DALI."""
    from nvidia import dali

    return {"version": dali.__version__}


def _direct_reads() -> int | None:
    """How many reads GPUDirect Storage's driver has counted; None where it is not loaded or does not count."""
    try:
        found = re.search(r"^Reads\s*:.*?\bok=(\d+)", NVIDIA_FS.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) if found else None


def kvikio() -> dict:
    """KvikIO, and whether a file in folder $DOCTOR_OUT really comes by GPUDirect Storage: its driver counts reads."""
    import numpy as np
    from kvikio import CuFile, __version__, defaults
    from numba import cuda

    through_host = bool(defaults.is_compat_mode_preferred())
    found = {"version": __version__, "through_host": through_host, "driver": NVIDIA_FS.exists()}
    before = _direct_reads()
    with tempfile.NamedTemporaryFile(dir=os.environ.get("DOCTOR_OUT", ".")) as file:
        file.write(os.urandom(DIRECT_BYTES))
        file.flush()
        os.fsync(file.fileno())
        room, opened = cuda.device_array(DIRECT_BYTES, np.uint8), CuFile(file.name)
        opened.pread(room, DIRECT_BYTES).get()
        opened.close()
        file.seek(0)
        found["same_bytes"] = file.read() == room.copy_to_host().tobytes()
    after = _direct_reads()
    found["direct"] = None if before is None or after is None else after > before
    return found


def triton() -> dict:
    """Triton."""
    import triton

    return {"version": triton.__version__}


PROBES = {"numba": numba, "cupy": cupy, "cudf": cudf, "dali": dali, "kvikio": kvikio, "triton": triton}

if __name__ == "__main__":
    print(json.dumps(PROBES[sys.argv[1]](), allow_nan=False))
