"""The wheel: built, installed into an environment of its own, and used from a folder that is not this one."""

import json
import os
import site
import subprocess
import sys
import venv
import zipfile

import pytest

from tests import reference
from tests.conftest import ROOT


def run(*words, cwd):
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "COV"))}
    done = subprocess.run([str(word) for word in words], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of the files that git knows or would take, as the build writes beside the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines()
    for name in listed:
        if (ROOT / name).is_file():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "source" / name).write_bytes((ROOT / name).read_bytes())
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, ".",
        cwd=folder / "source")  # fmt: skip
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The programs of an environment with the wheel in it; what it depends on is this environment's."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    packages = folder / f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    run(sys.executable, "-m", "pip", "-q", "--python", folder / "bin/python", "install", "--no-deps",
        "--ignore-installed", wheel, cwd=folder)  # fmt: skip
    return folder / "bin"


def test_the_wheel_holds_what_is_needed_and_no_more(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = {name.partition("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"gpu_etl", "model", "common", "train.py", "dist_train.py"}
    here = [path for folder in ("gpu_etl", "model", "common") for path in (ROOT / folder).rglob("*")]
    wanted = {path.relative_to(ROOT).as_posix() for path in here if path.suffix in (".py", ".flags", ".json", ".typed")}
    assert not wanted - names
    (metadata,) = (name for name in names if name.endswith("/METADATA"))
    text = zipfile.ZipFile(wheel).read(metadata).decode()
    assert "Requires-Dist: torch==2.13.0" in text
    assert {f"Provides-Extra: {extra}" for extra in ("gpu", "onnx", "dev")} <= set(text.splitlines())


def test_its_programs_run_from_any_folder(installed, tmp_path):
    assert str(ROOT) not in run(installed / "python", "-c", "import train; print(train.__file__)", cwd=tmp_path)
    for day in range(2):
        (tmp_path / f"day_{day}").write_bytes(reference.write_rows(seed=day, rows=600))
    made = json.loads(run(installed / "gpu-etl", "encode", "day_0", "day_1", "--out", "set", cwd=tmp_path))
    assert made["rows"] == {"train": 600, "test": 300, "val": 300}
    assert json.loads(run(installed / "python", "-m", "gpu_etl", "verify", "set", cwd=tmp_path))["rows"] == made["rows"]
    words = "--model_config", "criteo_kaggle_tiny", "--batch_size", 100, "--output_dir", "runs", "--noamp"
    for program in ("dlrm-train", "dlrm-dist-train"):
        flags = "@criteo_kaggle", "--dataset", "set", "--device", "cpu", *words
        found = json.loads(run(installed / program, *flags, cwd=tmp_path).splitlines()[-1])
        assert found["steps"] == 6
    pins = run(installed / "python", "-c", "from gpu_etl.common import packages as p; print(p.install_command('isal'))",
               cwd=tmp_path)  # fmt: skip
    assert pins.strip() == "pip install isal==1.9.1"


@pytest.mark.parametrize("script", ["train.py", "dist_train.py"])
def test_the_ancestors_names_of_the_scripts(script, tmp_path):
    assert "--model_config" in run(sys.executable, ROOT / "scripts" / script, "--help", cwd=tmp_path)
