"""The benchmarks run, at sizes that say nothing about speed."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from bench import train, train_limits, train_peers
from gpu_etl.load.batch import Batch
from gpu_etl.pipeline import Settings, encode_days
from gpu_etl.raw.synthetic import write_days
from gpu_etl.schema import SPLITS, split_file
from model.config import ModelConfig, read_config
from model.training.trainer import Precision
from tests.conftest import ROOT

SMALL = {
    "quickstart": ["--rows", "6000"],
    "etl": ["--rows", "3000"],
    "workers": ["--rows", "4000", "--repeat", "1"],
    "slab": ["--rows", "2000", "--repeat", "1"],
    "load": [
        "--rows",
        "5000",
        "--batch_size",
        "1000",
        "5000",
        "--repeat",
        "1",
        "--seconds",
        "0.01",
        "--steps",
        "2",
        "--step_batch_size",
        "64",
        "--model_config",
        "MODEL",
        "--png",
        "PNG",
    ],
    "step_kernels": ["--model_config", "MODEL", "--batch_size", "64", "--capability", "8.0"],
    "train": ["--model_config", "MODEL", "--quick", "--plot", "PNG"],
    "scaling": ["--model_config", "MODEL", "--batch_size", "64", "--seconds", "0.1", "--world", "2", "--device", "cpu"],
}


@pytest.mark.parametrize("name", SMALL)
def test_last_line_is_json_with_the_machine(name, tmp_path):
    for package in {"step_kernels": ["triton"], "load": ["nvidia.dali"], "workers": ["distributed"]}.get(name, []):
        pytest.importorskip(package)
    model = tmp_path / "model.json"
    model.write_text(json.dumps({
        "num_numerical_features": 13, "categorical_feature_sizes": [50] * 26, "bottom_mlp_sizes": [8],
        "top_mlp_sizes": [8, 1], "embedding_dim": 8,
    }))  # fmt: skip
    plot = tmp_path / "plot.png"
    words = [word.replace("MODEL", str(model)).replace("PNG", str(plot)) for word in SMALL[name]]
    if name == "quickstart":
        words += ["--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-m", "bench", name, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["bench"] == name and result["machine"]["cores"] >= 1 and result["machine"]["commit"]
    if name == "workers":
        assert len(result["turns"]) == 1 and min(result["seconds"].values()) > 0
    if name == "train":
        assert plot.read_bytes().startswith(b"\x89PNG") and "EmbeddingBag" in done.stderr
        first, second = result["measured"]
        assert (first["precision"], second["precision"]) == ("float32", "amp") and first["embedding_rows"] == 26 * 50
        parts = first["results"]["ours"]["microseconds_per_sample"]
        assert set(parts) == {
            "feed", "MLPs", "look-up + interaction", "update of the tables", "update of the MLPs"
        }  # fmt: skip
        assert min(parts.values()) > 0 and set(first["share_of_limit"]) == {"operations", "bytes"}
    if name == "load":
        assert plot.read_bytes().startswith(b"\x89PNG")
        counts = [len(found["loaders"]) for found in (*result["page_cache"], result["disk"], result["training"])]
        assert counts == [9, 9, 6, 7] and "data wait share" in done.stderr
    if name == "scaling":
        (found,) = result["measured"]
        assert 1 <= found["bytes_over_least"] < 1.05 and found["bytes_sent"] > 10_000


def test_the_polars_peer_does_the_same_work(tmp_path):
    polars_peer = pytest.importorskip("bench.polars_peer", exc_type=ModuleNotFoundError)
    write_days(tmp_path, rows=6000, days=3, seed=2, compress=False)
    days = [tmp_path / f"day_{day}" for day in range(3)]
    encode_days(days, tmp_path / "set", Settings(shuffle=False))
    splits = [tmp_path / "set" / split_file(split) for split in SPLITS]
    ours = np.concatenate([np.fromfile(path, np.int32).reshape(-1, 40) for path in splits])
    np.testing.assert_array_equal(polars_peer.encode([str(day) for day in days]), ours)


def test_tables_are_cut_to_fit():
    config, _ = read_config("mlperf_40m.limit")
    for limit in (1e4, 1.5e9, 1e11, 1e12):
        cut = train.fit_tables(config, limit).categorical_feature_sizes
        assert sum(cut) * 512 <= max(limit, 26 * 512)
        assert cut == tuple(min(size, max(cut)) for size in config.categorical_feature_sizes)
    assert cut == config.categorical_feature_sizes
    assert sum(train.fit_tables(config, 1.5e9).categorical_feature_sizes) * 512 > 1.4999e9


def test_operations_are_those_of_the_definition():
    config, _ = read_config("official_config")
    assert train_limits.operations(config) == pytest.approx(4.6e6, rel=0.05)
    config, _ = read_config("mlperf_40m.limit")
    assert train_limits.operations(config) == pytest.approx(14.2e6, rel=0.05)


@pytest.mark.parametrize("name", ["EmbeddingBag", "FBGEMM TBE"])
def test_peers_train_the_same_model(name):
    """From the same weights, over the same batches, to the same weights."""
    if name == "FBGEMM TBE":
        pytest.importorskip("fbgemm_gpu")
    torch.manual_seed(0)
    config = ModelConfig(13, (50, 3, 1000), (16, 8), (16, 1), 8)
    mine = train_peers.ours(config, Precision(), torch.device("cpu"))
    before = [table.clone() for table in mine.model.embedding.tables()]
    peer = train_peers.peers(mine)[name]
    for ours, theirs in zip(mine.model.dense_parameters(), peer.model.dense_parameters(), strict=True):
        theirs.data.copy_(ours)
    bags = peer.model.embedding.bags
    if name == "EmbeddingBag":  # it shares our tables: here, each is to have its own
        for bag in bags:
            bag.weight.data = bag.weight.data.clone()
    theirs = [bag.weight.data for bag in bags] if name == "EmbeddingBag" else bags.split_embedding_weights()
    for part, table in zip(theirs, before, strict=True):
        part.copy_(table)
    for _ in range(5):
        ids = torch.stack([torch.randint(size, (64,)) for size in config.categorical_feature_sizes], 1).int()
        batch = Batch(torch.rand(64, 13), ids, torch.randint(2, (64,)).float())
        assert peer.step(batch).item() == pytest.approx(mine.step(batch).item(), rel=1e-5)
    for ours, part in zip(mine.model.embedding.tables(), theirs, strict=True):
        torch.testing.assert_close(part, ours, rtol=1e-4, atol=1e-5)


def test_stages_of_an_encode_and_what_limits_it():
    from bench.etl_stages import measure, predict

    found = measure(rows=2000, repeat=1)
    assert all(rate > 0 for rates in found["stages_text_gigabytes_per_second"].values() for rate in rates.values())
    rates = dict.fromkeys(found["stages_text_gigabytes_per_second"], 4.0)
    told = predict(rates | {"write buckets": 1.0, "sha256 of records": 3.0})
    assert told["limited_by"] == {"count": "write buckets", "encode": "sha256 of records"}
    assert told["passes"] == {"count": 5.0, "encode": 3.0}
