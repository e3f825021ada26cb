"""What a checkpoint holds is checked to the last tensor before anything of it is loaded."""

import json
from dataclasses import replace

import pytest
from safetensors.torch import load_file, save_file

from common import atomic
from model.checkpoint import files as checkpoint
from model.checkpoint.files import CheckpointError
from model.checkpoint.state import STATE, read_state
from tests.model.helpers import random_batches
from tests.model.test_engine import make_trainer, same, weights

OPTIMIZERS = ("sgd", "rowwise_adagrad", "adagrad", "adam")


def saved(folder, optimizer="adam", steps=2):
    trainer = make_trainer(optimizer=optimizer)
    for batch in random_batches(steps, 16):
        trainer.step(batch)
    checkpoint.save(folder, trainer, {"run": "me"})
    return trainer


def seal(folder):
    """Make the state tell of the files as they are now: what is left to find is what the files hold."""
    state = read_state(folder)
    files = {name: checkpoint._describe(folder / name) for name in state.files if (folder / name).exists()}
    (folder / STATE).write_text(replace(state, files=files).to_text())


def edit(folder, file, change):
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file)
    seal(folder)


def rename(old, new):
    return lambda tensors: tensors.__setitem__(new, tensors.pop(old))


def cut_rows(name, rows):
    return lambda tensors: tensors.__setitem__(name, tensors[name][:rows].clone())


MLPS, TABLES, OPTIMIZER = "mlps.safetensors", "tables.safetensors", "optimizer.safetensors"
WHOLE, HALF, AGAIN = "table_02", "table_02[0:100,0:8]", "table_02[50:150,0:8]"


def overlap(tensors):
    """As many numbers as the table has, of which 50 rows are there twice, and 50 are not."""
    whole = tensors.pop(WHOLE)
    tensors |= {HALF: whole[:100].clone(), AGAIN: whole[50:150].clone()}


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        (MLPS, lambda tensors: tensors.pop("top.0.weight"), "top.0.weight: expected .*, found none"),
        (MLPS, rename("top.0.bias", "top.9.bias"), "top.0.bias: expected .*, found none; top.9.bias: expected no such"),
        (MLPS, cut_rows("bottom.0.weight", 3), r"bottom.0.weight: expected .*\(16, 13\)\), found .*\(3, 13\)"),
        (MLPS, lambda tensors: tensors.update({"top.0.bias": tensors["top.0.bias"].half()}), "found .*float16"),
        (TABLES, lambda tensors: tensors.pop("table_01"), "table_01: its pieces are not all there"),
        (TABLES, rename("table_01", "table_11"), "expected no table_11"),
        (TABLES, lambda t: t.update(stray=t["table_01"].clone()), "expected no stray"),
        (TABLES, cut_rows("table_02", 199), r"table_02: expected \[200, 8\]"),
        (TABLES, cut_rows("table_02", 1), r"table_02: expected \[200, 8\]"),  # once copied into every row
        (TABLES, rename("table_02", "table_02[0:200,0:4]"), r"table_02: expected \[200, 4\]"),
        (TABLES, rename("table_02", "table_02[0:201,0:8]"), r"table_02: expected \[201, 8\]"),
        (TABLES, overlap, "table_02: its pieces are not all there, or are there twice"),
        (TABLES, lambda t: t.update(table_00=t["table_00"].int()), "table_00: expected .* I32"),
        (OPTIMIZER, lambda tensors: tensors.pop("table_02.exp_avg"), "table_02.exp_avg: its pieces are not all there"),
        (OPTIMIZER, rename("table_02.exp_avg", "table_02.exp_avf"), "expected no table_02.exp_avf"),
        (OPTIMIZER, lambda tensors: tensors.pop("mlps.3.exp_avg_sq"), "mlps.3.exp_avg_sq: expected .*, found none"),
        (OPTIMIZER, lambda tensors: tensors.pop("mlps.0.step"), "mlps.0.step: expected .*, found none"),
        (OPTIMIZER, rename("mlps.0.exp_avg", "mlps.77.exp_avg"), "mlps.77.exp_avg: expected no such tensor"),
        (OPTIMIZER, rename("mlps.0.exp_avg", "strange"), "strange: expected no such tensor"),
        (OPTIMIZER, cut_rows("mlps.0.exp_avg", 3), "mlps.0.exp_avg: expected"),
    ],
)
def test_tensors_missing_renamed_or_of_another_shape(tmp_path, file, change, words):
    saved(tmp_path / "ckpt")
    edit(tmp_path / "ckpt", file, change)
    again = make_trainer(seed=5, optimizer="adam")
    before = weights(again)
    with pytest.raises(CheckpointError, match=words):
        checkpoint.restore(tmp_path / "ckpt", again)
    assert same(before, weights(again)) and again.steps == 0


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("steps", [0, 2])
def test_what_is_whole_loads(tmp_path, optimizer, steps):
    trainer = saved(tmp_path / "ckpt", optimizer, steps)
    again = make_trainer(seed=5, optimizer=optimizer)
    assert checkpoint.restore(tmp_path / "ckpt", again).run == {"run": "me"}
    assert same(weights(again), weights(trainer)) and again.steps == steps


