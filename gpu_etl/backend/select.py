"""The device that runs the slab functions. What was asked for is what runs, or an error."""

from types import ModuleType

from gpu_etl.common.errors import DataError, DeviceMemoryError

DEVICES = ("auto", "cpu", "cuda")


def device(name: str) -> ModuleType:
    """The module of slab functions: cpu/slab.py for "cpu" and "auto", cuda/slab.py for "cuda".

    "auto" stays with the CPU until the GPU's functions were measured on one. Raises DataError for another name, and for
    "cuda" where numba-cuda or a usable GPU is missing.
    """
    if name not in DEVICES:
        raise DataError(f"--device: expected one of {', '.join(DEVICES)}, got {name!r}")
    if name != "cuda":
        from gpu_etl.backend.cpu import slab as cpu

        return cpu
    try:
        from gpu_etl.backend.cuda import slab as cuda
    except ImportError as error:
        raise DataError(
            f"--device cuda: {error}; install the GPU packages (`pip install -r requirements-gpu.txt`), or --device cpu"
        ) from error
    cuda.require_gpu()
    return cuda


def bucket_bytes(name: str) -> int:
    """How large a bucket of the shuffle suits a device. Raises DataError as device() does."""
    return device(name).BUCKET_BYTES


def explain(error: Exception) -> Exception:
    """The error itself, or, where the device's memory did not suffice, an error that says what to change."""
    if "OUT_OF_MEMORY" in str(error).upper().replace(" ", "_"):
        advice = "lower --slab-bytes, and give the same command again, or use --device cpu"
        return DeviceMemoryError(f"--device cuda: its memory does not suffice ({error}); {advice}")
    return error
