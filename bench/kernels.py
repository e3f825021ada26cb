"""The encoder's GPU kernels, compiled without a GPU: registers, spills, shared memory by ptxas, and bytes moved."""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
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
    "_insert": 26 * (4 + 8 + 8), "_number": 0, "_collect": 0, "_code": 26 * (2 * 4 + 8 + 8), "_count_buckets": 8,
    "_take_places": 16, "_scatter": 160 + 8 + 168, "_keys": 16, "_finish": 160 + 8 + 8 + 26 * 4 + 160,
    "_recount": 26 * (4 + 16) + 8, "_enter": 0,
    "_parse_strings": 8 + 4 + 4 + 8, "_parse_integers": 4 + 4, "_parse_floats": 8 + 4,  # and of one column
    "_checksums": TEXT_ROW,
}  # fmt: skip

# The same where a look-up or an atomic outside the caches moves a whole sector of 32 bytes.
SECTOR_BYTES = ROW_BYTES | {
    "_insert": 26 * (4 + 32 + 8), "_code": 26 * (2 * 4 + 3 * 32), "_scatter": 160 + 8 + 192,
    "_finish": 192 + 16 + 26 * 32 + 160,
}  # fmt: skip
# What the predictions rest on: an H200's memory, the share of it that kernels of this kind reach, PCIe 5 x16 each way.
MEMORY, SHARE, BUS = 4.8e12, 0.6, 55e9
COUNT_PASS = ("_count_newlines", "_write_newlines", "_parse", "_summarize", "_integers", "_insert", "_code",
              "_count_buckets", "_take_places", "_scatter")  # fmt: skip
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
    """Let Numba compile for a GPU that is not there."""
    from numba.cuda import api, compiler, dispatcher

    for module in (api, compiler, dispatcher):
        if hasattr(module, "get_current_device"):
            module.get_current_device = lambda: SimpleNamespace(compute_capability=capability)


def signatures() -> dict:
    """Every kernel of the encoder, and the types of the arguments it is launched with."""
    from numba import types

    from gpu_etl import cuda as functions
    from gpu_etl import cuda_dictionary as dictionary
    from gpu_etl import cuda_direct, cuda_encode, cuda_rows
    from gpu_etl import cuda_parquet as parquet

    i4, i8, u4, u8, flag = types.int32[::1], types.int64[::1], types.uint32[::1], types.uint64[::1], types.boolean
    one, whole = types.int64, types.uint64
    text, values, rows = types.uint8[::1], types.uint32[::1, :], types.int32[:, ::1]
    parsed = values, u8, i4, i4
    return {
        cuda_rows._count_newlines: (text, i4), cuda_rows._write_newlines: (text, i8, i8),
        cuda_rows._parse: (text, i8, values, u8, i4, i4), functions._keep: (values, u8, i8, values, u8),
        functions._summarize: (values, u8, i8), functions._integers: (values, u8, one, one),
        cuda_encode._count_buckets: (whole, one, one, i8, i4), cuda_encode._take_places: (i8, i8),
        cuda_encode._scatter: (values, one, i8, types.uint32[:, ::1]), cuda_encode._keys: (whole, i8, u8),
        cuda_encode._finish: (rows, i8, i8, i4, i8, rows), dictionary._collect: (u4, i8, i8, u4),
        dictionary._insert: (values, u8, flag, one, i8, i8, i8, types.int64[:, ::1], i4),
        dictionary._number: (types.int64[:, ::1], i4, i8, i8, u4, i8),
        dictionary._code: (values, u8, flag, one, i8, i8, i8, u8, i8, i8, one),
        dictionary._recount: (rows, i8, u8, i8, i8), dictionary._enter: (u4, i8, i8, i8, i8, i8),
        parquet._parse_strings: (text, i4, text, one, *parsed),
        parquet._parse_integers: (i4, text, one, one, one, one, *parsed),
        cuda_direct._checksums: (text, u4, u4), parquet._parse_floats: (types.float64[::1], text, one, *parsed),
    }  # fmt: skip


def compile_all(capability: tuple[int, int]) -> dict[str, str]:
    """PTX of every kernel by its name."""
    from numba import cuda, types

    pretend(capability)
    compiled = {}
    for kernel, arguments in signatures().items():
        ptx, _ = cuda.compile_ptx(kernel.py_func, types.void(*arguments), cc=capability)
        compiled[kernel.py_func.__name__] = ptx
    return compiled


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
    return {"capability": args.capability, "kernels": found, "predicted_not_measured": predict()}
