"""Every kind of loader gives the same bits, from every form, in every order, and touches no batch it gave out."""

import gc
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from gpu_etl.common.errors import DataError
from gpu_etl.load import loader, resident
from gpu_etl.load.batch import log_dense
from gpu_etl.load.dali import DaliLoader
from gpu_etl.load.dataset import open_dataset
from gpu_etl.load.order import Order
from gpu_etl.load.plain import CpuLoader
from gpu_etl.load.resident import ResidentLoader
from gpu_etl.load.unpack import Memory, Unpacker, empty_block, unpack_block
from gpu_etl.pipeline import Settings, encode_days
from tests.conftest import ROOT, loader_params, needs

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
LOADERS = [CpuLoader, DaliLoader, ResidentLoader]
FORMS = ["records", "dist", "dle", "torchrec"]
ROWS = 5000


def make_records(rows: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    records = random.integers(0, 120, (rows, 40), np.int32)
    records[:, 0] &= 1
    records[:, 1:14] = random.lognormal(4, 4, (rows, 13)).clip(0, 2**31 - 1)
    return records


def write_split(folder, form, records, name):
    folder.mkdir(parents=True, exist_ok=True)
    if form == "records":
        records.tofile(folder / f"{name}_data.bin")
        return
    folder = folder / name
    folder.mkdir()
    dense = records[:, 1:14].astype(np.float32)
    if form == "dle":
        (records[:, 0] != 0).tofile(folder / "label.bin")
        np.log(dense + 3).astype(np.float16).tofile(folder / "numerical.bin")
    else:
        records[:, 0].astype(np.float32).tofile(folder / "label.bin")
        dense.tofile(folder / "numerical.bin")
    for c in range(26):
        records[:, 14 + c].astype(np.int8 if form == "dle" else np.int32).tofile(folder / f"cat_{c}.bin")


def write_days(folder, days, dtype=np.int32):
    for day, records in enumerate(days):
        np.save(folder / f"day_{day}_labels.npy", records[:, :1])
        np.save(folder / f"day_{day}_dense.npy", np.log(records[:, 1:14].astype(np.float32) + 2))
        np.save(folder / f"day_{day}_sparse.npy", records[:, 14:].astype(dtype))


@pytest.fixture(scope="module", params=FORMS)
def source(request, tmp_path_factory):
    folder, form = tmp_path_factory.mktemp(request.param), request.param
    if form == "torchrec":
        records = make_records(ROWS)
        write_days(folder, [records[:2345], records[2345:], make_records(11, 1)])
    else:
        write_split(folder, form, make_records(ROWS), "train")
        write_split(folder, form, make_records(11, 1), "test")
    return open_dataset(folder, "auto").splits["train"]


def truth(source) -> list[np.ndarray]:
    """The split's columns as 32-bit patterns, by the specification."""
    dense, sparse, label = source.columns(0, source.rows)
    if not source.logged:
        dense = log_dense(torch.from_numpy(dense)).numpy()
    return [dense.view(np.int32), sparse, label.view(np.int32)]


def test_the_forms_hold_what_was_written(source):
    records = make_records(ROWS)
    dense, sparse, label = source.columns(0, ROWS)
    assert source.rows == ROWS
    np.testing.assert_array_equal(sparse, records[:, 14:])
    np.testing.assert_array_equal(label, records[:, 0])
    numbers = records[:, 1:14].astype(np.float32)
    if source.logged:
        shift, dtype = (3, np.float16) if len(source.paths) == 28 else (2, np.float32)
        numbers = np.log(numbers + np.float32(shift)).astype(dtype)
    np.testing.assert_array_equal(dense, numbers)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", loader_params(LOADERS))
@pytest.mark.parametrize(
    ("batch_size", "more"),
    [
        (11, {}), (333, {}), (ROWS, {}), (9999, {}), (100, {"shuffle": True, "seed": 3}),
        (100, {"shuffle": True, "buffer": 1000}), (77, {"buffer": 100_000}),
        (100, {"shuffle": True, "rank": 2, "world": 3}), (100, {"buffer": 450, "rank": 6, "world": 7}),
        (1500, {"rank": 0, "world": 600}),
    ],
)  # fmt: skip
def test_the_same_bits_as_the_specification(source, kind, batch_size, more, device):
    expected = truth(source)
    if device == "cuda" and not source.logged:
        expected[0] = log_dense(torch.from_numpy(source.columns(0, ROWS)[0]).cuda()).cpu().view(torch.int32).numpy()
    order = Order(ROWS, batch_size, **more)
    reader = kind(source, batch_size, torch.device(device), **more)
    for epoch, start in ((0, 0), (1, len(reader) // 2)):
        found = list(reader.batches(epoch, start))
        assert len(found) == len(reader) - start
        for batch in found:
            assert all(tensor.is_contiguous() and tensor.device.type == device for tensor in batch)
            assert [t.dtype for t in batch] == [torch.float32, torch.int32, torch.float32]
        units = list(order.units(epoch, start))
        assert [len(batch.label) for batch in found] == [size for unit in units for size in unit.sizes]
        rows = np.concatenate([unit.rows() for unit in units])
        for tensors, column in zip(zip(*found, strict=True), expected, strict=True):
            np.testing.assert_array_equal(torch.cat(tensors).cpu().view(torch.int32).numpy(), column[rows])


@pytest.mark.parametrize(("floats", "logged"), [(False, False), (True, False), (True, True)])
def test_the_compiled_pass_is_torchs_bit_for_bit(floats, logged):
    records = make_records(6000)
    records[:5, 1:14] = [[0] * 13, [65535] * 13, [65536] * 13, [2**31 - 1] * 13, [-1] * 13]
    records[5, 1:14] = -7
    if floats:
        numbers = records.view(np.float32)
        numbers[:, :14] = records[:, :14].astype(np.float32)
        numbers[6, 1:14] = [np.nan, np.inf, -np.inf, 0.5, -0.0, 1e-45, 2.5, 65535.5, 1e38, -0.5, -1.5, 3, 7]
    picks = np.random.default_rng(1).integers(0, 6000, 9000)
    for of in (None, picks):
        expected = unpack_block(torch.from_numpy(records), None if of is None else torch.from_numpy(of), floats, logged)
        rows = 6000 if of is None else 9000
        found = Memory().empty_batch(rows)
        Unpacker(floats, logged).into(found, 0, rows, records, of)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a.view(torch.int32), b.view(torch.int32)) or torch.equal(a.isnan(), b.isnan())
            assert torch.equal(a.nan_to_num(), b.nan_to_num())


def test_every_log_in_the_table_and_around_it_is_torchs():
    numbers = np.concatenate([np.arange(1 << 18), 2 ** np.arange(18, 31), 2 ** np.arange(18, 31) - 1])
    records = np.zeros((-(-len(numbers) // 13), 40), np.int32)
    padded = np.zeros(len(records) * 13, np.int32)
    padded[: len(numbers)] = numbers
    records[:, 1:14] = padded.reshape(-1, 13)
    found = Memory().empty_batch(len(records))
    Unpacker(False, False).into(found, 0, len(records), records)
    expected = log_dense(torch.from_numpy(padded.astype(np.float32)))
    assert torch.equal(found.dense.view(-1), expected)


@pytest.mark.parametrize("kind", loader_params(LOADERS))
def test_batches_can_be_saved(source, kind, tmp_path):
    batch = next(kind(source, 40, torch.device("cpu")).batches())
    torch.save(tuple(batch), tmp_path / "batch.pt")
    for a, b in zip(torch.load(tmp_path / "batch.pt", weights_only=True), batch, strict=True):
        assert torch.equal(a, b)


def test_memory_is_used_again_only_when_nobody_holds_the_batch():
    memory = Memory()
    batch = memory.empty_batch(10)
    place = batch.sparse.data_ptr()
    part = batch.sparse[3:5].numpy()
    del batch
    gc.collect()
    assert memory.empty_batch(10).sparse.data_ptr() != place and len(part) == 2
    del part
    gc.collect()
    assert place in [memory.empty_batch(rows).sparse.data_ptr() for rows in (10, 7)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", loader_params([CpuLoader, DaliLoader]))
@pytest.mark.parametrize("buffer", [0, 400])
def test_a_slot_given_back_is_not_read_any_more(source, kind, buffer, device, monkeypatch):
    """Poison: what a slot holds is overwritten as soon as it may be filled again, as a fast reader would do."""
    real, poisoned = loader.Slot.give_back, []

    def give_back(self, free=None, held=None):
        if free:
            free.synchronize()
        self._block.fill_(0x55555555)
        self._picks.fill_(0)
        poisoned.append(self)
        real(self, free, held)

    monkeypatch.setattr(loader.Slot, "give_back", give_back)
    order = {"shuffle": True, "seed": 2, "buffer": buffer}
    if device == "cuda":  # the training stream is busy, so that batches wait there for a long time
        torch.cuda._sleep(200_000_000)
    monkeypatch.setattr("gpu_etl.load.order.UNIT_ROWS", 100)
    kept = list(kind(source, 50, torch.device(device), **order).batches(1))
    monkeypatch.undo()
    plain = list(ResidentLoader(source, 50, torch.device(device), **order).batches(1))
    for a, b in zip(kept, plain, strict=True):
        assert all(torch.equal(x.view(torch.int32), y.view(torch.int32)) for x, y in zip(a, b, strict=True))
    assert poisoned or (kind is CpuLoader and device == "cpu")


@pytest.mark.parametrize("ahead", [1, 2, 5])
@pytest.mark.parametrize("kind", loader_params(LOADERS))
def test_any_number_of_batches_ahead(source, kind, ahead, monkeypatch):
    monkeypatch.setattr("gpu_etl.load.order.UNIT_ROWS", 200)
    readers = [kind(source, 100, torch.device("cpu"), True, ahead=depth) for depth in (ahead, 3)]
    for a, b in zip(*(reader.batches() for reader in readers), strict=True):
        assert torch.equal(a.sparse, b.sparse)


@pytest.mark.parametrize("kind", loader_params(LOADERS))
@pytest.mark.parametrize("buffer", [0, 3000])
def test_a_rank_without_rows_in_the_last_batch_takes_the_step_all_the_same(source, kind, buffer, monkeypatch):
    monkeypatch.setattr("gpu_etl.load.order.UNIT_ROWS", 0)  # so that the empty share is read by itself
    found = list(kind(source, 2499, torch.device("cpu"), True, buffer=buffer, rank=0, world=2000).batches())
    assert [batch.dense.shape for batch in found] == [(1, 13), (1, 13), (0, 13)]


def test_a_slot_filled_too_early_is_an_error():
    slot = loader.Slot(pinned=False)
    slot.take()
    with pytest.raises(RuntimeError, match="not given back"):
        slot.take()


def test_a_split_that_does_not_fit_is_told(source, monkeypatch):
    monkeypatch.setattr(resident, "free_bytes", lambda device: ROWS * 160)
    with pytest.raises(DataError, match=r"--cache device: .* takes 0\.0 GB on cpu, of which 0\.0 GB are free"):
        ResidentLoader(source, 10, torch.device("cpu"))


@pytest.mark.parametrize("kind", loader_params(LOADERS))
def test_closing_a_loader_early_ends_its_thread(source, kind):
    import threading

    before = threading.active_count()
    for _ in range(3):
        batches = kind(source, 10, torch.device("cpu"), True).batches()
        next(batches)
        batches.close()
    assert threading.active_count() == before


MEMORY = """
import resource, sys, torch
from gpu_etl.load.dataset import open_dataset
from gpu_etl.load import plain as cpu, dali, resident
kind = {"cpu": cpu.CpuLoader, "dali": dali.DaliLoader, "resident": resident.ResidentLoader}[sys.argv[2]]
source, buffer = open_dataset(sys.argv[1], "auto").splits["train"], int(sys.argv[3])
reader = kind(source, 1024, torch.device("cpu"), True, buffer=buffer)

def used():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1])

done, marks, epoch = 0, [], 0
while done < 2400:
    for batch in reader.batches(epoch):
        done += 1
        if done in (400, 1400, 2400):
            marks.append(used())
    epoch += 1
print(*marks)
"""


MEMORY_CASES = [
    ("cpu", 0), ("cpu", 4096), pytest.param("dali", 4096, marks=needs("nvidia.dali")), ("resident", 0),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "buffer"), MEMORY_CASES)
def test_memory_does_not_grow_over_a_thousand_batches(tmp_path, kind, buffer):
    records = make_records(60_000)
    for name in ("train", "test"):
        write_split(tmp_path, "records", records, name)
    words = [sys.executable, "-c", MEMORY, str(tmp_path), kind, str(buffer)]
    done = subprocess.run(words, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    _, before, after = map(int, done.stdout.split())
    assert after - before < 16_000  # KB; one leaked batch in ten would be as much


def test_what_is_wrong_with_numbers_is_told(tmp_path):
    records = make_records(50)
    for form, name, values, words in (
        ("dist", "a", np.log(records[:, 1:14].astype(np.float32) + 1), "expected whole numbers, got .*are logged"),
        ("dle", "b", np.full((50, 13), 3000, np.float16), "expected logarithms, at most 23, got 3000; .*not logged"),
    ):
        for split in ("train", "test"):
            write_split(tmp_path / name, form, records, split)
        values.tofile(tmp_path / name / "train" / "numerical.bin")
        with pytest.raises(DataError, match=rf"numerical\.bin: row 1, column I\d+: {words}"):
            open_dataset(tmp_path / name, "auto")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: (f / "day_0_sparse.npy").unlink(), r"day_0_sparse\.npy: no such file"),
        (lambda f: np.save(f / "day_1_labels.npy", np.zeros((3, 1), np.int32)), "day 1: .* day_1_labels.npy 3"),
        (lambda f: np.save(f / "day_0_dense.npy", np.zeros((40, 13), np.int32)), "dtype f, got shape .* int32"),
        (lambda f: np.save(f / "day_0_dense.npy", np.zeros((40, 12), np.float32)), "expected rows of 13"),
        (lambda f: np.save(f / "day_0_dense.npy", np.full((40, 13), 99, np.float32)), "got 99; .* not logged"),
        (lambda f: os.truncate(f / "day_0_sparse.npy", 1000), "by its header, found 1,000; the file is cut off"),
        (lambda f: (f / "day_0_dense.npy").write_bytes(b"no array"), r"day_0_dense\.npy: expected a \.npy file"),
        (lambda f: [p.unlink() for p in f.glob("day_[12]_*")], "at least two days"),
    ],
)
def test_what_is_wrong_with_npy_days_is_told(tmp_path, change, words):
    write_days(tmp_path, [make_records(40), make_records(30, 1), make_records(21, 2)], np.int64)
    data = open_dataset(tmp_path, "torchrec")
    assert {name: split.rows for name, split in data.splits.items()} == {"train": 70, "val": 11, "test": 10}
    last = make_records(21, 2)[:, 14:]
    for name, expected in (("val", last[:11]), ("test", last[11:])):
        np.testing.assert_array_equal(data.splits[name].columns(0, data.splits[name].rows)[1], expected)
    with pytest.raises(DataError, match=r"day_0_sparse\.npy: row \d+, column C\d+: expected 0 to 99, got 1"):
        data.check_ids([100] * 26)
    with pytest.raises(DataError, match=r"torchrec's \.npy files; change --dataset_type"):
        open_dataset(tmp_path, "dist")
    change(tmp_path)
    with pytest.raises(DataError, match=words):
        open_dataset(tmp_path, "auto")


@needs("nvidia.dali")
def test_encoded_days_by_every_loader(day_files, tmp_path):
    encode_days(day_files, tmp_path, Settings())
    source = open_dataset(tmp_path).splits["train"]
    readers = [kind(source, 64, torch.device("cpu"), True, 1, 300) for kind in LOADERS]
    for plain, dali, held in zip(*(reader.batches(2) for reader in readers), strict=True):
        for other in (dali, held):
            assert all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in zip(plain, other, strict=True))
    assert empty_block(3).shape == (3, 40)
