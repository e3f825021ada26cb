"""Checks of the slab functions, one set of them against another: the CPU's against slow.py, or the GPU's against the
CPU's.

    python -m gpu_etl.doctor.slab parse cuda
"""

import argparse
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from types import ModuleType

import numpy as np

from gpu_etl.backend import select as backend
from gpu_etl.backend.cpu import slab as cpu
from gpu_etl.common import crc
from gpu_etl.common.buffers import ScratchBuffer
from gpu_etl.doctor import slow
from gpu_etl.doctor.child import outcome
from gpu_etl.doctor.samples import texts
from gpu_etl.rows.numbered import NUMBERED, first_number
from gpu_etl.schema import choose_preset

ROWS = {"cpu": 3000, "cuda": 200_000}
SEEDS = range(12)


@dataclass(frozen=True)
class Sides:
    """Two modules with the slab functions, of which `truth` is believed; rows: of a large slab."""

    truth: ModuleType
    tried: ModuleType
    rows: int

    def parsed(self, text: bytes):
        """(values, missing, faults) by both."""
        array = np.frombuffer(text, np.uint8)
        return [kernels.parse(array, kernels.find_rows(array), ScratchBuffer()) for kernels in (self.truth, self.tried)]

    def both(self):
        """The two modules."""
        return self.truth, self.tried


def on_host(array, count: int) -> np.ndarray:
    """What the first `count` rows of a slab have in an array of either side, on the host."""
    if isinstance(array, np.ndarray):
        return array[:count]
    from gpu_etl.backend.cuda.launch import download

    return download(array)[:count]


def columns(kernels: ModuleType, values) -> np.ndarray:
    """A slab's values on the host, int32 [n, 40]."""
    return kernels.rows_of(values, ScratchBuffer(kernels.host_bytes))()


def same(tried, truth, what: str) -> None:
    """Raise AssertionError where two arrays differ, saying how."""
    np.testing.assert_array_equal(tried, truth, err_msg=what, verbose=False)


def parse(sides: Sides) -> None:
    """find_rows and parse."""
    for name, text in texts(sides.rows).items():
        (values, missing, faults), (tried, missing_there, faults_there) = sides.parsed(text)
        same(faults_there, faults, f"faults of {name}")
        good = faults == 0
        same(columns(sides.tried, tried)[good], columns(sides.truth, values)[good], f"values of {name}")
        same(on_host(missing_there, len(good))[good], missing[good], f"missing fields of {name}")


def slab(sides: Sides) -> None:
    """keep_rows, summarize, integers, labels, upload, rows_of."""
    truth, tried = sides.both()
    slabs = texts(sides.rows)
    for name in ("ragged", "many values", "all missing", "extremes", "nothing"):
        (values, missing, _), (there, missing_there, _) = sides.parsed(slabs[name])
        same(tried.labels(there), truth.labels(values), f"labels of {name}")
        found, expected = tried.summarize(there, missing_there), truth.summarize(values, missing)
        assert found == expected, f"summary of {name}: {expected} expected, got {found}"
        keep = np.arange(len(values)) % 3 != 1
        kept, kept_there = truth.keep_rows(values, missing, keep), tried.keep_rows(there, missing_there, keep)
        same(columns(tried, kept_there[0]), columns(truth, kept[0]), f"rows kept of {name}")
        same(on_host(kept_there[1], len(kept[1])), kept[1], f"missing fields of rows kept of {name}")
        host = np.asfortranarray(columns(truth, values).view(np.uint32))
        for shift, empty_value in ((0, 0), (2, 0), (5, 7), (-3, 1)):
            (mine, none), (theirs, none_there) = truth.upload(host.copy("F"), missing), tried.upload(host, missing)
            truth.integers(mine, none, shift, empty_value)
            tried.integers(theirs, none_there, shift, empty_value)
            same(columns(tried, theirs), columns(truth, mine), f"integers of {name}, shift {shift}")


