"""A trained model at work: scores, their speed, and export for other programs."""

import statistics
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import nn

from model.config import ConfigError
from model.dlrm import DLRM

WARM_UP = 10
PERCENTILES = (50, 90, 95, 99)


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
    ids -> click probabilities float32 [B]."""

    def __init__(self, model: DLRM):
        super().__init__()
        self.model = model

    def forward(self, dense: torch.Tensor, sparse: torch.Tensor) -> torch.Tensor:
        """See the class."""
        return torch.sigmoid(self.model(dense, sparse))


def export(model: DLRM, path: Path, example: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Write the model with any batch size: by torch.export (.pt2), or as ONNX (.onnx), by the file's name.

    example: dense and sparse of a few rows. Raises ConfigError for another name, and where ONNX's exporter is missing.
    """
    scorer = Scorer(model).eval()
    batch = torch.export.Dim("batch", min=1)
    shapes = ({0: batch}, {0: batch})
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        if path.suffix == ".pt2":
            torch.export.save(torch.export.export(scorer, example, dynamic_shapes=shapes), path)
        elif path.suffix == ".onnx":
            try:
                import onnxscript  # noqa: F401 - torch's exporter needs it
            except ImportError as error:
                raise ConfigError("--output *.onnx: the exporter is missing: pip install onnx onnxscript") from error
            names = ["dense", "sparse"]
            torch.onnx.export(
                scorer, example, path, input_names=names, output_names=["probability"], dynamic_shapes=shapes,
                dynamo=True, verbose=False,
            )  # fmt: skip
        else:
            raise ConfigError(f"--output {path}: expected a name that ends in .pt2 (torch.export) or .onnx")
