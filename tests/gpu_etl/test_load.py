"""Data sets opened, and the batches that both loaders make of them."""

import math

import numpy as np
import pytest
import torch

from gpu_etl.common.errors import DataError
from gpu_etl.load import dali as dali_module
from gpu_etl.load.batch import batch_ranges
from gpu_etl.load.dali import DaliLoader
from gpu_etl.load.dataset import open_dataset
from gpu_etl.load.plain import CpuLoader
from gpu_etl.pipeline import Settings, encode_days
from tests.conftest import loader_params, needs

CPU = torch.device("cpu")
LOADERS = [CpuLoader, DaliLoader]


@pytest.fixture(scope="module")
def folder(day_files, tmp_path_factory):
    out = tmp_path_factory.mktemp("set")
    encode_days(day_files, out, Settings())
    return out


def raw(folder, split="train"):
    return np.fromfile(folder / f"terabyte_processed_{split}.bin", np.int32).reshape(-1, 40)


@pytest.mark.parametrize("loader", loader_params(LOADERS))
@pytest.mark.parametrize("batch_size", [1000, 801, 100, 7])
def test_batches_are_the_records(folder, loader, batch_size):
    batches = list(loader(open_dataset(folder).splits["train"], batch_size, CPU).batches())
    records = raw(folder)
    assert [len(batch.label) for batch in batches] == [
        min(batch_size, len(records) - begin) for begin in range(0, len(records), batch_size)
    ]
    for batch in batches:
        assert [(t.dtype, t.is_contiguous()) for t in batch] == [
            (torch.float32, True), (torch.int32, True), (torch.float32, True)
        ]  # fmt: skip
    assert torch.cat([batch.label for batch in batches]).tolist() == records[:, 0].tolist()
    assert torch.cat([batch.sparse for batch in batches]).tolist() == records[:, 14:].tolist()
    expected = [[math.log(np.float32(x) + np.float32(1)) for x in row] for row in records[:, 1:14].astype(np.float32)]
    np.testing.assert_allclose(torch.cat([batch.dense for batch in batches]).numpy(), expected, rtol=3e-7)


@needs("nvidia.dali")
@pytest.mark.parametrize("batch_size", [801, 128, 33])
@pytest.mark.parametrize("start", [0, 3])
def test_both_loaders_give_the_same_bits(folder, batch_size, start):
    source = open_dataset(folder).splits["train"]
    for epoch in (0, 1):
        pairs = zip(
            *(list(loader(source, batch_size, CPU, True, 5).batches(epoch, start)) for loader in LOADERS), strict=True
        )
        for one, other in pairs:
            assert all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in zip(one, other, strict=True))


