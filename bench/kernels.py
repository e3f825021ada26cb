"""The encoder's GPU kernels, compiled without a GPU: registers, spills, shared memory by ptxas, and bytes moved."""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

from bench.command import BenchError

CAPABILITIES = ("8.0", "9.0", "10.0")
TEXT_ROW = 254  # bytes of text a row, Criteo's mean
FOUND = re.compile(r"Used (\d+) registers.*")
PTX_VERSION = re.compile(r"^\.version \S+", re.MULTILINE)
OLD_PTX = ".version 8.7"  # Numba writes what its own compiler calls current, though it needs nothing newer than this
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
# Bytes of device memory that a kernel has to move for a row: text, values [40], missing, ends, faults, coded rows.
ROW_BYTES = {
    "_count_newlines": TEXT_ROW, "_write_newlines": TEXT_ROW + 8, "_parse": TEXT_ROW + 8 + 160 + 8 + 4,
    "_keep": 2 * 168, "_summarize": 8 + 14 * 4, "_integers": 2 * 4 * 13 + 8 * 13,
    "_insert": 26 * (4 + 8 + 8), "_number": 0, "_advance": 0, "_code": 26 * (2 * 4 + 8 + 8), "_count_buckets": 4,
    "_take_places": 8, "_to_rows": 160 + 4 + 168, "_keys": 16, "_finish": 160 + 8 + 8 + 26 * 4 + 160,
    "_recount": 26 * (4 + 16) + 8, "_move": 0, "_clear": 0, "_enter": 0, "_begin": 0, "scan": 0, "zero": 0,
    "_parse_strings": 8 + 4 + 4 + 8, "_parse_integers": 4 + 4, "_parse_floats": 8 + 4,  # and of one column
    "_blank": 12, "_checksums": TEXT_ROW, "_find_end": 0, "_probe": 0, "_to_places": 16,
}  # fmt: skip

# The same where a look-up or an atomic outside the caches moves a whole sector of 32 bytes.
SECTOR_BYTES = ROW_BYTES | {
    "_insert": 26 * (4 + 32 + 8), "_code": 26 * (2 * 4 + 3 * 32), "_to_rows": 160 + 4 + 192,
    "_finish": 192 + 16 + 26 * 32 + 160,
}  # fmt: skip
# What the predictions rest on: an H200's memory, the share of it that kernels of this kind reach, PCIe 5 x16 each way.
MEMORY, SHARE, BUS = 4.8e12, 0.6, 55e9
COUNT_PASS = ("_count_newlines", "_write_newlines", "_parse", "_summarize", "_integers", "_insert", "_code",
              "_count_buckets", "_take_places", "_to_rows")  # fmt: skip
ENCODE_PASS = ("_keys", "_finish")


