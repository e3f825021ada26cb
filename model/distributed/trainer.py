"""Training on several ranks with the engine of one: a trainer, a loader and a keeper that know of the others.

Embeddings are model-parallel (sharded.py, exchange.py), the MLPs data-parallel (reduction.py). The loss of a rank is
its rows' part of the global batch's mean, so that every gradient, summed over the ranks, is that of the global batch,
whatever the numbers of rows on the ranks are.
"""

import functools
import zlib
from collections.abc import Iterator
from dataclasses import replace
from signal import Signals
from typing import NamedTuple

import torch
import torch.nn.functional as F

from model.checkpoint.manager import CheckpointManager
from model.config import ConfigError, ModelConfig
from model.distributed import metrics as rank_metrics
from model.distributed.all_to_all import RoutedIds
from model.distributed.gradient_reducer import GradientReducer
from model.distributed.process_group import Ranks
from model.distributed.sharded_embedding import ShardedEmbedding
from model.dlrm import DLRM
from model.layers.optimizers import Optimizer
from model.metrics import Metrics
from model.planner.plan import Plan
from model.training.trainer import Trainer


class RankBatch(NamedTuple):
    """A rank's share of a global batch: dense float32 [b, 13], sparse int32 [b, 26], label float32 [b]; received: the
    ids that all ranks ask of this one (all_to_all.RoutedIds), rows: of the global batch, a float32 scalar on the host.
    All are tensors, and of the same shapes for all full batches, as a step at fixed addresses wants them."""

    dense: torch.Tensor
    sparse: torch.Tensor
    label: torch.Tensor
    received: torch.Tensor
    rows: torch.Tensor


def make_model(
    config: ModelConfig, plan: Plan, ranks: Ranks, optimizer: Optimizer = Optimizer(),  # noqa: B008
    wire: torch.dtype = torch.float32, fused: bool = True,
) -> DLRM:  # fmt: skip
    """A DLRM with sharded embeddings, gradients summed over the ranks, on the ranks' device. After the same
    torch.manual_seed() on every rank, its weights are those of one process with that seed."""
    reducer = GradientReducer(ranks)
    embedding = functools.partial(
        ShardedEmbedding, plan, ranks, optimizer, config.hash_indices, reducer.reduce, wire, fused
    )
    with ranks.device:
        model = DLRM(config, table_optimizer=optimizer, make_embedding=embedding)
    if ranks.world > 1:
        reducer.attach(model.dense_parameters())
    # Vectors are sent for before the bottom MLP runs.
    model.register_forward_pre_hook(lambda model, inputs: model.embedding.begin(inputs[1]))
    return model


class RankTrainer(Trainer):
    """The step on a rank's share of a batch."""

    def __init__(self, ranks: Ranks, model: DLRM, *settings):
        super().__init__(model, *settings)
        self.ranks = ranks

    def logits(self, batch: RankBatch) -> torch.Tensor:
        """Logits float32 [b] of this rank's rows."""
        return super().logits(batch._replace(sparse=RoutedIds(batch.sparse, batch.received, None)))

    def loss(self, batch: RankBatch) -> torch.Tensor:
        """This rank's part of the global batch's mean loss."""
        return F.binary_cross_entropy_with_logits(self.logits(batch), batch.label, reduction="sum") / batch.rows

    def exchange(self, tensors: list[torch.Tensor]) -> None:
        """The MLPs' gradients were summed within backward; what is left is float16's mark of a step to skip."""
        if self.loss_scale:
            self.ranks.all_reduce(tensors[-1])

    def use_cuda_graphs(self) -> None:
        """Raises ConfigError: the exchange of ids with the batch behind is not part of the step."""
        raise ConfigError("--cuda_graphs: expected train.py; the step of several ranks cannot be recorded yet")

    def rows(self, batch: RankBatch) -> int:
        """Rows of the global batch."""
        return int(batch.rows)

    def whole_losses(self, losses: torch.Tensor) -> torch.Tensor:
        """The parts of all ranks, summed. Raises ConfigError where the ranks do not train the same model any more."""
        self.ranks.all_reduce(losses)
        self.check_alike()
        return losses

    def check_alike(self) -> None:
        """Raise ConfigError where steps, or what all ranks hold (the MLPs, replicated tables), are not those of rank
        0: a fault of a machine, or of this program. Waits for the device."""
        weights, replicas = self.model.dense_parameters(), self.model.embedding.replicas
        if replicas is not None:
            weights = [*weights, replicas.weight]
        # Sums of the bits as whole numbers: exact in any order, and made where the weights are.
        sums = torch.stack([weight.detach().reshape(-1).view(torch.int32).sum() for weight in weights])
        found = {"steps": self.steps, "digest of the weights": f"{zlib.crc32(sums.cpu().numpy()):08x}"}
        remedy = "go on from the last checkpoint, and look for the machine that computes otherwise"
        self.ranks.check_same(found, "this rank does not train what rank 0 trains", remedy)

    def measure(self, logits: torch.Tensor, labels: torch.Tensor) -> Metrics:
        """Metrics over all ranks' rows."""
        return rank_metrics.measure(logits, labels, self.ranks)


