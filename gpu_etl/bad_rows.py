"""What becomes of rows that cannot be parsed: the first one ends the run, or they are left out and counted."""

import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from gpu_etl import faults
from gpu_etl.errors import BadRowError, DataError
from gpu_etl.rows import FAULT_STRIDE
from gpu_etl.source import Slab

RULES = ("error", "skip")
SHOWN = 5


def _to_stderr(words: str) -> None:
    print(words, file=sys.stderr)


@dataclass(frozen=True)
class BadRows:
    """rule: "error", or "skip" up to `most` of them, of which the first few are described."""

    rule: str = "error"
    most: int = 1000

    def check(self) -> None:
        """Raise DataError where a value is none of those."""
        if self.rule not in RULES or self.most < 0:
            raise DataError(f"--bad-rows: expected {' or '.join(RULES)}, with --max-bad-rows 0 or more")

    def settle(
        self, slab: Slab, codes: np.ndarray, *, where: Callable[[int], str], before: int,
        say: Callable[[str], None] = _to_stderr,
    ) -> dict[str, int]:  # fmt: skip
        """Bad rows of a parsed slab by reason, given its fault codes int32 [n]. Raises BadRowError where there may be
        none, or not so many.

        where: words for a row by its number in the slab, from 0. before: how many were left out before
        this slab. Only rows that are told of are looked at again.
        """
        bad = np.flatnonzero(codes)
        if not len(bad):
            return {}
        left = self.most - before if self.rule == "skip" else 0
        told = bad[: max(0, min(SHOWN - before, left))].tolist()
        over = bad[left : left + 1].tolist()
        words = [
            f"{where(row)}: {fault}"
            for row, fault in zip(told + over, slab.describe(told + over, codes[told + over]), strict=True)
        ]
        for line in words[: len(told)]:
            say(f"left out: {line}")
        if over and self.rule == "error":
            raise BadRowError(f"{words[-1]}. Mend the file, or leave such rows out with --bad-rows skip")
        if over:
            raise BadRowError(f"{words[-1]}. More than --max-bad-rows {self.most} such rows; is this Criteo's format?")
        counts = np.bincount(codes[bad] // FAULT_STRIDE)
        return {faults.REASONS[kind]: int(count) for kind, count in enumerate(counts) if count}
