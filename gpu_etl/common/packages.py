"""Packages that only some commands need, and the command that installs each."""

import importlib.metadata
import importlib.util
import re
from pathlib import Path

from gpu_etl.common.errors import DataError

ROOT = Path(__file__).parent.parent.parent
REQUIREMENTS = ("requirements.txt", "requirements-gpu.txt", "requirements-onnx.txt", "requirements-dev.txt")
DISTRIBUTION = "criteo-dlrm-gpu"  # of this project
# Distributions by the module that is imported, where the names differ.
DISTRIBUTIONS = {
    "nvidia.dali": "nvidia-dali-cuda120", "numba.cuda": "numba-cuda[cu13]", "cudf": "cudf-cu13",
    "pylibcudf": "cudf-cu13", "cupy": "cupy-cuda13x", "kvikio": "kvikio-cu13", "dask_cuda": "dask-cuda",
    "sklearn": "scikit-learn", "mlperf_logging": "mlperf-logging", "fbgemm_gpu": "fbgemm-gpu",
}  # fmt: skip
PIN = re.compile(r"^([A-Za-z0-9_.\-\[\]]+)==([^\s;]+)", re.MULTILINE)


def _pins() -> dict[str, str]:
    """Versions by distribution, out of the requirements files, or of what is known of the installed project; none where
    its folders alone are here."""
    texts = [(ROOT / name).read_text() for name in REQUIREMENTS if (ROOT / name).is_file()]
    if not texts:
        try:
            texts = importlib.metadata.requires(DISTRIBUTION) or []
        except importlib.metadata.PackageNotFoundError:
            return {}
    return dict(pair for text in texts for pair in PIN.findall(text))


def install_command(module: str) -> str:
    """What installs a module, at the version that this project was tried with: `pip install isal==1.9.1`."""
    known = DISTRIBUTIONS.get(module) or DISTRIBUTIONS.get(module.partition(".")[0]) or module.partition(".")[0]
    version = _pins().get(known)
    return f"pip install {known}=={version}" if version else f"pip install {known}"


def is_there(module: str) -> bool:
    """Whether a module can be found; it is not imported, but the packages around it are."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def require(module: str, purpose: str, instead: str = "") -> None:
    """Raise DataError where a package is missing that `purpose` (a flag, a file) needs; instead: what does without."""
    if not is_there(module):
        words = f"{purpose}: the package {module} is missing: {install_command(module)}"
        raise DataError(f"{words}, or {instead}" if instead else words)


def explain(error: ModuleNotFoundError) -> str:
    """Words for a package that is not there: what is missing, and what installs it."""
    return f"the package {error.name} is missing: {install_command(error.name or '')}"