class RankLoader:
    """A loader of this rank's rows (gpu_etl.load) -> RankBatches. The ids of a batch are on their way to their owners
    while the batch before is worked on. batch_size: global, of all but the last batch; rows: of the split. keep: hold
    the batches of the first pass in memory for later ones."""

    def __init__(self, loader, embedding: ShardedEmbedding, batch_size: int, rows: int, keep: bool = False):
        self._loader, self._embedding, self._batch_size, self._rows = loader, embedding, batch_size, rows
        self._kept: list[RankBatch] | None = [] if keep else None
        if hasattr(loader, "ranges"):
            self.ranges = loader.ranges

    def __len__(self) -> int:
        return len(self._loader)

    def check(self) -> None:
        """As the loader's: raises where a value in its batches cannot be."""
        if hasattr(self._loader, "check"):
            self._loader.check()

    def batches(self, epoch: int = 0, start: int = 0) -> Iterator[RankBatch]:
        """The batches from number `start` of `epoch` on."""
        if self._kept:
            yield from self._kept
            return
        before = None
        for found in self._routed(epoch, start):
            if before:
                yield self._complete(*before)
            before = found
        if before:
            yield self._complete(*before)

    def _routed(self, epoch: int, start: int) -> Iterator[tuple]:
        """The loader's batches with their ids under way, and how many rows all ranks have of them."""
        size = self._batch_size
        for number, batch in enumerate(self._loader.batches(epoch, start), start):
            rows = min(size, self._rows - number * size)
            yield batch, self._embedding.route(batch.sparse, rows), torch.tensor(float(rows), device="cpu")

    def _complete(self, batch, routed: RoutedIds, rows: torch.Tensor) -> RankBatch:
        found = RankBatch(batch.dense, routed.local, batch.label, routed.wait(), rows)
        if self._kept is not None:
            self._kept.append(found)
        return found


class RankCheckpointManager(CheckpointManager):
    """Checkpoints written by all ranks together. What depends on a rank's clock or signals is agreed on first: words
    said after a step hold after the next one, so that nobody waits for them."""

    def __init__(self, ranks: Ranks, *settings):
        super().__init__(*settings, ranks=replace(ranks, words="saving"))
        self._control, self._words, self._work = ranks, torch.zeros(2, dtype=torch.int32), None
        self._agreed: Signals | None = None

    @property
    def signal(self) -> Signals | None:
        """The signal that all ranks know of."""
        return self._agreed

    @property
    def due(self) -> bool:
        """Whether all ranks write a checkpoint after this step; called once a step."""
        late = 0
        if self._work is not None:
            self._work.wait()
            late, number = self._words.tolist()
            self._agreed = Signals(number) if number else None
        # A save that is agreed on now resets every clock.
        self._words = torch.tensor([self._late and not late, int(self._noted or 0)], dtype=torch.int32)
        self._work = self._control.all_max(self._words)
        return self._in_step or bool(late)
