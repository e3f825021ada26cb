"""Imports point down only: between packages, between their folders; and no files import each other in a circle.

The scripts may use everything, gpu_etl and model never each other; common uses nothing.
"""

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
# From the bottom up; what stands on one floor does not import each other. docs/architecture.md draws them.
FLOORS = {
    "gpu_etl": (
        {"common"}, {"schema"}, {"dataset"}, {"rows"}, {"raw"}, {"backend"}, {"passes"}, {"cluster", "load"},
        {"pipeline"}, {"doctor"}, {"commands"}, {"__main__"},
    ),
    "model": (
        {"config", "metrics"}, {"kernels"}, {"layers"}, {"dlrm", "memory"}, {"outcome"},
        {"checkpoint", "cpu", "planner", "inference"}, {"training"}, {"cli", "distributed"}, {"selfcheck", "sharding"},
    ),
}  # fmt: skip
FILES = [path for room in FORBIDDEN for path in sorted((ROOT / room).rglob("*.py"))]
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}


def imported(path: Path) -> set[str]:
    """Modules that a file imports, those of this project in full."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            within = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= within & MODULES.keys() or {node.module}
            if not within <= MODULES.keys():
                names.add(node.module)
    return names


def floor_of(module: str) -> int | None:
    """The floor of a module of gpu_etl or model; None for the packages themselves."""
    package, _, rest = module.partition(".")
    places = [floor for floor, folders in enumerate(FLOORS[package]) if rest.partition(".")[0] in folders]
    return places[0] if places else None


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_import_points_up(path):
    room = path.relative_to(ROOT).parts[0]
    assert not {name.partition(".")[0] for name in imported(path)} & FORBIDDEN[room]


@pytest.mark.parametrize("module", [name for name in MODULES if name.partition(".")[0] in FLOORS and "." in name])
def test_folders_stand_on_floors(module):
    package, folder = module.split(".")[:2]
    assert floor_of(module) is not None, f"{module}: no floor"
    for name in imported(MODULES[module]):
        if name.startswith(f"{package}.") and name.split(".")[1] != folder:
            assert floor_of(name) < floor_of(module), f"{module} imports {name}"


def test_no_files_import_each_other_in_a_circle():
    imports = {module: imported(path) & MODULES.keys() for module, path in MODULES.items()}
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join((*above[above.index(module) :], module))
        if module not in done:
            for name in sorted(imports[module]):
                visit(name, (*above, module))
            done.add(module)

    for module in sorted(imports):
        visit(module, ())


def test_raw_data_side_does_not_load_torch_before_batches():
    raw = [path for path in FILES if path.is_relative_to(ROOT / "gpu_etl") and path.parent.name != "load"]
    assert raw and not [path for path in raw if "torch" in {name.partition(".")[0] for name in imported(path)}]
