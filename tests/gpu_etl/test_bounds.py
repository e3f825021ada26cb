"""Labels, numbers and ids that cannot be are refused where rows are unpacked, whatever reads them, in every form."""

import numpy as np
import pytest
import torch

from gpu_etl.common.errors import DataError
from gpu_etl.load.dali import DaliLoader
from gpu_etl.load.dataset import open_dataset
from gpu_etl.load.plain import CpuLoader
from gpu_etl.load.resident import ResidentLoader
from gpu_etl.load.unpack import ANY_ID, DeviceBounds, unpack_block
from gpu_etl.pipeline import Settings, encode_days
from tests.gpu_etl.test_loaders import make_records, write_days, write_split

CPU = torch.device("cpu")
LOADERS = [CpuLoader, DaliLoader, ResidentLoader]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
ORDERS = [{}, {"shuffle": True, "buffer": 300}, {"rank": 1, "world": 2}]
ROWS, ROW = 3000, 2560  # in the second half of its batch, which is rank 1's
SIZES = [120] * 26


def damaged(folder, form, column, value):
    """A data set of one form, of which one value of the training split cannot be."""
    records = make_records(ROWS)
    folder.mkdir(exist_ok=True)
    if form == "torchrec":
        days = [records[:1234], records[1234:], make_records(11, 1)]
        write_days(folder, days)
        name = "labels" if column == 0 else "dense" if column < 14 else "sparse"
        array = np.load(folder / f"day_1_{name}.npy")
        array[ROW - 1234, column - {"labels": 0, "dense": 1, "sparse": 14}[name]] = value
        np.save(folder / f"day_1_{name}.npy", array)
    else:
        write_split(folder, form, records, "train")
        write_split(folder, form, make_records(11, 1), "test")
        if form == "records":
            records[ROW, column] = value
            records.tofile(folder / "train_data.bin")
        else:
            part = "label" if column == 0 else "numerical" if column < 14 else f"cat_{column - 14}"
            path, width = folder / "train" / f"{part}.bin", 13 if part == "numerical" else 1
            array = np.fromfile(path, np.int32 if column >= 14 else np.float32).reshape(ROWS, width)
            array[ROW, column - 1 if width == 13 else 0] = value
            array.tofile(path)
    found = open_dataset(folder, "auto")
    found.bound(SIZES)
    return found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("order", ORDERS, ids=["plain", "rows", "rank"])
@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize(
    ("form", "column", "value", "words"),
    [
        ("records", 14 + 6, 120, "column C7: expected 0 to 119, got 120"),
        ("records", 14, -5, "column C1: expected 0 to 119, got -5"),
        ("records", 39, 2**31 - 1, "column C26: expected 0 to 119, got 2147483647"),
        ("records", 0, 7, "column label: expected 0 to 1, got 7"),
        ("records", 0, -1, "column label: expected 0 to 1, got -1"),
        ("records", 5, -3, "column I5: expected 0 to 2147483647, got -3"),
        ("dist", 14 + 6, 120, "column C7: expected 0 to 119, got 120"),
        ("dist", 0, 0.5, "column label: expected 0 to 1, got 0.5"),
        ("dist", 13, np.nan, "column I13: expected 0 to 2147483647, got nan"),
        ("torchrec", 14 + 6, 120, "column C7: expected 0 to 119, got 120"),
        ("torchrec", 3, np.inf, "column I3: expected .* got inf"),
    ],
)
def test_the_row_is_named_and_never_becomes_a_batch(tmp_path, form, column, value, words, kind, order, device):
    source = damaged(tmp_path, form, column, value).splits["train"]
    row = ROW - 1234 if form == "torchrec" else ROW
    seen = 0
    with pytest.raises(DataError, match=f"row {row + 1}, {words}"):
        for batch in kind(source, 100, torch.device(device), **order).batches():
            seen += len(batch.label)
            assert batch.sparse.min() >= 0 and batch.sparse.max() < 120
    assert seen < ROWS or device == "cuda"


@pytest.mark.parametrize("kind", LOADERS)
def test_hashed_ids_may_be_any_but_labels_and_numbers_may_not(tmp_path, kind):
    good = damaged(tmp_path / "ids", "records", 20, -77)
    good.bound(None)
    assert sum(len(batch.label) for batch in kind(good.splits["train"], 100, CPU).batches()) == ROWS
    bad = damaged(tmp_path / "label", "records", 0, 3)
    bad.bound(None)
    with pytest.raises(DataError, match=f"row {ROW + 1}, column label"):
        list(kind(bad.splits["train"], 100, CPU).batches())


