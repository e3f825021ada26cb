"""The three forms of a data set: written in blocks, cut and gone on with, read back by both loaders."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from gpu_etl import formats
from gpu_etl.errors import DataError, WorkDamagedError
from gpu_etl.load.cpu import CpuLoader
from gpu_etl.load.dali import DaliLoader
from gpu_etl.load.dataset import open_dataset
from gpu_etl.manifest import VOCABULARY, Manifest, describe_file
from gpu_etl.schema import PRESETS
from gpu_etl.settings import Settings
from tests.conftest import loader_params, needs

CPU = torch.device("cpu")
LOADERS = [CpuLoader, DaliLoader]
FORMS = list(formats.FORMS)
# int8, int16 and int32 in "dle", at both sides of each boundary.
SIZES = [128, 129, 32768, 32769, 1, 2, 2**31 - 1, *range(100, 119)]
ROWS = {"train": 157, "test": 40, "val": 1}


def random_records(rows, seed=0, limit=1 << 24):
    """Records with every table's first and last id, integers below `limit`, and zeros among them."""
    rng = np.random.default_rng(seed)
    records = np.empty((rows, 40), np.int32)
    records[:, 0] = rng.integers(0, 2, rows)
    records[:, 1:14] = rng.integers(0, limit, (rows, 13)) >> rng.integers(0, 32, (rows, 13))
    records[:, 14:] = rng.integers(0, SIZES, (rows, 26))
    records[0, 14:], records[-1, 14:] = 0, np.array(SIZES) - 1
    return records


def write(form, folder, split, records, done=0, block=31):
    with formats.SplitWriter(form, folder, split, SIZES, done) as writer:
        for begin in range(done, len(records), block):
            writer.write(records[begin : begin + block])


def write_set(form, folder, splits=("train", "test", "val"), limit=1 << 24):
    """Write a data set; returns the records of each split."""
    records = {split: random_records(ROWS[split], seed, limit) for seed, split in enumerate(splits)}
    for split in splits:
        write(form, folder, split, records[split])
    return records


def describe(form, folder, rows):
    """A manifest of the data set, whose large tables have as many rows as one may say."""
    first_id = 2**16 - 1
    settings = Settings(replace(PRESETS["count"], first_id=first_id), form=form)
    names = [*formats.expected_files(form), VOCABULARY]
    formats.write_extra_files(form, folder, SIZES)
    (folder / VOCABULARY).write_bytes(b"")
    kept = sum(rows.values())
    source = {"file": "day_0", "bytes": 1, "crc32": "0" * 8, "rows": kept, "dropped": {}, "kept": kept, "clicks": 0,
              "missing": [0] * 39}  # fmt: skip
    sizes = [min(size, first_id) for size in SIZES]
    files = {name: describe_file(folder / name) for name in names if (folder / name).exists()}
    Manifest(rows, sizes, settings.shaping(), [source], files).write(folder)


def same_bits(a, b):
    return all(torch.equal(x.view(torch.int32), y.view(torch.int32)) for x, y in zip(a, b, strict=True))


def batches(folder, split, loader, **more):
    return list(loader(open_dataset(folder, "auto").splits[split], 64, CPU, **more).batches())