def predict() -> dict:
    """GB/s of text that an H200 should reach: by each kernel, by all, and by the bus, which both passes cross twice."""
    rate = lambda size: round(TEXT_ROW / (size / (MEMORY * SHARE)) / 1e9, 1)  # noqa: E731
    passes = sum(SECTOR_BYTES[name] for name in COUNT_PASS + ENCODE_PASS)
    bus = max(TEXT_ROW, 168) + max(168 + 16, 160)
    return {
        "assumed": f"{MEMORY / 1e12} TB/s of memory, of which {SHARE:.0%} reached; bus {BUS / 1e9:.0f} GB/s each way",
        "kernels_text_gigabytes_per_second": {
            name.lstrip("_"): rate(SECTOR_BYTES[name]) for name in COUNT_PASS + ENCODE_PASS
        },
        "device_text_gigabytes_per_second": rate(passes),
        "bus_text_gigabytes_per_second": round(TEXT_ROW / (bus / BUS) / 1e9, 1),
    }


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of this benchmark."""
    parser.add_argument("--capability", default="9.0", choices=CAPABILITIES, help="of the GPU (default: 9.0, Hopper)")


def pretend(capability: tuple[int, int]) -> None:
    """Let Numba compile and link for a GPU that is not there."""
    from numba.cuda import api, compiler, dispatcher
    from numba.cuda.cudadrv import devices

    device = SimpleNamespace(compute_capability=capability, id=0)
    context = SimpleNamespace(device=device, id=0)
    devices.get_context = lambda *_: context
    for module in (api, compiler, dispatcher):
        if hasattr(module, "get_current_device"):
            module.get_current_device = lambda: device
    # Numba loads what it has linked, so as to keep it on disk; linking is all that can be done here.
    dispatcher._Kernel.bind = lambda kernel: kernel._codelibrary.get_cubin(cc=capability)


def kernels() -> list:
    """Every kernel of the encoder; those that come in a variant a type, in that of the usual columns."""
    from gpu_etl.backend.cuda import (
        dictionary as cuda_dictionary,
        encode as cuda_encode,
        gds as cuda_direct,
        keep as cuda_keep,
        new_keys as cuda_new_keys,
        parquet as cuda_parquet,
        parse as cuda_rows,
        slab as cuda,
    )
    from gpu_etl.backend.cuda.kernel import Kernel

    modules = cuda, cuda_dictionary, cuda_direct, cuda_encode, cuda_keep, cuda_new_keys, cuda_parquet, cuda_rows
    found = {item.name: item for module in modules for item in vars(module).values() if isinstance(item, Kernel)}
    columns = [("uint8", "int32"), ("int32", None), ("float64", None)]  # data and offsets
    return [*found.values(), *(cuda_parquet.kernel_of(*types) for types in columns)]


def compile_all(capability: tuple[int, int]) -> dict[str, str]:
    """PTX of every kernel by its name."""
    from numba import cuda
    from numba.core import sigutils

    pretend(capability)
    compiled = {}
    for kernel in kernels():
        types, _ = sigutils.normalize_signature(kernel.signature)
        compiled[kernel.name], _ = cuda.compile_ptx(kernel.py_func, types, cc=capability)
    return compiled


def seconds_of_two_processes(capability: str) -> dict[str, float]:
    """Seconds in which a process has all kernels, compiled and linked: the first one, and the next, which finds them on
    disk. Without the start of Python and what it imports."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("first", "second"):
            words = [sys.executable, "-m", "bench.kernels", capability]
            done = subprocess.run(words, env=os.environ | {"NUMBA_CACHE_DIR": folder}, capture_output=True, text=True)
            if done.returncode:
                raise BenchError(f"compiling all kernels: {done.stderr.strip()}")
            found[name] = float(done.stdout.splitlines()[-1])
    return found


def find_ptxas() -> str:
    """Path of ptxas: on the PATH, or in triton's wheel. Raises BenchError where there is none."""
    found = shutil.which("ptxas")
    inside = [path for folder in sys.path for path in Path(folder).glob("triton/backends/nvidia/bin/ptxas")]
    if not found and not inside:
        raise BenchError("ptxas is missing; it comes with the CUDA toolkit, and in triton's wheel")
    return found or str(inside[0])


def measure(args: argparse.Namespace) -> dict:
    """Compile every kernel to machine code; what ptxas says of each."""
    capability = tuple(int(number) for number in args.capability.split("."))
    ptxas, found = find_ptxas(), {}
    for name, ptx in compile_all(capability).items():
        with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
            file.write(PTX_VERSION.sub(OLD_PTX, ptx))
            file.flush()
            words = [ptxas, f"-arch=sm_{capability[0]}{capability[1]}", "-v", file.name, "-o", "/dev/null"]
            done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            raise BenchError(f"ptxas: {name}: {done.stderr.strip()}")
        stack, stores, loads = map(int, SPILLS.search(done.stderr).groups())
        smem = re.search(r"(\d+) bytes smem", done.stderr)
        found[name.lstrip("_")] = {
            "registers": int(FOUND.search(done.stderr)[1]), "stack_bytes": stack, "spill_bytes": stores + loads,
            "shared_bytes": int(smem[1]) if smem else 0, "bytes_a_row": ROW_BYTES[name],
        }  # fmt: skip
        print(f"{name.lstrip('_'):16} {found[name.lstrip('_')]}", file=sys.stderr)
    return {
        "capability": args.capability, "kernels": found, "compile_seconds": seconds_of_two_processes(args.capability),
        "predicted_not_measured": predict(),
    }  # fmt: skip


if __name__ == "__main__":  # one of the two processes above
    pretend(tuple(int(number) for number in sys.argv[1].split(".")))
    every, begin = kernels(), time.perf_counter()
    for each in every:
        each.compiled()
    print(round(time.perf_counter() - begin, 2))
