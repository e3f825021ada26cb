"""The benchmarks run, at sizes that say nothing about speed."""

import json
import subprocess
import sys

import numpy as np
import pytest

from bench import polars_peer
from gpu_etl.pipeline import Settings, encode_days
from gpu_etl.schema import SPLITS, split_file
from gpu_etl.synthetic import write_days
from tests.conftest import ROOT

SMALL = {
    "quickstart": ["--rows", "6000"],
    "etl": ["--rows", "3000"],
    "load": ["--rows", "5000", "--batch_size", "1000", "--repeat", "1"],
    "train": ["--model_config", "MODEL", "--batch_size", "64", "--seconds", "0.1"],
    "scaling": ["--model_config", "MODEL", "--batch_size", "64", "--seconds", "0.1", "--world", "2", "--device", "cpu"],
}


@pytest.mark.parametrize("name", SMALL)
def test_last_line_is_json_with_the_machine(name, tmp_path):
    model = tmp_path / "model.json"
    model.write_text(json.dumps({
        "num_numerical_features": 13, "categorical_feature_sizes": [50] * 26, "bottom_mlp_sizes": [8],
        "top_mlp_sizes": [8, 1], "embedding_dim": 8,
    }))  # fmt: skip
    words = [word.replace("MODEL", str(model)) for word in SMALL[name]]
    if name == "quickstart":
        words += ["--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-m", "bench", name, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["bench"] == name and result["machine"]["cores"] >= 1 and result["machine"]["commit"]
    if name == "scaling":
        (found,) = result["measured"]
        assert 1 <= found["bytes_over_least"] < 1.05 and found["bytes_sent"] > 10_000


def test_the_polars_peer_does_the_same_work(tmp_path):
    write_days(tmp_path, rows=6000, days=3, seed=2, compress=False)
    days = [tmp_path / f"day_{day}" for day in range(3)]
    encode_days(days, tmp_path / "set", Settings(shuffle=False))
    splits = [tmp_path / "set" / split_file(split) for split in SPLITS]
    ours = np.concatenate([np.fromfile(path, np.int32).reshape(-1, 40) for path in splits])
    np.testing.assert_array_equal(polars_peer.encode([str(day) for day in days]), ours)