def group(sides: Sides) -> None:
    """group: rows by bucket, for every seed."""
    (values, _, _), (there, _, _) = sides.parsed(texts(sides.rows)["ragged"])
    for seed in (*SEEDS, 2**63 + 5):
        for first, buckets in ((0, 1), (first_number(3) + 5, 7), (first_number(200), 512)):
            grouped, ends = sides.truth.group(values, first, seed, buckets, ScratchBuffer())()
            tried, ends_there = sides.tried.group(there, first, seed, buckets, ScratchBuffer(sides.tried.host_bytes))()
            same(ends_there, ends, f"ends of {buckets} buckets, seed {seed}")
            for begin, end in pairwise([0, *ends.tolist()]):  # in a bucket, any order will do
                pieces = (np.sort(part[begin:end], order="row") for part in (tried, grouped))
                same(*pieces, f"rows of a bucket of {buckets}, seed {seed}")


def dictionaries(sides: Sides) -> None:
    """Dictionaries: code, new_keys, counts, recount; codes may differ, what they stand for may not."""
    slabs = texts(sides.rows)
    for preset in (choose_preset("count"), choose_preset("mlperf", max_index_range=50), choose_preset("torchrec")):
        for name in ("ragged", "many values"):
            _same_dictionaries(sides, preset, slabs[name], f"{name}, {preset.order}, range {preset.max_index_range}")


