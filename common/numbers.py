"""Types of flags for argparse: numbers within a range, and an error that names it."""

import argparse
import math
import re
from collections.abc import Callable

MOST_THREADS = 4096
MOST = 2**31 - 1  # of what counts rows, batches and steps, which are int32 somewhere on their way
WHOLE = re.compile(r"[+-]?[0-9]{1,30}")
DECIMAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


def whole(least: int, most: int = MOST) -> Callable[[str], int]:
    """A whole number from `least` to `most`, in plain digits."""

    def parse(text: str) -> int:
        if not WHOLE.fullmatch(text) or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"expected a whole number from {least} to {most}, got {_shown(text)}")
        return int(text)

    return parse


def number(
    least: float = 0.0, most: float = math.inf, above: bool = False, below: bool = False
) -> Callable[[str], float]:
    """A finite number from `least` to `most`; above, below: not these themselves."""

    def parse(text: str) -> float:
        value = float(text) if DECIMAL.fullmatch(text) else math.nan
        low, high = value > least if above else value >= least, value < most if below else value <= most
        if not (math.isfinite(value) and low and high):
            words = f"{'above' if above else 'of at least'} {least:g}"
            if math.isfinite(most):
                words += f" and {'below' if below else 'at most'} {most:g}"
            raise argparse.ArgumentTypeError(f"expected a number {words}, got {_shown(text)}")
        return value

    return parse


def _shown(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "...")
