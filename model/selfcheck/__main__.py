"""Run one check: exit status 0; 77 where it cannot be made here, or 1, with the reason as the last line of stderr.

python -m model.selfcheck NAME [cpu|cuda]
"""

import argparse
import importlib.util
import json
import os
import sys
import traceback

import torch

SKIPPED = 77
KERNELS = ("forward_and_backward", "updates", "rounding", "staging", "unpacking")
STEPS = ("steps", "half", "graph")


class SkipError(Exception):
    """The check cannot be made here; the message says why."""


def versions() -> None:
    """Say on stdout, as JSON, what torch brings and finds."""
    gpu = torch.cuda.is_available()
    found = {
        "torch": torch.__version__, "cuda": torch.version.cuda, "gpu": torch.cuda.get_device_name() if gpu else None,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else None,
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    print(json.dumps(found, allow_nan=False))


def usable() -> None:
    """Add and multiply on the GPU."""
    if not torch.cuda.is_available():
        raise RuntimeError("torch finds no GPU: a build for CPUs, or one for another CUDA than the driver's?")
    ones = torch.ones(64, 64, device="cuda")
    assert (ones @ ones + ones).sum().item() == 64 * 64 * 65


def check(name: str, device: str) -> None:
    """Run a check on "cuda" or "cpu"."""
    if name in ("versions", "usable"):
        return globals()[name]()
    if name in STEPS:
        from model.selfcheck import steps

        return getattr(steps, name)(torch.device(device))
    if importlib.util.find_spec("triton") is None:
        raise SkipError("Triton is missing, which torch's builds for CUDA bring: pip install triton")
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
        torch.set_num_threads(1)
    torch.manual_seed(0)
    if name == "real_sizes":
        from model.selfcheck.real_sizes import real_sizes

        return real_sizes()
    from model.selfcheck import kernels

    for one in KERNELS if name == "interpreted" else [name]:
        getattr(kernels, one)()


def main(argv: list[str] | None = None) -> int:
    """Run one check; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("check", choices=("versions", "usable", *STEPS, *KERNELS, "interpreted", "real_sizes"))
    parser.add_argument("device", nargs="?", default="cpu", choices=("cpu", "cuda"))
    args = parser.parse_args(argv)
    try:
        check(args.check, args.device)
    except SkipError as reason:
        print(reason, file=sys.stderr)
        return SKIPPED
    except Exception as error:
        traceback.print_exc()
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        print(f"error: {type(error).__name__}: {'; '.join(lines[:3])}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
