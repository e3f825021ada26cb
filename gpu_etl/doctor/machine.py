"""What is on this machine: GPUs, packages, cores, memory, the speed of a disk."""

import json
import os
import shutil
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from gpu_etl.common.packages import install_command, is_there
from gpu_etl.doctor.processes import run

QUERY = "name,memory.total,memory.free,compute_cap,driver_version"
PROBE_SECONDS = 90
DISK_BYTES, BLOCK = 256 << 20, 8 << 20
SIMPLE = {  # module -> distribution, and what it is for
    "isal": ("isal", "gzip days three times as fast"), "zstandard": ("zstandard", ".zst days"),
    "distributed": ("distributed", "--workers, --scheduler"), "pyarrow": ("pyarrow", "Parquet days, predict"),
    "pydantic": ("pydantic", "all commands"),
    "safetensors": ("safetensors", "checkpoints"), "tqdm": ("tqdm", "all commands"),
    "matplotlib": ("matplotlib", "--png, --plot, --log_dir"), "tensorboard": ("tensorboard", "--log_dir"),
}  # fmt: skip


@dataclass(frozen=True)
class Found:
    """A line of the table: what it is, what was found (None: it is missing), and what helps where that is not well."""

    name: str
    found: str | None
    advice: str = ""


def gpus() -> list[dict[str, str]]:
    """The GPUs that the driver shows, by nvidia-smi: QUERY's fields, memory in MiB, and `cuda`, the newest CUDA that
    the driver takes; an empty list where there is no driver or no GPU."""
    if not shutil.which("nvidia-smi"):
        return []
    words = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(words, capture_output=True, text=True, timeout=30, check=True).stdout
        head = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=30).stdout
    except (subprocess.SubprocessError, OSError):
        return []
    cuda = head.partition("CUDA Version: ")[2].partition(" ")[0]
    rows = [[cell.strip() for cell in line.split(",")] for line in lines.splitlines() if line.strip()]
    return [dict(zip(QUERY.split(","), row, strict=False)) | {"cuda": cuda} for row in rows]


def memory() -> dict[str, int]:
    """Bytes of host memory: all, and what is available; of the process's group where that has a limit."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    sizes = {line.partition(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    total, free = sizes["MemTotal"], sizes["MemAvailable"]
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and limit.read_text().strip().isdigit():
        total = min(total, int(limit.read_text()))
        free = min(free, total - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    return {"total": total, "available": free}


def disk(folder: Path) -> dict[str, float]:
    """GB/s that a file in the folder is written with, fsync included, and read again, not from the page cache. Raises
    OSError where it cannot be written."""
    block = os.urandom(BLOCK)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor") as file:
        start = time.perf_counter()
        for _ in range(DISK_BYTES // BLOCK):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        written = time.perf_counter() - start
        os.posix_fadvise(file.fileno(), 0, DISK_BYTES, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        with open(file.name, "rb", buffering=0) as again:
            while again.read(BLOCK):
                pass
        read = time.perf_counter() - start
    return {"write": round(DISK_BYTES / written / 1e9, 2), "read": round(DISK_BYTES / read / 1e9, 2)}


def _ask(module: str, words: list[str], **environment: str) -> dict:
    """What a probe says; {"missing": True} without the module, {"error": words} where it failed."""
    if not is_there(module):
        return {"missing": True}
    ended = run(["-m", *words], PROBE_SECONDS, **environment)
    if ended.status != 0:
        return {"error": ended.words()}
    return json.loads(ended.stdout.splitlines()[-1])


def ask_all(out: Path) -> dict[str, dict]:
    """What all probes say, by package."""
    modules = {
        "numba": "numba", "cupy": "cupy", "cudf": "pylibcudf", "dali": "nvidia.dali", "kvikio": "kvikio",
        "triton": "triton",
    }  # fmt: skip
    calls = {name: (module, ["gpu_etl.doctor.probe", name]) for name, module in modules.items()}
    calls["torch"] = "torch", ["model.selfcheck", "versions"]
    with ThreadPoolExecutor(max(2, (os.cpu_count() or 1) // 2)) as pool:
        asked = {name: pool.submit(_ask, *call, DOCTOR_OUT=str(out)) for name, call in calls.items()}
    return {name: future.result() for name, future in asked.items()}


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "of unknown version"


def torch_sees_gpu() -> bool:
    """Whether torch finds a GPU: some containers have the driver, but no nvidia-smi."""
    return bool(_ask("torch", ["model.selfcheck", "versions"]).get("gpu"))


def _package(name: str, module: str, answer: dict, text: str) -> Found:
    """A line of the table for a package that was asked; text: formatted with its answer."""
    if answer.get("missing"):
        return Found(name, None, install_command(module))
    if "error" in answer:
        return Found(name, f"cannot be used: {answer['error']}", install_command(module))
    return Found(name, text.format_map(answer))


def _numba(answer: dict, cards: list[dict]) -> list[Found]:
    if "numba" not in answer:
        return [_package("Numba", "numba", answer, "")]
    lines = [Found("Numba", f"{answer['numba']}, numba-cuda {answer['numba_cuda'] or 'missing'}",
                   "" if answer["numba_cuda"] else install_command("numba.cuda"))]  # fmt: skip
    if answer.get("nvvm"):
        there = [f"{name} {answer[name]}" for name in ("nvidia-nvvm", "nvidia-cuda-nvrtc") if answer[name]]
        advice, newest = "", cards[0]["cuda"] if cards else ""
        if newest and answer["nvidia-nvvm"] and _number(answer["nvidia-nvvm"]) > _number(newest):
            advice = f"newer than the driver's CUDA {newest}, which may refuse its PTX: CUDA_HOME of a toolkit {newest}"
        lines.append(Found("nvvm, nvrtc (Numba's)", ", ".join([answer["nvvm"], *there]), advice))
    else:
        advice = f"set CUDA_HOME to a toolkit (/usr/local/cuda), or {install_command('numba.cuda')}"
        lines.append(Found("nvvm, nvrtc (Numba's)", answer.get("nvvm_error") and None, advice))
    runtime = answer.get("runtime")
    lines.append(Found("CUDA runtime", runtime, "" if runtime else install_command("numba.cuda")))
    return lines


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())


def _storage(answer: dict) -> Found:
    """GPUDirect Storage: only its driver's count of reads proves that it is in use."""
    if "version" not in answer:
        return Found("GPUDirect Storage", None, "needs KvikIO, and the driver nvidia-fs")
    if not answer["same_bytes"]:
        return Found("GPUDirect Storage", "other bytes than the file's!", "set KVIKIO_COMPAT_MODE=ON")
    if answer["through_host"]:
        return Found("GPUDirect Storage", "not in use: KvikIO reads through the host here")
    said = {True: "in use: its driver has counted the reads", False: "not in use: its driver has counted no read"}
    unknown = "not shown: its driver counts no reads" if answer["driver"] else "not in use: nvidia-fs is not loaded"
    return Found("GPUDirect Storage", said.get(answer["direct"], unknown))


