"""Ten training steps two ways: on a GPU against the CPU, as a CUDA graph against one by one, the CPU's fused step
against the eager one."""

from functools import partial
from typing import NamedTuple

import torch

from model.config import ModelConfig
from model.dlrm import DLRM
from model.layers.embedding import Storage
from model.layers.optimizers import Optimizer
from model.training.schedule import Schedule
from model.training.trainer import Precision, Trainer

STEPS, BATCH = 10, {"cpu": 512, "cuda": 2048}
SIZES = tuple(3 + 37 * c * c for c in range(26))  # 3 to 23,128 rows
CONFIG = ModelConfig(13, SIZES, (512, 256, 64), (512, 512, 256, 1), 64)
CPU = torch.device("cpu")
LR = {"sgd": 0.05, "rowwise_adagrad": 1e-3, "adam": 3e-4}


class Batch(NamedTuple):
    """As of gpu_etl.load: dense float32 [B, 13], sparse int32 [B, 26], label float32 [B]."""

    dense: torch.Tensor
    sparse: torch.Tensor
    label: torch.Tensor


def batches(rows: int) -> list[Batch]:
    """Batches whose labels depend on the rest, with popular ids."""
    random, limits = torch.Generator().manual_seed(0), torch.tensor(SIZES)
    found = []
    for _ in range(STEPS):
        dense = torch.rand(rows, 13, generator=random) * 5
        sparse = (torch.rand(rows, 26, generator=random).pow(4) * limits).int()
        score = dense[:, 0] - 2 + 2 * (sparse[:, 5] % 2)
        label = (torch.rand(rows, generator=random) < torch.sigmoid(score)).float()
        found.append(Batch(dense, sparse, label))
    return found


def trainer(
    device: torch.device,
    optimizer: str = "sgd",
    precision: Precision = Precision(),  # noqa: B008 - frozen
    fused: bool = True,
) -> Trainer:
    """A trainer of CONFIG with the same weights on every device."""
    settings = Optimizer(optimizer)
    torch.manual_seed(0)
    weights = DLRM(CONFIG, True, settings, Storage()).state_dict()
    with device:
        model = DLRM(CONFIG, True, settings, Storage())
    model.load_state_dict(weights)
    return Trainer(model, Schedule(LR[optimizer]), precision, settings, fused=fused)


def _train(one: Trainer, rows: int) -> list[float]:
    """Losses of the steps, with batches of so many rows."""
    return [one.step(Batch(*(part.to(one.device) for part in batch))).item() for batch in batches(rows)]


def _same(tried: Trainer, truth: Trainer, what: str, tolerance: float) -> None:
    """Both train; losses and weights agree, and something was learnt."""
    rows = BATCH[tried.device.type]
    losses, expected = _train(tried, rows), _train(truth, rows)
    assert min(expected[1:]) < expected[0], f"{what}: nothing was learnt: losses {expected}"
    pairs = [("losses", torch.tensor(losses), torch.tensor(expected), 1e-3), *_weights(tried, truth, tolerance)]
    for name, found, right, allowed in pairs:
        say = partial("{}, {}: {}".format, what, name)
        torch.testing.assert_close(found.cpu(), right.cpu(), rtol=allowed, atol=allowed / 10, msg=say)


def _weights(tried: Trainer, truth: Trainer, tolerance: float) -> list[tuple[str, torch.Tensor, torch.Tensor, float]]:
    """(name, weights of one, weights of the other, tolerance) of all layers and tables."""
    mine, theirs = tried.model.state_dict(), truth.model.state_dict()
    return [(name, mine[name].float(), theirs[name].float(), tolerance) for name in theirs]


def steps(device: torch.device) -> None:
    """On a GPU, float32, against the CPU; on a CPU, the fused step against the eager one."""
    for optimizer in ("sgd", "rowwise_adagrad", "adam"):
        tried, truth = trainer(device, optimizer), trainer(CPU, optimizer, fused=False)
        # Adam and Adagrad divide by roots near 0 at first, which makes much of the last bits.
        _same(tried, truth, f"ten steps of {optimizer}", 1e-3 if optimizer == "sgd" else 2e-2)


def half(device: torch.device) -> None:
    """bfloat16 and float16 matrix products, on the device itself, against float32."""
    for precision in (Precision(torch.bfloat16), Precision(torch.float16, 1024.0, True)):
        rows = BATCH[device.type]
        losses, expected = _train(trainer(device, "sgd", precision), rows), _train(trainer(device), rows)
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=2e-2, atol=0)


def graph(device: torch.device) -> None:
    """Steps recorded as a CUDA graph and replayed, against steps one by one."""
    for precision in (Precision(), Precision(torch.float16, 1024.0, True)):
        recorded, plain = trainer(device, "sgd", precision), trainer(device, "sgd", precision)
        recorded.use_cuda_graphs()
        _same(recorded, plain, f"a CUDA graph of {precision}", 1e-3)
