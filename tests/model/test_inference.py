"""Exported models and ids that have no row."""

import numpy as np
import pytest
import torch

from model.config import ConfigError
from model.dlrm import DLRM
from model.inference import export
from tests.conftest import needs
from tests.model.helpers import random_batches, small_config

BEYOND = [(0, 3), (2, -1), (3, 1), (1, 2**31 - 1)]


def exported(tmp_path, name):
    torch.manual_seed(0)
    model, (batch,) = DLRM(small_config()), random_batches(1, 8)
    export(model, tmp_path / name)
    with torch.no_grad():
        return batch, torch.sigmoid(model(batch.dense, batch.sparse))


def test_by_torch_export_they_are_an_error(tmp_path):
    batch, expected = exported(tmp_path, "m.pt2")
    program = torch.export.load(tmp_path / "m.pt2").module()
    torch.testing.assert_close(program(batch.dense, batch.sparse), expected)
    for column, value in BEYOND:
        sparse = batch.sparse.clone()
        sparse[5, column] = value
        with pytest.raises(RuntimeError, match="an id is not from 0 to below its table's size"):
            program(batch.dense, sparse)


@needs("onnxscript")
def test_onnx_knows_no_errors_and_gives_such_rows_no_score(tmp_path):
    batch, expected = exported(tmp_path, "m.onnx")
    onnx = pytest.importorskip("onnx")
    onnx.checker.check_model(str(tmp_path / "m.onnx"))
    session = pytest.importorskip("onnx.reference").ReferenceEvaluator(str(tmp_path / "m.onnx"))
    for column, value in BEYOND:
        sparse = batch.sparse.clone()
        sparse[5, column] = value
        (found,) = session.run(None, {"dense": batch.dense.numpy(), "sparse": sparse.numpy()})
        assert np.isnan(found[5])
        np.testing.assert_allclose(np.delete(found, 5), np.delete(expected.numpy(), 5), rtol=1e-4)


def test_a_file_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    exported(tmp_path, "m.pt2")
    before = (tmp_path / "m.pt2").read_bytes()

    def fails(program, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.export, "save", fails)
    with pytest.raises(OSError, match="No space"):
        exported(tmp_path, "m.pt2")
    assert (tmp_path / "m.pt2").read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["m.pt2"]
    with pytest.raises(ConfigError, match=r"expected a name that ends in \.pt2"):
        exported(tmp_path, "m.h5")