def _same_dictionaries(sides: Sides, preset, text: bytes, what: str) -> None:
    (values, missing, _), (there, missing_there, _) = sides.parsed(text)
    made = [kernels.Dictionaries(preset, 2) for kernels in sides.both()]
    parsed = (values, missing), (there, missing_there)
    n, keys = len(values), [[[] for _ in range(26)] for _ in range(2)]
    for begin, end in pairwise([0, n // 4, n // 4 + 1, n]):
        keep = (np.arange(n) >= begin) & (np.arange(n) < end)
        meant = []
        for side, kernels in enumerate(sides.both()):
            piece = kernels.keep_rows(*parsed[side], keep)
            made[side].code(*piece, begin)
            for column, new in zip(keys[side], made[side].new_keys()(), strict=True):
                column.append(new)
            coded = columns(kernels, piece[0])
            known = [np.concatenate([[0], counts.keys]) for counts in made[side].counts().columns]
            meant.append((coded[:, 14:] == 0, np.stack([known[c][coded[:, 14 + c]] for c in range(26)], 1)))
        same(meant[1][0], meant[0][0], f"missing values of {what}")
        same(meant[1][1], meant[0][1], f"values behind the codes of {what}")
    joined = [np.concatenate(column) for column in keys[1]]
    again = sides.tried.Dictionaries(preset, 2, joined)
    again.recount(coded, np.arange(n - len(coded), n))
    for c, (mine, theirs) in enumerate(zip(made[0].counts().columns, made[1].counts().columns, strict=True)):
        for part in ("counts", "first_rows"):
            pair = ((getattr(one, part)[np.argsort(one.keys)]) for one in (theirs, mine))
            same(*pair, f"{part} of {what}, column C{c + 1}")
        same(np.sort(theirs.keys), np.sort(mine.keys), f"keys of {what}, column C{c + 1}")
        recounted = again.counts().columns[c]
        same(recounted.keys, theirs.keys, f"keys of {what} again, column C{c + 1}")
        expected = np.bincount(coded[:, 14 + c], minlength=len(theirs.keys) + 1)[1:]
        same(recounted.counts, expected, f"recount of {what}, column C{c + 1}")
    for one in (*made, again):
        one.close()


def finish(sides: Sides) -> None:
    """Finisher: coded rows to records, in file order, and shuffled by every seed."""
    random, n = np.random.default_rng(0), sides.rows
    ids = tuple(random.integers(0, 2**31 - 1, 30 + c).astype(np.int32) for c in range(26))
    numbered = np.zeros(n, NUMBERED)
    numbered["coded"] = random.integers(0, 30, (n, 40))
    numbered["coded"][0, 1:14], numbered["coded"][1, 1:14] = 2**31 - 1, 0
    numbered["row"] = random.permutation(n)
    numbered["row"][::3] += first_number(2)
    coded = np.ascontiguousarray(numbered["coded"])
    for seed in (None, *SEEDS, 2**63 + 5):
        found = []
        for kernels in sides.both():
            finisher = kernels.Finisher(ids, np.array([2, 0, -3]))
            records = kernels.host_bytes(n * 160).view(np.int32).reshape(n, 40)
            finisher.take(coded, 2) if seed is None else finisher.take_shuffled(numbered, seed)
            for begin in range(0, n, n // 2 - 3):
                end = min(begin + n // 2 - 3, n)
                finisher.finish(begin, end, records[begin:end])()
            found.append(records.copy())
        same(found[1], found[0], f"records, seed {seed}")


def checksum(sides: Sides) -> None:
    """CRC-32 of text: in pieces, put together; on a GPU by its kernel; against zlib."""
    text = texts(sides.rows)["ragged"]
    for size in (0, 1, 4095, 4096, 4097, 65_537, len(text)):
        piece, rest = text[:size], text[size:]
        assert crc.combine(zlib.crc32(piece), zlib.crc32(rest), len(rest)) == zlib.crc32(text), "CRCs put together"
        if piece and sides.tried is not cpu:
            assert _crc_by_kernel(piece) == zlib.crc32(piece), f"CRC-32 of {len(piece)} bytes by the kernel"


def _crc_by_kernel(text: bytes) -> int:
    from gpu_etl.backend.cuda.gds import PIECE, _checksums
    from gpu_etl.backend.cuda.kernel import blocks_for
    from gpu_etl.backend.cuda.launch import download, launch, upload_array

    pieces = -(-len(text) // PIECE)
    crcs, size = upload_array(np.zeros(pieces, np.uint32)), upload_array(np.array([len(text)]))
    there = upload_array(np.frombuffer(text, np.uint8))
    launch(_checksums, blocks_for(pieces), there, size, upload_array(crc.table()), crcs)
    return int(crc.combine_pieces(download(crcs), PIECE, len(text)))


CHECKS: dict[str, Callable[[Sides], None]] = {
    "parse": parse, "slab": slab, "group": group, "dictionaries": dictionaries, "finish": finish, "checksum": checksum,
}  # fmt: skip


def usable(kernels: ModuleType) -> None:
    """Use the device at all: a tiny slab, a tiny shuffle."""
    text = np.frombuffer(texts(20)["ragged"], np.uint8)
    values, _, faults = kernels.parse(text, kernels.find_rows(text), ScratchBuffer())
    assert len(faults) == 20 and not faults.any() and len(kernels.labels(values)) == 20
    finisher = kernels.Finisher((np.arange(9, dtype=np.int32),) * 26, np.zeros(1, np.int64))
    finisher.take_shuffled(np.zeros(20, NUMBERED), 0)
    records = kernels.host_bytes(20 * 160).view(np.int32).reshape(20, 40)
    assert not finisher.finish(0, 20, records)().any()


def main(argv: list[str] | None = None) -> int:
    """Run one check; returns the exit status, as child.py says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("check", choices=["usable", *CHECKS])
    parser.add_argument("device", choices=list(ROWS))
    parser.add_argument("--rows", type=int, help="of a large slab")
    args = parser.parse_args(argv)

    def check() -> None:
        tried = backend.device(args.device)
        if args.check == "usable":
            usable(tried)
        else:
            CHECKS[args.check](Sides(slow if args.device == "cpu" else cpu, tried, args.rows or ROWS[args.device]))

    return outcome(check)


if __name__ == "__main__":
    sys.exit(main())