def _cards(cards: list[dict]) -> list[Found]:
    if not cards:
        advice = "on a machine with an NVIDIA GPU: its driver, and `nvidia-smi` on the PATH"
        return [Found("driver", None, advice), Found("GPU", None)]
    lines = [Found("driver", f"{cards[0]['driver_version']}, for CUDA up to {cards[0]['cuda'] or 'unknown'}")]
    for number, card in enumerate(cards):
        free = f"{int(card['memory.free']) / 1024:.1f} of {int(card['memory.total']) / 1024:.1f} GiB free"
        lines.append(Found(f"GPU {number}", f"{card['name']}, compute capability {card['compute_cap']}, {free}"))
    return lines


def table(cards: list[dict], answers: dict[str, dict], out: Path) -> list[Found]:
    """The whole table."""
    torch, size = answers["torch"], memory()
    said = "{torch}, CUDA {cuda}" if torch.get("cuda") else "{torch}, a build for CPUs"
    lines = [
        *_cards(cards), *_numba(answers["numba"], cards),
        _package("CuPy", "cupy", answers["cupy"], "{version}, CUDA {runtime}"),
        _package("cuDF (Parquet on a GPU)", "cudf", answers["cudf"], "{version}"),
        _package("KvikIO", "kvikio", answers["kvikio"], "{version}"), _storage(answers["kvikio"]),
        _package("DALI", "nvidia.dali", answers["dali"], "{version}"), _package("torch", "torch", torch, said),
        _package("Triton", "triton", answers["triton"], "{version}"),
        Found("NCCL", torch.get("nccl"), "" if torch.get("nccl") else "comes with torch's builds for CUDA"),
    ]  # fmt: skip
    for module, (distribution, purpose) in SIMPLE.items():
        there = _version(distribution) if is_there(module) else None
        lines.append(Found(distribution, there, "" if there else f"{install_command(module)}  ({purpose})"))
    lines.append(Found("cores", str(len(os.sched_getaffinity(0)))))
    gigabytes = f"{size['available'] / 1e9:.1f} of {size['total'] / 1e9:.1f} GB available"
    lines.append(Found("host memory", gigabytes))
    try:
        speed = "written at {write} GB/s (fsync included), read at {read} GB/s".format_map(disk(out))
        lines.append(Found(f"disk, {out}", speed))
    except OSError as error:
        lines.append(Found(f"disk, {out}", f"cannot be written: {error.strerror}", "--out FOLDER: another folder"))
    return lines


def show(lines: list[Found]) -> str:
    """The table as text."""
    width = max(len(line.name) for line in lines)
    return "\n".join(
        f"{line.name:{width}}  {line.found or 'missing'}" + (f"  ->  {line.advice}" if line.advice else "")
        for line in lines
    )
