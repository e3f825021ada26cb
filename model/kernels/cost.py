"""Least bytes and operations of a kernel, and what they predict on a GPU."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What a GPU reaches: bytes/s copied in device memory, float operations/s of matrix products by type."""

    bytes: float
    operations: dict[str, float]


H200 = Limits(4.3e12, {"float16": 790e12, "bfloat16": 790e12, "float32": 60e12})  # measured ones, not the data sheet's
BUS = 50e9  # bytes/s and direction between host memory and a GPU: PCIe 5, as seen in practice


@dataclass(frozen=True)
class Cost:
    """Least bytes of device memory moved and operations done for a batch. Every row is counted once a look-up where it
    is read, and once a distinct row where it is changed; caches can only lower that."""

    bytes: float
    operations: float

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.bytes + other.bytes, self.operations + other.operations)

    def seconds(self, limits: Limits, matrices: str) -> float:
        """The longer of moving and computing, each at its limit; matrices: the type of the products."""
        return max(self.bytes / limits.bytes, self.operations / limits.operations[matrices])


@dataclass(frozen=True)
class Shape:
    """batch samples, tables, dim; distinct: different rows among the look-ups of a batch; weight, matrix: bytes of an
    element of the tables and of the matrices."""

    batch: int
    tables: int
    dim: int
    distinct: int
    weight: int = 4
    matrix: int = 2

    @property
    def lookups(self) -> int:
        """Look-ups of a batch."""
        return self.batch * self.tables

    @property
    def width(self) -> int:
        """Columns of the interaction's output, without self-interaction."""
        return self.dim + (self.tables + 1) * self.tables // 2 + 1