@needs("nvidia.dali")
def test_dali_builds_its_pipeline_once(folder, monkeypatch):
    built, real = [], dali_module._pass_on
    monkeypatch.setattr(dali_module, "_pass_on", lambda *words, **more: built.append(1) or real(*words, **more))
    data = open_dataset(folder).splits["train"]
    loader, plain = DaliLoader(data, 33, CPU, shuffle=True), CpuLoader(data, 33, CPU, shuffle=True)
    for epoch in range(3):
        for one, other in zip(loader.batches(epoch), plain.batches(epoch), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert len(built) == 1
    stopped = loader.batches(3)  # an epoch that nobody wants to its end leaves blocks in the pipeline
    next(stopped)
    stopped.close()
    again = list(loader.batches(1))
    for one, other in zip(again, plain.batches(1), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("loader", loader_params(LOADERS))
def test_a_batch_outlives_the_next_ones(folder, loader):
    source = open_dataset(folder).splits["train"]
    kept = list(loader(source, 50, CPU).batches())
    assert torch.cat([batch.sparse for batch in kept]).tolist() == raw(folder)[:, 14:].tolist()


def test_epochs_seeds_and_positions():
    order = {(seed, epoch): batch_ranges(1050, 10, True, seed, epoch) for seed in (0, 1) for epoch in (0, 1)}
    plain = batch_ranges(1050, 10, False, 0, 0)
    assert plain == [(begin, begin + 10) for begin in range(0, 1050, 10)]
    assert all(sorted(ranges) == plain for ranges in order.values())
    assert len({tuple(ranges) for ranges in [*order.values(), plain]}) == 5
    short = batch_ranges(57, 10, True, 3, 0)
    assert short[-1] == (50, 57) and sorted(short) == batch_ranges(57, 10, False, 0, 0)


@pytest.mark.parametrize("loader", loader_params(LOADERS))
def test_position_is_epoch_and_number(folder, loader):
    reader = loader(open_dataset(folder).splits["train"], 64, CPU, True, 2)
    whole, rest = list(reader.batches(1)), list(reader.batches(1, start=5))
    assert len(whole) == len(reader) == len(rest) + 5
    assert all(torch.equal(a.sparse, b.sparse) for a, b in zip(whole[5:], rest, strict=True))


def write_dist(folder, records):
    folder.mkdir(parents=True)
    records[:, 0].astype(np.float32).tofile(folder / "label.bin")
    records[:, 1:14].astype(np.float32).tofile(folder / "numerical.bin")
    for c in range(26):
        records[:, 14 + c].copy().tofile(folder / f"cat_{c}.bin")


def small_records(folder):
    records = raw(folder)[:200].copy()
    records[:, 1:14] = np.minimum(records[:, 1:14], 1 << 20)  # what float32 holds exactly
    return records


@needs("nvidia.dali")
def test_split_form_reads_as_the_records_do(folder, tmp_path):
    records = small_records(folder)
    for split in ("train", "test"):
        write_dist(tmp_path / "dist" / split, records)
        (tmp_path / "bin").mkdir(exist_ok=True)
        records.tofile(tmp_path / "bin" / f"{split}_data.bin")
    dist, plain = open_dataset(tmp_path / "dist", "dist"), open_dataset(tmp_path / "bin", "bin")
    assert sorted(dist.splits) == sorted(plain.splits) == ["test", "train"]
    for loader in LOADERS:
        for a, b in zip(*(loader(d.splits["train"], 64, CPU).batches() for d in (dist, plain)), strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_foreign_ids_are_checked(folder, tmp_path):
    records = small_records(folder)
    records.tofile(tmp_path / "train_data.bin")
    records[17, 14 + 4] = 99
    records.tofile(tmp_path / "test_data.bin")
    data = open_dataset(tmp_path)
    data.check_ids((100,) * 26)
    with pytest.raises(DataError, match=r"test_data\.bin: row 18, column C5: expected 0 to 98, got 99"):
        data.check_ids((99,) * 26)
    records[3, 0] = 2
    records.tofile(tmp_path / "test_data.bin")
    with pytest.raises(DataError, match=r"row 4, column label: expected 0 to 1, got 2"):
        open_dataset(tmp_path).check_ids((100,) * 26)


def test_what_is_no_data_set(folder, tmp_path):
    def refuse(words, form="memmap"):
        with pytest.raises(DataError, match=words):
            open_dataset(tmp_path, form)

    refuse("no data set")
    records = small_records(folder)
    path = tmp_path / "terabyte_processed_train.bin"
    records.tofile(path)
    refuse("no test split")
    records.tofile(tmp_path / "terabyte_processed_test.bin")
    refuse("change --dataset_type", "dist")
    path.write_bytes(path.read_bytes()[:-1])
    refuse("no whole number of 160-byte records")
    path.write_bytes(b"")
    refuse("is empty")


def test_a_file_cut_off_after_encoding_is_noticed(day_files, tmp_path):
    encode_days(day_files, tmp_path, Settings())
    path = tmp_path / "terabyte_processed_val.bin"
    path.write_bytes(path.read_bytes()[:-160])
    with pytest.raises(DataError, match="expected 125 rows by the manifest, found 124"):
        open_dataset(tmp_path)


def test_split_form_of_unequal_lengths(folder, tmp_path):
    for split in ("train", "test"):
        write_dist(tmp_path / split, small_records(folder))
    (tmp_path / "train" / "cat_7.bin").write_bytes(b"\0" * 40)
    with pytest.raises(DataError, match=r"cat_7\.bin: expected 200 rows"):
        open_dataset(tmp_path, "dist")
    (tmp_path / "train" / "cat_7.bin").unlink()
    with pytest.raises(DataError, match=r"cat_7\.bin: no such file"):
        open_dataset(tmp_path, "dist")
