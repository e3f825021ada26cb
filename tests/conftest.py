"""Shared fixtures: where the real rows are, what a GPU test needs, small day files."""

import os
from pathlib import Path

import pytest

from gpu_etl.common.packages import install_command, is_there
from tests.reference import write_rows

ROOT = Path(__file__).parent.parent


def needs(module: str) -> pytest.MarkDecorator:
    """Skips a test, visibly, where a package is not installed."""
    return pytest.mark.skipif(not is_there(module), reason=f"no {module}: {install_command(module)}")


def loader_params(kinds: list[type]) -> list:
    """Kinds of loaders as a test's parameters, of which DALI's is skipped where there is no DALI."""
    return [pytest.param(kind, marks=needs("nvidia.dali") if kind.name == "DALI" else ()) for kind in kinds]


def pytest_collection_modifyitems(items):
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def samples() -> Path:
    """Folder of real Criteo rows, $CRITEO_SAMPLES; the test is skipped where it is missing."""
    folder = ROOT / os.environ.get("CRITEO_SAMPLES", "../shared/data")
    if not folder.is_dir():
        pytest.skip(f"no real Criteo rows: {folder} is missing; set CRITEO_SAMPLES")
    return folder


@pytest.fixture(scope="session")
def day_files(tmp_path_factory) -> list[Path]:
    """Three small day files of random rows with gaps, negatives, repeats and extreme values."""
    folder = tmp_path_factory.mktemp("days")
    paths = [folder / f"day_{day}" for day in range(3)]
    for day, path in enumerate(paths):
        path.write_bytes(write_rows(seed=day, rows=(500, 301, 251)[day]))
    return paths
