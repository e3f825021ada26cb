"""Real Criteo rows, from text to AUC."""

import gzip
from pathlib import Path

import numpy as np
import pytest

import train
from gpu_etl.pipeline import Settings, encode_days
from gpu_etl.schema import choose_preset
from tests import reference


@pytest.fixture(scope="module")
def folder(samples, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("kaggle")
    encode_days([samples / "criteo_kaggle_137k.tsv.gz"], out, Settings(preset=choose_preset("mlperf"), days=7))
    return out


def test_seven_days_of_the_kaggle_rows(samples, folder):
    text = gzip.decompress((samples / "criteo_kaggle_137k.tsv.gz").read_bytes())
    rows = reference.read_rows(text)
    words = reference.vocabularies(rows, "mlperf")
    test = np.fromfile(folder / "terabyte_processed_test.bin", np.int32).reshape(-1, 40)
    first = 136_988 - 19_569  # 5 days of 19,570 rows and 2 of 19,569
    assert len(test) == 9785
    for i in range(0, len(test), 100):
        row = rows[first + i]
        expected = [row[0]] + [max(v or 0, 0) for v in row[1:14]]
        expected += [ids[v or 0] for v, ids in zip(row[14:], words, strict=True)]
        assert test[i].tolist() == expected


def trained(folder, recipe):
    words = ["--dataset", str(folder), f"@{recipe}", "--test_freq", "100000"]
    return train.run(train.flags.build_parser("").parse_args(words))["test"]


def test_facebookresearchs_recipe_reaches_its_auc(folder):
    # facebookresearch/dlrm: 0.727 +- 0.006 as the mean of three seeds (python -m bench kaggle); one strays further.
    assert 0.715 < trained(folder, "facebookresearch_kaggle")["auc"] < 0.74


@pytest.mark.slow
def test_our_recipe_learns_more(samples, tmp_path):
    settings = Settings(preset=choose_preset("count", min_count=2, last_day="test-all"), days=7, shuffle=False)
    encode_days([samples / "criteo_kaggle_137k.tsv.gz"], tmp_path, settings)
    found = trained(tmp_path, "criteo_kaggle")
    assert found["rows"] == 19_569 and found["auc"] > 0.757 and found["log_loss"] < 0.489