def test_a_manifest_bounds_its_data_set_at_once(day_files, tmp_path):
    encode_days(day_files, tmp_path, Settings())
    path = tmp_path / "terabyte_processed_train.bin"
    records = np.fromfile(path, np.int32).reshape(-1, 40)
    sizes = open_dataset(tmp_path).manifest.table_sizes
    records[333, 14] = sizes[0]
    records.tofile(path)
    with pytest.raises(DataError, match=f"row 334, column C1: expected 0 to {sizes[0] - 1}, got {sizes[0]}"):
        list(CpuLoader(open_dataset(tmp_path).splits["train"], 64, CPU).batches())


def block_with(column, value):
    records = make_records(500)
    records[123, column] = value
    return torch.from_numpy(records)


@pytest.mark.parametrize(
    ("column", "value"), [(14, 120), (39, 2**31 - 1), (20, -1), (0, 2), (0, -1), (1, -1), (13, -(2**31))]
)
def test_on_a_device_a_flag_gathers_what_was_seen(column, value):
    bounds = DeviceBounds(np.full(26, 119, np.uint32), CPU)
    plain = torch.from_numpy(make_records(500))
    for a, b in zip(
        unpack_block(plain, None, False, False, bounds), unpack_block(plain, None, False, False), strict=True
    ):
        assert torch.equal(a, b)
    assert not bounds.wrong
    sparse = unpack_block(block_with(column, value), None, False, False, bounds).sparse
    assert bounds.wrong and int(sparse.min()) >= 0 and int(sparse.max()) <= 119
    unpack_block(plain, None, False, False, bounds)
    assert bounds.wrong  # and stays
    picks = torch.tensor([1, 2, 3])
    bounds = DeviceBounds(np.full(26, 119, np.uint32), CPU)
    unpack_block(block_with(column, value), picks, False, False, bounds)
    assert not bounds.wrong


def test_on_a_device_any_id_will_do_where_there_is_no_limit():
    bounds = DeviceBounds(ANY_ID, CPU)
    block = block_with(20, -5)
    assert torch.equal(unpack_block(block, None, False, False, bounds).sparse, block[:, 14:]) and not bounds.wrong


@pytest.mark.parametrize("logged", [False, True])
@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_on_a_device_numbers_that_are_floats(logged, value):
    records = make_records(500)
    numbers = records.view(np.float32)
    numbers[:, :14] = records[:, :14] % 20
    numbers[:, 0] %= 2
    bounds = DeviceBounds(np.full(26, 119, np.uint32), CPU)
    unpack_block(torch.from_numpy(records), None, True, logged, bounds)
    assert not bounds.wrong
    numbers[77, 5] = value
    unpack_block(torch.from_numpy(records), None, True, logged, bounds)
    assert bool(bounds.wrong) == (not logged or value != -1.0)


def float_records(rows, seed=0):
    """As DeepLearningExamples writes train_data.bin: label and ids int32, numbers the bits of float32 logarithms."""
    records = make_records(rows, seed)
    records[:, 1:14] = np.log(records[:, 1:14].astype(np.float32) + 1).view(np.int32)
    return records


@pytest.mark.parametrize("label", [False, True])
def test_records_of_floats_are_told_by_their_first_rows(tmp_path, label):
    records = float_records(1000)
    if label:  # a label as a float, and integers
        records = make_records(1000)
        records[:, 0] = records[:, 0].astype(np.float32).view(np.int32)
    records.tofile(tmp_path / "train_data.bin")
    make_records(11).tofile(tmp_path / "test_data.bin")
    with pytest.raises(DataError, match=r"train_data.bin: row .*expected whole numbers, got .*the bits of the float"):
        open_dataset(tmp_path, "auto")


def test_large_integers_are_no_floats(tmp_path):
    records = make_records(1000)
    records[::7, 1:14] = 0x3F000000 + np.arange(13)
    for name in ("train", "test"):
        records.tofile(tmp_path / f"{name}_data.bin")
    assert open_dataset(tmp_path, "auto").splits["train"].rows == 1000
