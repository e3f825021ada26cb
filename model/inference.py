"""A trained model at work: scores, their speed, and export for other programs."""

import errno
import os
import shutil
import statistics
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from common import atomic
from model.config import ConfigError
from model.dlrm import DLRM

WARM_UP = 10
PERCENTILES = (50, 90, 95, 99)
EXAMPLE_ROWS = 3  # of the batch that an export runs; of one row, the exporters would take 1 for the only batch size
PT2_BYTES = 4 << 20  # of a .pt2 beside its weights, at most
WEIGHTS = ".data"  # what ONNX's exporter adds to a name for the file of large weights


@torch.no_grad()
def scores(trainer, batches: Iterable) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Per batch: click probabilities and labels, float32 [B], on the CPU."""
    for batch in batches:
        yield torch.sigmoid(trainer.logits(batch)).cpu(), batch.label.cpu()


@torch.no_grad()
def benchmark(trainer, batches: dict[int, list], steps: int) -> list[dict]:
    """Latency (seconds: percentiles, mean) and throughput per batch size; batches: some of each size, used in turns.

    A step runs from a batch on the device to its scores on the host.
    """
    found = []
    for size, some in batches.items():
        times = []
        for step in range(WARM_UP + steps):
            start = time.perf_counter()
            torch.sigmoid(trainer.logits(some[step % len(some)])).cpu()
            times.append(time.perf_counter() - start)
        times = sorted(times[WARM_UP:])
        figures = {f"latency_p{p}": times[min(len(times) - 1, len(times) * p // 100)] for p in PERCENTILES}
        found.append({"batch_size": size, "steps": steps, "samples_per_second": round(size / statistics.median(times)),
                      "latency_mean": statistics.mean(times), **figures})  # fmt: skip
    return found


class Scorer(nn.Module):
    """The model as other programs call it: dense float32 [B, 13], log(x + 1) of the integers, and sparse int32 [B, 26],
    ids -> click probabilities float32 [B].

    A row with an id beyond its table has no score: it is an error (must_fit), or, where the form knows no errors, NaN.
    """

    def __init__(self, model: DLRM, must_fit: bool = True):
        super().__init__()
        self.model, self._must_fit = model, must_fit
        self.register_buffer("sizes", torch.tensor(model.config.categorical_feature_sizes, dtype=torch.int32), False)

    def forward(self, dense: torch.Tensor, sparse: torch.Tensor) -> torch.Tensor:
        """See the class."""
        if self.model.config.hash_indices:
            return torch.sigmoid(self.model(dense, sparse))
        fits = ((sparse >= 0) & (sparse < self.sizes)).all(1)
        if self._must_fit:
            torch._assert_async(fits.all(), "an id is not from 0 to below its table's size")
        found = torch.sigmoid(self.model(dense, torch.where(fits.unsqueeze(1), sparse, 0)))
        return torch.where(fits, found, torch.nan)


@contextmanager
def _workplace(path: Path) -> Iterator[Path]:
    """A folder beside a file to come, cleared away at the end; what a process that was killed left in it goes first."""
    folder = path.with_name(f"{path.name}.part")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def export(model: DLRM, path: Path) -> list[Path]:
    """Write the model with any batch size: by torch.export (.pt2), or as ONNX (.onnx), by the file's name. Returns the
    files: that one, and what has to lie beside it (ONNX keeps large weights in NAME.data).

    They get their names when they are whole, and what an earlier export left beside that name goes. Raises ConfigError
    for another name, where something is there that is no file, and where ONNX's exporter is missing.
    """
    if path.suffix not in WRITERS or path.is_dir():
        raise ConfigError(f"--output {path}: expected a name that ends in .pt2 (torch.export) or .onnx, of a file")
    config, device = model.config, model.dense_parameters()[0].device
    example = (
        torch.zeros(EXAMPLE_ROWS, config.num_numerical_features, device=device),
        torch.zeros(EXAMPLE_ROWS, len(config.categorical_feature_sizes), dtype=torch.int32, device=device),
    )
    batch = torch.export.Dim("batch", min=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _workplace(path) as folder, torch.no_grad():
        WRITERS[path.suffix](model, folder / path.name, example, ({0: batch}, {0: batch}))
        # The one that needs others comes last.
        parts, again = sorted(folder.iterdir(), key=lambda part: part.name == path.name), path.is_file()
        for part in parts:
            atomic.to_disk(part)
        for part in parts:
            part.replace(path.parent / part.name)
        beside = path.with_name(f"{path.name}{WEIGHTS}")
        if again and path.suffix == ".onnx" and beside.name not in [part.name for part in parts]:
            beside.unlink(missing_ok=True)
        atomic.to_disk(path.parent)
    return [path.parent / part.name for part in reversed(parts)]


def _write_pt2(model: DLRM, path: Path, example: tuple[torch.Tensor, torch.Tensor], shapes: tuple) -> None:
    # torch's writer aborts the process where the disk takes no more.
    needed = sum(tensor.nbytes for tensor in model.state_dict().values()) + PT2_BYTES
    if shutil.disk_usage(path.parent).free < needed:
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: about {needed / 1e6:,.0f} MB needed", str(path))
    torch.export.save(torch.export.export(Scorer(model).eval(), example, dynamic_shapes=shapes), path)


def _write_onnx(model: DLRM, path: Path, example: tuple[torch.Tensor, torch.Tensor], shapes: tuple) -> None:
    try:
        import onnxscript  # noqa: F401 - torch's exporter needs it
    except ImportError as error:
        raise ConfigError("--output *.onnx: the exporter is missing: pip install onnx onnxscript") from error
    torch.onnx.export(
        Scorer(model, must_fit=False).eval(), example, path, input_names=["dense", "sparse"],
        output_names=["probability"], dynamic_shapes=shapes, dynamo=True, verbose=False,
    )  # fmt: skip


WRITERS = {".pt2": _write_pt2, ".onnx": _write_onnx}
