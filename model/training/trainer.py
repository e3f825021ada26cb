"""The one training step, and evaluation."""

import resource
import sys
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tqdm import tqdm

from model.config import ConfigError
from model.cpu.step import PART, CpuStep, alone
from model.dlrm import DLRM
from model.layers.optimizers import DeviceAdagrad, Optimizer, takes_lr_tensor
from model.metrics import Metrics, measure
from model.training.cuda_graph import Graph
from model.training.device import has_fast_bfloat16
from model.training.loss_scale import LossScale
from model.training.schedule import Schedule
from model.training.step_timer import StepTimer

MLP_UPDATE = "update of the MLPs"


@dataclass(frozen=True)
class Precision:
    """autocast: the type of matrix products, None for float32 throughout; loss_scale: for float16's range, where it
    begins; dynamic: whether it changes then, as loss_scale.py says."""

    autocast: torch.dtype | None = None
    loss_scale: float = 1.0
    dynamic: bool = False

    def __str__(self) -> str:
        return str(self.autocast or torch.float32).removeprefix("torch.")


class Trainer:
    """A model in training: the step, and the number of steps done.

    A batch is (dense float32 [B, 13], sparse int32 [B, 26], label float32 [B]) on the model's device. `optimizer` is
    that of the MLPs; the tables have their own. table_lr: their learning rate, as a multiple of the schedule's. fused:
    False for the eager step even where a faster one (cpu/step.py) can do the model.
    """

    def __init__(
        self, model: DLRM, schedule: Schedule, precision: Precision = Precision(),
        optimizer: Optimizer = Optimizer(), table_lr: float = 1.0, fused: bool = True,  # noqa: B008
    ):  # fmt: skip
        self.model, self.schedule, self.precision = model, schedule, precision
        self.device = model.top[0].weight.device  # the tables may lie elsewhere
        self._settings, self._table_lr = optimizer, table_lr
        self._mlps = model.dense_parameters()
        half = precision.autocast == torch.float16
        self.loss_scale = LossScale(precision.loss_scale, precision.dynamic, self.device) if half else None
        self.optimizer = optimizer.for_mlps(self._mlps, half or self.device.type == "cuda")
        self.lr = torch.zeros((), device=self.device)
        if half:
            if not hasattr(model.embedding, "hold"):
                raise ConfigError(f"--fp16: {type(model.embedding).__name__} cannot hold back a step; expected --amp")
            self.optimizer.found_inf = self.loss_scale.found
            model.embedding.loss_scale = self.loss_scale.scale
            model.embedding.hold(self.loss_scale.found)
        self.clock = StepTimer(self.device)
        self.steps = 0
        self._cpu = None
        if fused and not half and CpuStep.takes(model):
            self._cpu = CpuStep(model, precision.autocast is not None and has_fast_bfloat16())
        self.run = self._run_eager if self._cpu is None else self._run_on_cpu
        self._score = self._score_eagerly if self._cpu is None else self._score_on_cpu

    def remarks(self) -> list[str]:
        """What a user may want to know of how this trainer does what was asked for."""
        if isinstance(self.optimizer, DeviceAdagrad):
            return [f"Adagrad of the MLPs by foreach kernels: torch {torch.__version__} has no fused one on this GPU"]
        return []

    def optimizer_names(self) -> dict[str, str]:
        """Which optimisers train the MLPs and the tables."""
        return {"mlps": self._settings.name, "tables": self.model.embedding.optimizer.name}

    @property
    def matrices(self) -> torch.dtype:
        """The type that matrix products are done in: on a CPU, bfloat16 only where it is faster than float32."""
        return self._cpu.dtype if self._cpu else self.precision.autocast or torch.float32

    def memory(self) -> dict[str, int]:
        """Bytes of the tables, of what their optimiser remembers, of the MLPs, of the step's own (activations,
        gradients), and the most that was in use at once: on the GPU, or by the process.

        The step's own on a GPU: the most that torch held over what it holds now; on a CPU, of the fused step only.
        """
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
            step = peak - torch.cuda.memory_allocated(self.device)
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            step = self._cpu.memory if self._cpu else None
        tables = [module for module in self.model.embedding.modules() if hasattr(module, "state")]
        return {
            "tables": sum(module.weight.nbytes for module in tables),
            "table_optimizer": sum(tensor.nbytes for module in tables for tensor in module.state().values()),
            "mlps": sum(parameter.nbytes for parameter in self.model.dense_parameters()), "step": step, "peak": peak,
        }  # fmt: skip

    def use_cuda_graphs(self) -> None:
        """From now on, run steps and scores of full batches as CUDA graphs (cuda_graph.py). Raises ConfigError where
        that cannot be."""
        if self._settings.name not in ("sgd", "adam"):
            raise ConfigError(f"--cuda_graphs: expected --optimizer sgd or adam, got {self._settings.name}")
        step, self._score = Graph(self._run_eager, self.device), Graph(self._score_eagerly, self.device)

        def run(batch) -> torch.Tensor:
            with self.clock.part("recorded step"):
                return step(batch)

        self.run, self.model.embedding.step = run, torch.zeros((), dtype=torch.int64, device=self.device)
        if "capturable" in self.optimizer.param_groups[0]:
            self.optimizer.param_groups[0]["capturable"] = True

    def logits(self, batch) -> torch.Tensor:
        """Logits float32 [B] of a batch, in the precision of this trainer; without autograd, by the fastest way."""
        return self._score_eagerly(batch) if torch.is_grad_enabled() else self._score(batch)

    def _score_eagerly(self, batch) -> torch.Tensor:
        with torch.autocast(self.device.type, self.matrices, enabled=self.matrices != torch.float32):
            return self.model(batch.dense, batch.sparse)

    def _score_on_cpu(self, batch) -> torch.Tensor:
        few = len(batch.label) < PART  # one part, which the cores do faster together
        return self._score_eagerly(batch) if few else self._cpu.logits(batch)

    def loss(self, batch) -> torch.Tensor:
        """Mean loss of a batch, a scalar: what backward starts from."""
        return F.binary_cross_entropy_with_logits(self.logits(batch), batch.label)

    def rows(self, batch) -> int:
        """Rows that a step on this batch trains on."""
        return len(batch.label)

    def whole_losses(self, losses: torch.Tensor) -> torch.Tensor:
        """What step() returned for some steps, float32 [n] -> the mean losses of their batches."""
        return losses

    def measure(self, logits: torch.Tensor, labels: torch.Tensor) -> Metrics:
        """Metrics of logits [N] against labels [N]."""
        return measure(logits, labels)

    def step(self, batch) -> torch.Tensor:
        """Train on one batch; returns its mean loss, a scalar tensor on the device."""
        self.steps += 1
        self.clock.next_step()
        self._set_scalars()
        return self.run(batch)

    def _set_scalars(self) -> None:
        """What differs from step to step; scalars on the device where a recorded step reads them there."""
        lr, embedding, group = self.schedule.at(self.steps), self.model.embedding, self.optimizer.param_groups[0]
        self.lr.fill_(lr)
        group["lr"] = self.lr if self.device.type == "cuda" and takes_lr_tensor(self.optimizer) else lr
        embedding.lr.fill_(lr * self._table_lr)
        if isinstance(embedding.step, torch.Tensor):
            embedding.step.fill_(self.steps)
        else:
            embedding.step = self.steps

    def _run_eager(self, batch) -> torch.Tensor:
        """The step's work: the specification of all faster ones."""
        scale = self.loss_scale.scale if self.loss_scale else 1.0
        if self.loss_scale:
            self.loss_scale.begin()
        with self.clock.part("forward"):
            loss = self.loss(batch)
        with self.clock.part("backward, tables"):
            (loss * scale).backward()
        with self.clock.part(MLP_UPDATE):
            self._update()
        return loss.detach()

    def _run_on_cpu(self, batch) -> torch.Tensor:
        loss = self._cpu.gradients(batch)
        for part, seconds in self._cpu.seconds().items():
            self.clock.add(part, seconds)
        with self.clock.part(MLP_UPDATE), alone():
            self._update()
        return loss

    def exchange(self, tensors: list[torch.Tensor]) -> None:
        """Between backward and update: where several processes train, add up the MLPs' gradients (and, in float16, the
        mark of a step to skip) over all of them, in place. One process has nothing to do."""

    def _update(self) -> None:
        gradients = [parameter.grad for parameter in self._mlps]
        scale, embedding = self.loss_scale, self.model.embedding
        if scale:
            scale.unscale(gradients, embedding.held())
        self.exchange([*gradients, scale.found] if scale else gradients)
        if scale:
            embedding.release(scale.found)
            scale.update()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def evaluate(self, batches: Iterable, total: int, name: str) -> Metrics:
        """Exact metrics over `total` batches. Memory: 8 B a row."""
        bar = tqdm(batches, total=total, desc=name, unit="batch", file=sys.stderr, leave=False)
        scored = [(self.logits(batch), batch.label) for batch in bar]
        return self.measure(torch.cat([s for s, _ in scored]), torch.cat([label for _, label in scored]))