@pytest.mark.parametrize("loader", loader_params(LOADERS))
@pytest.mark.parametrize("form", ["records", "dist"])
def test_unlogged_forms_give_the_batches_of_the_records(tmp_path, form, loader):
    """Integers to 2^31 - 1. Above 2^24 "dist" no longer holds them exactly, as float32; but batches are float32 too,
    so nothing more is lost than a loader of records loses."""
    for split, records in write_set(form, tmp_path, limit=1 << 31).items():
        found = batches(tmp_path, split, loader)
        assert [len(batch.label) for batch in found] == [64] * (len(records) // 64) + [len(records) % 64]
        assert torch.cat([batch.label for batch in found]).tolist() == records[:, 0].tolist()
        assert torch.cat([batch.sparse for batch in found]).tolist() == records[:, 14:].tolist()
        # The log's last bit may depend on how many values are taken at once; the batches must be the loader's own.
        for batch, begin in zip(found, range(0, len(records), 64), strict=True):
            dense = torch.from_numpy(records[begin : begin + 64, 1:14].astype(np.float32))
            assert torch.equal(batch.dense, (dense + 1).log())


@pytest.mark.parametrize("split", ["train", "test", "val"])
def test_dle_is_logged_and_within_half_precision(tmp_path, split):
    records = write_set("dle", tmp_path)[split]
    dense, sparse, label = (torch.cat(parts) for parts in zip(*batches(tmp_path, split, CpuLoader), strict=True))
    assert label.tolist() == records[:, 0].tolist() and sparse.tolist() == records[:, 14:].tolist()
    expected = np.array([[math.log(x + 1) for x in row] for row in records[:, 1:14].tolist()])
    np.testing.assert_allclose(dense.numpy(), expected, rtol=2**-11)


@needs("nvidia.dali")
@pytest.mark.parametrize("form", FORMS)
def test_both_loaders_give_the_same_bits(tmp_path, form):
    write_set(form, tmp_path, limit=1 << 31)
    pairs = [batches(tmp_path, "train", loader, shuffle=True, seed=3) for loader in LOADERS]
    assert all(same_bits(plain, dali) for plain, dali in zip(*pairs, strict=True))
    for kept in zip(*pairs, strict=True):
        for batch in kept:
            assert [t.dtype for t in batch] == [torch.float32, torch.int32, torch.float32]
            assert all(tensor.is_contiguous() for tensor in batch)


@pytest.mark.parametrize("form", FORMS)
def test_bytes_do_not_depend_on_the_blocks(tmp_path, form):
    records = random_records(100)
    for block in (100, 7, 1):
        write(form, tmp_path / str(block), "train", records, block=block)
    for name in formats.files(form, "train"):
        assert len({(tmp_path / block / name).read_bytes() for block in ("100", "7", "1")}) == 1


@pytest.mark.parametrize("form", FORMS)
def test_goes_on_behind_what_is_whole(tmp_path, form):
    records = random_records(90)
    write(form, tmp_path / "whole", "val", records)
    write(form, tmp_path / "cut", "val", records[:70])
    names = formats.files(form, "val")
    sizes = {part.path: part.row_bytes for part in formats.parts(form, "val", SIZES)}
    for i, name in enumerate(names):  # every file keeps another number of rows, and odd bytes behind them
        path = tmp_path / "cut" / name
        path.write_bytes(path.read_bytes()[: (41 + i) * sizes[name] + (sizes[name] - 1)])
    write(form, tmp_path / "cut", "val", records, 41)
    for name in names:
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("form", FORMS)
def test_a_writer_does_not_go_on_behind_a_file_that_is_missing(tmp_path, form):
    write(form, tmp_path, "train", random_records(5))
    last = tmp_path / formats.files(form, "train")[-1]
    last.unlink()
    with pytest.raises(WorkDamagedError, match=rf"{last.name}: expected [0-9]+ bytes to go on behind, found 0: less "):
        formats.SplitWriter(form, tmp_path, "train", SIZES, 5)
    write(form, tmp_path, "train", random_records(3))
    assert rows_in(form, tmp_path, "train") == {3}


def rows_in(form, folder, split):
    """Rows that the files of a split hold."""
    return {(folder / part.path).stat().st_size / part.row_bytes for part in formats.parts(form, split, SIZES)}


@pytest.mark.parametrize("form", FORMS)
def test_a_kill_loses_nothing_that_write_took(tmp_path, form):
    writer = formats.SplitWriter(form, tmp_path, "train", SIZES)
    writer.write(random_records(3))
    assert rows_in(form, tmp_path, "train") == {3}
    writer.close()


@pytest.mark.parametrize(
    ("cardinality", "dtype"),
    [(0, "int8"), (1, "int8"), (128, "int8"), (129, "int16"), (32768, "int16"), (32769, "int32"), (2**31, "int32")],
)
def test_dtype_by_cardinality(cardinality, dtype):
    assert formats.id_dtype(cardinality).name == dtype


def test_files_of_each_form(tmp_path):
    columns = ["label.bin", "numerical.bin", *(f"cat_{c}.bin" for c in range(26))]
    assert formats.files("records", "val") == ["terabyte_processed_val.bin"]
    assert formats.files("dist", "val") == [f"val/{name}" for name in columns]
    assert formats.files("dle", "val") == [f"validation/{name}" for name in columns]
    assert formats.files("dle", "test") == [f"test/{name}" for name in columns]
    assert [formats.write_extra_files(form, tmp_path, SIZES) for form in ("records", "dist")] == [[], []]


def test_dle_bytes_are_as_numpy_would_read_them(tmp_path):
    records = write_set("dle", tmp_path)["train"]
    train = tmp_path / "train"
    assert np.fromfile(train / "label.bin", np.bool_).tolist() == records[:, 0].astype(bool).tolist()
    assert np.fromfile(train / "numerical.bin", np.float16).reshape(-1, 13).shape == (157, 13)
    for c, dtype in enumerate([np.int8, np.int16, np.int16, np.int32]):
        assert np.fromfile(train / f"cat_{c}.bin", dtype).tolist() == records[:, 14 + c].tolist()


def test_feature_spec_holds_what_nvidias_reader_demands(tmp_path):
    """The rules that DeepLearningExamples checks before it reads: names, channels, dtypes, one file per chunk."""
    write_set("dle", tmp_path)
    (name,) = formats.write_extra_files("dle", tmp_path, np.array(SIZES))
    text = (tmp_path / name).read_text()
    assert name == "feature_spec.yaml"
    spec = json.loads(text)
    assert sorted(spec) == ["channel_spec", "feature_spec", "metadata", "source_spec"]
    channels, features = spec["channel_spec"], spec["feature_spec"]
    assert sorted(channels) == ["categorical", "label", "numerical"]
    assert [len(channels[name]) for name in ("label", "numerical", "categorical")] == [1, 13, 26]
    assert sorted(features) == sorted(name for names in channels.values() for name in names)
    assert [features[name]["cardinality"] for name in channels["categorical"]] == SIZES
    assert {features[name]["dtype"] for name in channels["numerical"]} == {"float16"}
    assert features[channels["label"][0]]["dtype"] == "bool"
    assert sorted(spec["source_spec"]) == ["test", "train"]
    for split, chunks in spec["source_spec"].items():
        assert all(chunk["type"] == "split_binary" and len(chunk["files"]) == 1 for chunk in chunks)
        assert sorted(f for chunk in chunks for f in chunk["features"]) == sorted(features)
        assert [chunk["features"] for chunk in chunks if len(chunk["features"]) > 1] == [channels["numerical"]]
        for chunk in chunks:
            row = sum(np.dtype(features[feature]["dtype"]).itemsize for feature in chunk["features"])
            assert (tmp_path / chunk["files"][0]).stat().st_size == row * ROWS[split]


def test_writers_refuse_what_does_not_fit(tmp_path):
    writer = formats.SplitWriter("dle", tmp_path, "train", SIZES)
    records = random_records(4)
    for wrong in (records[:, :39], records.astype(np.int64), records[0]):
        with pytest.raises(DataError, match=r"expected records int32 \[n, 40\], got"):
            writer.write(wrong)
    records[2, 15] = 32768
    with pytest.raises(DataError, match=r"cat_1\.bin: expected ids that fit int16, .* to 32768; the table sizes"):
        writer.write(records)
    with pytest.raises(DataError, match="expected 26 table sizes, one per category column, got 25"):
        formats.SplitWriter("dle", tmp_path, "train", SIZES[1:])


@pytest.mark.parametrize("form", FORMS)
def test_missing_and_empty_validation_splits(tmp_path, form):
    records = write_set(form, tmp_path, ("train", "test"))
    assert sorted(open_dataset(tmp_path, "auto").splits) == ["test", "train"]
    write(form, tmp_path, "val", random_records(1)[:0])
    rows = {"train": len(records["train"]), "test": len(records["test"]), "val": 0}
    describe(form, tmp_path, rows)
    assert sorted(open_dataset(tmp_path, "auto").splits) == ["test", "train"]


@pytest.mark.parametrize(("form", "asked"), [("records", "memmap"), ("dist", "dist"), ("dle", "dle")])
def test_the_form_is_found_and_held_against_what_was_asked(tmp_path, form, asked):
    write_set(form, tmp_path)
    assert open_dataset(tmp_path, asked).splits["train"].rows == open_dataset(tmp_path, "auto").splits["train"].rows
    for other in {"bin", "dist", "dle"} - {asked, "bin" if asked == "memmap" else ""}:
        with pytest.raises(DataError, match=f"expected the form '{other}', found .*{form}.*; change --dataset_type"):
            open_dataset(tmp_path, other)


@pytest.mark.parametrize("form", FORMS)
def test_ids_are_checked(tmp_path, form):
    records = write_set(form, tmp_path)
    seen = []
    open_dataset(tmp_path, "auto").check_ids(SIZES, seen.append)
    assert seen == [157, 40, 1]
    records["test"][17, 14 + 4] = 1
    write(form, tmp_path, "test", records["test"])
    with pytest.raises(DataError, match=r"test.*bin: row 18, column C5: expected 0 to 0, got 1; the table sizes"):
        open_dataset(tmp_path, "auto").check_ids(SIZES)
    records["train"][2, 14] = -1
    write(form, tmp_path, "train", records["train"])
    with pytest.raises(DataError, match=r"train.*bin: row 3, column C1: expected 0 to 127, got -1; the table sizes"):
        open_dataset(tmp_path, "auto").check_ids(SIZES)


@pytest.mark.parametrize(
    ("form", "name", "dtype", "value", "words"),
    [
        ("dist", "label.bin", np.float32, 0.5, r"label\.bin: row 2, column label: expected 0 to 1, got 0.5"),
        ("dist", "numerical.bin", np.float32, np.nan, r"numerical\.bin: row 1, column I2: expected 0 .*, got nan"),
        ("dist", "numerical.bin", np.float32, -1, r"numerical\.bin: row 1, column I2: expected 0 .*, got -1.0"),
        ("dle", "label.bin", np.uint8, 2, r"label\.bin: row 2, column label: expected 0 to 1, got 2"),
        ("dle", "numerical.bin", np.float16, -np.inf, r"numerical\.bin: row 1, column I2: expected -65504 .*-inf"),
    ],
)
def test_labels_and_numbers_are_checked(tmp_path, form, name, dtype, value, words):
    write_set(form, tmp_path)
    values = np.fromfile(tmp_path / "train" / name, dtype)
    values[1] = value
    values.tofile(tmp_path / "train" / name)
    with pytest.raises(DataError, match=words):
        open_dataset(tmp_path, form).check_ids(SIZES)


@pytest.mark.parametrize("form", ["dist", "dle"])
def test_split_files_of_wrong_sizes(tmp_path, form):
    write_set(form, tmp_path)

    def refuse(name, content, words):
        path = tmp_path / "train" / name
        kept = path.read_bytes()
        path.unlink() if content is None else path.write_bytes(content(kept))
        with pytest.raises(DataError, match=words):
            open_dataset(tmp_path, "auto")
        path.write_bytes(kept)

    refuse("cat_7.bin", lambda kept: kept[:-1], r"cat_7\.bin: expected 157 rows of 1, .* bytes; the file is cut off")
    refuse("numerical.bin", lambda kept: kept[:-2], r"numerical\.bin: expected 13 times \(dist\) or 26 times \(dle\)")
    refuse("label.bin", lambda kept: kept[:-2], r"numerical\.bin: expected 13 times \(dist\) or 26 times \(dle\)")
    for name in ("cat_7.bin", "numerical.bin", "label.bin"):
        refuse(name, None, rf"{name[:-4]}\.bin: no such file")
    refuse("cat_7.bin", lambda kept: b"", r"cat_7\.bin: no such file, or an empty one")
    label = tmp_path / "test" / "label.bin"
    label.write_bytes(label.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"test/(label|numerical)\.bin: expected 39 rows"):
        open_dataset(tmp_path, "auto")


def test_half_a_file_of_ids_is_noticed_by_the_manifest(tmp_path):
    """Without table sizes, half of an int32 file is as good as an int16 one."""
    write_set("dle", tmp_path)
    path = tmp_path / "train" / "cat_3.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[: 157 * 2])
    assert open_dataset(tmp_path, "dle").splits["train"].rows == 157
    path.write_bytes(whole)
    describe("dle", tmp_path, ROWS)
    path.write_bytes(whole[: 157 * 2])
    with pytest.raises(DataError, match=r"cat_3\.bin: expected 157 rows of 1, .*628 bytes \(int32\), got 314 bytes"):
        open_dataset(tmp_path, "dle")
