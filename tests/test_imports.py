"""Imports point down only: the scripts may use everything, gpu_etl and model never each other; common uses nothing."""

import ast
from pathlib import Path

import pytest

from tests.conftest import ROOT

FORBIDDEN = {
    "common": {"gpu_etl", "model", "bench", "tests", "train", "dist_train"},
    "gpu_etl": {"model", "bench", "tests", "train", "dist_train"},
    "model": {"gpu_etl", "bench", "tests", "train", "dist_train"},
    "bench": {"tests", "train", "dist_train"},
}
FILES = [path for room in FORBIDDEN for path in sorted((ROOT / room).rglob("*.py"))]


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_import_points_up(path):
    room = path.relative_to(ROOT).parts[0]
    assert not imported(path) & FORBIDDEN[room]


def test_raw_data_side_does_not_load_torch_before_batches():
    raw = [path for path in FILES if path.is_relative_to(ROOT / "gpu_etl") and path.parent.name != "load"]
    assert raw and not [path for path in raw if "torch" in imported(path)]


def test_json_never_holds_nan():
    """NaN and Infinity are no JSON: whoever writes JSON says that they are an error."""
    rooms = [path for path in FILES if path.relative_to(ROOT).parts[0] != "gpu_etl"]
    for path in [*rooms, ROOT / "train.py", ROOT / "dist_train.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.dump", "json.dumps"):
                found = {word.arg: ast.unparse(word.value) for word in node.keywords}
                assert found.get("allow_nan") == "False", f"{path}:{node.lineno}"
