"""Compile what most tests use, once, before several processes of tests would each compile it: python -m tests.warm"""

import contextlib
import io
import tempfile
from pathlib import Path

import train
from gpu_etl.__main__ import main
from tests import reference
from tests.gpu_etl.test_part_files import as_parquet

TRAINING = "--batch_size", "64", "--test_batch_size", "100", "--warmup_steps", "2", "--auc_threshold", "1"


def warm(folder: Path) -> None:
    """Synthetic days, an encode of text and one of Parquet, and a few steps of training, with and without a shuffle."""
    out = str(folder / "set")
    main(["synth", "--rows", "2000", "--days", "2", "--out", str(folder / "synthetic")])
    (folder / "day_0").write_bytes(reference.write_rows(seed=1, rows=400))
    as_parquet(reference.write_rows(seed=2, rows=200), folder / "day_1")
    main(["encode", str(folder / "day_0"), str(folder / "day_1"), "--out", out])
    main(["verify", out])
    for words in ((), ("--amp",), ("--shuffle_buffer_size", "200", "--embedding_optimizer", "rowwise_adagrad")):
        train.main(["--dataset", out, "--model_config", "criteo_kaggle_tiny", *TRAINING, *words])


if __name__ == "__main__":
    said = io.StringIO()
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        warm(Path(scratch))
