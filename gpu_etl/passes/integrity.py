"""Checksums of what lies in a work folder, so that nothing is built on that is not what was written there.

Coded rows are told by a sum of a digest a row, which depends on the row and its number: whoever writes the rows, where
to and in what order, and whether they move from a day's file to a bucket, the sum over all of them stays the same.
"""

import hashlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from common import atomic, typed
from gpu_etl.common.errors import WorkDamagedError
from gpu_etl.common.jit import compiled
from gpu_etl.dataset.manifest import describe_file
from gpu_etl.passes.buckets import Buckets
from gpu_etl.rows.numbered import NUMBER_WORDS, NUMBERED, words_of
from gpu_etl.rows.random_keys import mix64
from gpu_etl.schema import COLUMNS, FIRST_SPARSE

SUM_MASK = (1 << 64) - 1
READ_ROWS = 1 << 12
# Odd numbers, one a column: the row's digest is a sum of products of pairs, which hides no difference in a word unless
# its partner plus such a number is a multiple of a high power of 2 (NH of UMAC, RFC 4418).
_SALTS = (np.random.default_rng(40).integers(0, 1 << 63, COLUMNS, np.uint64) << np.uint64(1)) | np.uint64(1)


@compiled
def _digest(number, words, row, begin):
    """Digest uint64 of the row words[row, begin:], 40 words uint32, with that number."""
    total = np.uint64(0)
    for column in range(0, COLUMNS, 2):
        a = np.uint64(words[row, begin + column]) + _SALTS[column]
        b = np.uint64(words[row, begin + column + 1]) + _SALTS[column + 1]
        total += a * b
    return mix64(total ^ mix64(np.uint64(number) + np.uint64(1)))


@compiled
def _sum_rows(words, first):
    total = np.uint64(0)
    for row in range(len(words)):
        total += _digest(first + row, words, row, 0)
    return total


@compiled
def _sum_buckets(words, ends, sums):
    """Add to sums uint64 [buckets] the digests of numbered rows, words uint32 [n, 42]; returns the sum of all."""
    total, begin = np.uint64(0), 0
    for bucket in range(len(ends)):
        found = np.uint64(0)
        for row in range(begin, ends[bucket]):
            number = np.uint64(words[row, 1]) << np.uint64(32) | np.uint64(words[row, 0])
            found += _digest(number, words, row, NUMBER_WORDS)
        sums[bucket] += found
        total += found
        begin = ends[bucket]
    return total


def rows_sum(coded: np.ndarray, first_number: int) -> int:
    """Sum of the digests of rows, 32-bit integers [n, 40], numbered from first_number on, modulo 2^64."""
    return int(_sum_rows(np.ascontiguousarray(coded).view(np.uint32), first_number))


def add_to_buckets(numbered: np.ndarray, ends: np.ndarray, sums: np.ndarray) -> int:
    """Add the digests of rows that numbered.group() made to the sums of their buckets, uint64 [buckets], in place.
    Returns the sum of all of them."""
    return int(_sum_buckets(words_of(numbered).view(np.uint32), ends, sums))


def numbered_sum(numbered: np.ndarray) -> int:
    """Sum of the digests of rows NUMBERED [n]."""
    return add_to_buckets(numbered, np.array([len(numbered)]), np.zeros(1, np.uint64))


def add(*sums: int) -> int:
    """The sum of sums of digests."""
    return sum(sums) & SUM_MASK


def rows_of(buckets: Buckets) -> Iterator[np.ndarray]:
    """All rows in the buckets, NUMBERED, in pieces and in any order; buckets.sums are made anew from them."""
    buckets.sums[:] = 0
    for bucket, path in enumerate(buckets.paths):
        with open(path, "rb") as file:
            while len(numbered := np.fromfile(file, NUMBERED, READ_ROWS)):
                add_to_buckets(numbered, np.array([len(numbered)]), buckets.sums[bucket : bucket + 1])
                yield numbered


def check_codes(coded: np.ndarray, limits: np.ndarray, folder: Path) -> None:
    """Raise WorkDamagedError where rows int32 [n, 40] hold a category code beyond the 26 limits: the compiled loops
    that count by code look at no bound."""
    codes = coded[:, FIRST_SPARSE:]
    if len(codes) and ((codes.min(axis=0) < 0) | (codes.max(axis=0) > limits)).any():
        raise WorkDamagedError(f"{folder}: coded rows with codes that no dictionary has: damaged on the disk")


def expect(found: int | str, expected: int | str, where: Path, what: str) -> None:
    """Raise WorkDamagedError where a checksum of the work folder is another one than the journal says."""
    if found != expected:
        raise WorkDamagedError(
            f"{where}: {what} differ from what was written there (checksum {found}, expected {expected}): damaged on "
            "the disk, or changed by another program"
        )


def check_file(path: Path, expected: dict) -> None:
    """Raise WorkDamagedError where a file is missing, or not the one that manifest.describe_file() described."""
    if not path.is_file():
        raise WorkDamagedError(f"{path}: no such file, but this run's journal says that it was written")
    if path.stat().st_size != expected["bytes"] or describe_file(path) != expected:
        raise WorkDamagedError(f"{path}: the file differs from what was written there (its SHA-256 is another one)")


def identity(value) -> str:
    """A digest of something that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()


def write_json(path: Path, value) -> None:
    """Write a value with a checksum beside it, whole or not at all."""
    body = json.dumps(value, allow_nan=False)
    atomic.write_text(path, json.dumps({"crc32": f"{zlib.crc32(body.encode()):08x}", "value": body}))


def read_json(path: Path):
    """What write_json() wrote; None where there is no such file. Raises WorkDamagedError where it is damaged."""
    try:
        found = json.loads(typed.read_file(path, WorkDamagedError))
        if found["crc32"] != f"{zlib.crc32(found['value'].encode()):08x}":
            raise ValueError("its checksum is another one")
        return json.loads(found["value"])
    except FileNotFoundError:
        return None
    except WorkDamagedError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise WorkDamagedError(f"{path}: damaged ({error})") from error