def changed(**values):
    def change(folder):
        text = json.loads((folder / STATE).read_text()) | values
        (folder / STATE).write_text(json.dumps(text))

    return change


def without(file):
    def change(folder):
        state = read_state(folder)
        files = {name: entry for name, entry in state.files.items() if name != file}
        (folder / STATE).write_text(replace(state, files=files).to_text())

    return change


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (changed(steps=57), "its sha256 is not that of what it says"),
        (changed(steps=-5), "its sha256 is not that of what it says"),
        (changed(steps=1e30), "its sha256 is not that of what it says"),
        (changed(extra=1), "its sha256 is not that of what it says"),
        (changed(sha256=None), "its sha256 is not that of what it says"),
        (changed(version=2), "expected version 3, got 2"),
        (lambda folder: (folder / STATE).write_text("[]"), "expected version 3"),
        (without(MLPS), "lists no mlps.safetensors"),
        (without(TABLES), "table_00: its pieces are not all there"),
        (without(OPTIMIZER), "optimizer|table_00.exp_avg"),
        (lambda folder: (folder / STATE).write_bytes(b"\xff\xfe{}"), "damaged, or not JSON"),
    ],
)
def test_a_state_that_was_changed(tmp_path, damage, words):
    saved(tmp_path / "ckpt")
    damage(tmp_path / "ckpt")
    with pytest.raises(CheckpointError, match=words):
        checkpoint.restore(tmp_path / "ckpt", make_trainer(optimizer="adam"))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"steps": -5}, "steps: expected 0 to"),
        ({"steps": 2**60}, "steps: expected 0 to"),
        ({"files": {"../x": {"bytes": 1, "crc32": ""}}}, "files: expected names of files beside"),
    ],
)
def test_values_that_cannot_be_are_refused_with_a_checksum_too(tmp_path, values, words):
    saved(tmp_path / "ckpt")
    state = read_state(tmp_path / "ckpt")
    text = json.loads(state.to_text())
    del text["sha256"]
    from model.checkpoint.state import _digest

    text |= values
    (tmp_path / "ckpt" / STATE).write_text(json.dumps({**text, "sha256": _digest(text)}))
    with pytest.raises(CheckpointError, match=words):
        read_state(tmp_path / "ckpt")


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_name_always_has_a_whole_folder(tmp_path, monkeypatch, can_exchange):
    new, folder = tmp_path / "x.part", tmp_path / "x"
    if not can_exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    for text in ("a", "b"):
        new.mkdir()
        (new / "file").write_text(text)
        atomic.replace_folder(new, folder)
        assert [path.name for path in tmp_path.iterdir()] == ["x"] and (folder / "file").read_text() == text
    folder.rename(tmp_path / "x.old")  # where a kill may find it, without an exchange
    assert atomic.recover(tmp_path) == [folder] and (folder / "file").read_text() == "b"


def test_this_file_system_exchanges_names(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not atomic._exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("it cannot")
    assert (tmp_path / "a" / "b").exists() and (tmp_path / "b" / "a").exists()


def test_a_kill_between_the_names_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    """Whichever system call of a replacement is the last one, `best` is whole: old or new."""
    ended = set()
    for last in range(12):
        folder = tmp_path / str(last) / "best"
        saved(folder, steps=1)
        calls = []

        def dies(real, calls=calls, last=last):
            def call(*words, **more):
                calls.append(real)
                if len(calls) > last:
                    raise KeyboardInterrupt
                return real(*words, **more)

            return call

        with monkeypatch.context() as patched:
            for name in ("to_disk", "_exchange"):
                patched.setattr(atomic, name, dies(getattr(atomic, name)))
            patched.setattr(checkpoint.shutil, "rmtree", dies(checkpoint.shutil.rmtree))
            try:
                saved(folder, steps=2)
                done = True
            except KeyboardInterrupt:
                done = False
        trainer = make_trainer(optimizer="adam")
        checkpoint.restore(folder, trainer)
        assert trainer.steps == 2 or not done
        ended.add((done, trainer.steps))
    assert ended >= {(False, 1), (False, 2), (True, 2)}
