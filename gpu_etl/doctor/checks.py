"""The checks, by name: each is a command, run in a process of its own."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """words: behind `python -m`; needs: the check that has to pass first, "gpu" for a GPU that the driver shows."""

    name: str
    line: str
    words: tuple[str, ...]
    needs: str = ""


_SLAB = {
    "parse": "find_rows, parse", "slab": "keep_rows, summarize, integers, labels, rows_of", "group": "rows by bucket",
    "dictionaries": "code, new_keys, counts, recount", "finish": "Finisher", "checksum": "CRC-32 in pieces",
}  # fmt: skip


def _checks() -> list[Check]:
    slab, whole, train = "gpu_etl.doctor.slab", "gpu_etl.doctor.whole", "model.selfcheck"
    # Of those that can run side by side, the longest first.
    found = [
        Check("cuda.usable", "Numba and CuPy run kernels on the GPU", (slab, "usable", "cuda"), "gpu"),
        Check("torch.usable", "torch computes on the GPU", (train, "usable", "cuda"), "gpu"),
    ]
    found += [
        Check("cuda.encode", "data sets, byte for byte those of the CPU", (whole, "encode", "cuda"), "cuda.usable"),
        Check("train.interpreted", "Triton kernels in the interpreter, the same", (train, "interpreted", "cpu")),
        Check("train.cpu_steps", "ten steps of the fused CPU step, against the eager one", (train, "steps", "cpu")),
    ]
    for device, truth, needs in (("cuda", "the CPU's", "cuda.usable"), ("cpu", "slow Python", "")):
        found += [
            Check(f"{device}.{name}", f"{line}, against {truth}", (slab, name, device), needs)
            for name, line in _SLAB.items()
        ]
        found.append(Check(f"{device}.parquet", "Parquet, against text", (whole, "parquet", device), needs))
    found += [
        Check("cuda.direct", "text read by KvikIO, against the CPU", (whole, "direct", "cuda"), "cuda.usable"),
        Check("cpu.encode", "data sets by 1 and 2 threads, byte for byte", (whole, "encode", "cpu")),
        Check("cpu.meaning", "data sets, against slow Python", (whole, "meaning", "cpu")),
        Check("cuda.loaders", "an epoch of DALI, against the plain loader", (whole, "loaders", "cuda"), "torch.usable"),
        Check("cpu.loaders", "an epoch of DALI, against the plain loader", (whole, "loaders", "cpu")),
    ]
    kernels = ("forward_and_backward", "updates", "rounding", "staging", "unpacking")
    found += [
        Check(f"train.{name}", "Triton kernels, against eager code and float64", (train, name, "cuda"), "torch.usable")
        for name in (*kernels, "real_sizes")
    ]
    found += [
        Check("train.steps", "ten steps, against the CPU", (train, "steps", "cuda"), "torch.usable"),
        Check("train.half", "ten steps in bfloat16, float16", (train, "half", "cuda"), "torch.usable"),
        Check("train.graph", "a CUDA graph, recorded and replayed", (train, "graph", "cuda"), "torch.usable"),
    ]
    return found


CHECKS = _checks()
MACHINE = "machine"  # names the table instead of a check


def chosen(only: list[str]) -> list[Check]:
    """The checks of these names, or whose name begins with one and a dot, and what they need; all, where none is given.

    Raises ValueError for a name that is not one of a check or a group.
    """
    if not only:
        return CHECKS
    for name in only:
        if name != MACHINE and not any(check.name == name or check.name.startswith(f"{name}.") for check in CHECKS):
            raise ValueError(name)
    wanted = {c.name for c in CHECKS for name in only if c.name == name or c.name.startswith(f"{name}.")}
    wanted |= {check.needs for check in CHECKS if check.name in wanted}
    return [check for check in CHECKS if check.name in wanted]
