"""The device that runs the slab functions. What was asked for is what runs, or an error."""

from types import ModuleType

from gpu_etl.errors import DataError

DEVICES = ("auto", "cpu")


def device(name: str) -> ModuleType:
    """The module with find_rows, parse, Counter and encode for "cpu" or "auto" (today: the CPU).

    Raises DataError for any other name.
    """
    if name not in DEVICES:
        raise DataError(f"--device: expected one of {', '.join(DEVICES)}, got {name!r}")
    from gpu_etl import cpu

    return cpu
