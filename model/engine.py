"""The one training step, evaluation, and the loop around them."""

import resource
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from signal import Signals

import torch
import torch.nn.functional as F
from tqdm import tqdm

from model.clock import Clock
from model.config import ConfigError
from model.cpu_step import PART, CpuStep
from model.device import has_fast_bfloat16
from model.dlrm import DLRM
from model.graph import Graph
from model.keeper import Keeper
from model.logs import RunLog
from model.loss_scale import LossScale
from model.metrics import Metrics, measure
from model.optimizers import Optimizer
from model.schedule import Schedule

TESTS_PER_EPOCH = 20
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
    False for the eager step even where a faster one (cpu_step.py) can do the model.
    """

    def __init__(
        self, model: DLRM, schedule: Schedule, precision: Precision = Precision(),
        optimizer: Optimizer = Optimizer(), table_lr: float = 1.0, fused: bool = True,  # noqa: B008
    ):  # fmt: skip
        self.model, self.schedule, self.precision = model, schedule, precision
        self.device = model.top[0].weight.device  # the tables may lie elsewhere
        self._settings, self._table_lr = optimizer, table_lr
        half = precision.autocast == torch.float16
        self.loss_scale = LossScale(precision.loss_scale, precision.dynamic, self.device) if half else None
        self.optimizer = optimizer.for_mlps(model.dense_parameters(), half or self.device.type == "cuda")
        self.lr = torch.zeros((), device=self.device)
        if half:
            if not hasattr(model.embedding, "hold"):
                raise ConfigError(f"--fp16: {type(model.embedding).__name__} cannot hold back a step; expected --amp")
            self.optimizer.found_inf = self.loss_scale.found
            model.embedding.loss_scale = self.loss_scale.scale
            model.embedding.hold()
        self.clock = Clock(self.device)
        self.steps = 0
        self._cpu = None
        if fused and not half and CpuStep.takes(model):
            self._cpu = CpuStep(model, precision.autocast is not None and has_fast_bfloat16())
        self.run = self._run_eager if self._cpu is None else self._run_on_cpu
        self._score = self._score_eagerly if self._cpu is None else self._score_on_cpu

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
        """From now on, run steps and scores of full batches as CUDA graphs (graph.py). Raises ConfigError where that
        cannot be."""
        if self._settings.name not in ("sgd", "adam"):
            raise ConfigError(f"--cuda_graphs: expected --optimizer sgd or adam, got {self._settings.name}")
        step, self._score = Graph(self._run_eager, self.device), Graph(self._score_eagerly, self.device)

        def run(batch) -> torch.Tensor:
            with self.clock.part("recorded step"):
                return step(batch)

        self.run, self.model.embedding.step = run, torch.zeros((), device=self.device)
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
        group["lr"] = self.lr if group["fused"] and self.device.type == "cuda" else lr
        embedding.lr.fill_(lr * self._table_lr)
        if isinstance(embedding.step, torch.Tensor):
            embedding.step.fill_(self.steps)
        else:
            embedding.step = self.steps

    def _run_eager(self, batch) -> torch.Tensor:
        """The step's work: the specification of all faster ones."""
        scale = self.loss_scale.scale if self.loss_scale else 1.0
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
        with self.clock.part(MLP_UPDATE):
            self._update()
        return loss

    def exchange(self, tensors: list[torch.Tensor]) -> None:
        """Between backward and update: where several processes train, add up the MLPs' gradients (and, in float16, the
        mark of a step to skip) over all of them, in place. One process has nothing to do."""

    def _update(self) -> None:
        gradients = [parameter.grad for parameter in self.model.dense_parameters()]
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


@dataclass(frozen=True)
class LoopOptions:
    """epochs: passes over the data in all, those before a resume included. print_freq, test_freq: in steps, 0 for 20
    tests an epoch. test_after: no test before so many epochs. auc_threshold: stop once a test reaches it."""

    epochs: int = 1
    print_freq: int = 0
    test_freq: int = 0
    test_after: float = 0.0
    auc_threshold: float = 1.0

    def frequencies(self, steps_per_epoch: int) -> tuple[int, int]:
        """(print_freq, test_freq) in steps, at least 1."""
        test = self.test_freq or max(1, steps_per_epoch // TESTS_PER_EPOCH)
        return self.print_freq or max(1, min(1000, steps_per_epoch // TESTS_PER_EPOCH)), test


@dataclass
class Progress:
    """What the loop did: samples and seconds of training (tests and checkpoints left out), tests as (step, Metrics),
    why it ended; reached: whether that was the AUC threshold; signal: the one that ended it, if one did."""

    samples: int = 0
    seconds: float = 0.0
    tests: list[tuple[int, Metrics]] = field(default_factory=list)
    ended: str = "all epochs done"
    reached: bool = False
    signal: Signals | None = None

    @property
    def samples_per_second(self) -> float:
        """Training speed; 0 where nothing was trained."""
        return self.samples / self.seconds if self.seconds else 0.0


class Loop:
    """Trains a Trainer from its step on to the end of the last epoch, to the AUC threshold, or to a signal.

    loader: len() batches an epoch and batches(epoch, start), as in gpu_etl.load. test: () -> Metrics on the validation
    split. keeper: writes checkpoints, None for none. log: takes what happens (logs.RunLog).
    """

    def __init__(
        self, trainer: Trainer, loader, test: Callable[[], Metrics], options: LoopOptions, keeper: Keeper | None = None,
        log: RunLog | None = None,
    ):  # fmt: skip
        self.trainer, self.loader, self.test, self.options = trainer, loader, test, options
        self.keeper, self.log = keeper, log or RunLog()
        self.progress = Progress()
        self._print_freq, self._test_freq = options.frequencies(len(loader))
        self._losses: list[torch.Tensor] = []

    def run(self) -> Progress:
        """Raises ConfigError on a loss that is no number: no checkpoint is written from the step with it on."""
        trainer, per_epoch = self.trainer, len(self.loader)
        total = per_epoch * self.options.epochs
        watching = self.keeper.watch_signals() if self.keeper else nullcontext()
        with watching, tqdm(total=total, initial=trainer.steps, desc="train", unit="step", file=sys.stderr) as bar:
            while trainer.steps < total and not self._stopped:
                epoch, start = divmod(trainer.steps, per_epoch)
                self.log.epoch("start", epoch)
                self._run_epoch(epoch, start, total, bar)
                self.log.epoch("stop", epoch)
            if self.keeper:
                self._check_losses()
                self.keeper.end()
        return self.progress

    @property
    def _stopped(self) -> bool:
        return self.progress.reached or self.progress.signal is not None

    def _run_epoch(self, epoch: int, start: int, total: int, bar: tqdm) -> None:
        batches = iter(self.loader.batches(epoch, start))
        mark = time.perf_counter()
        while not self._stopped:
            with self.trainer.clock.part("waiting for data"):
                batch = next(batches, None)
            if batch is None:
                break
            self._losses.append(self.trainer.step(batch))
            self.progress.samples += self.trainer.rows(batch)
            bar.update()
            pause = self._due(total)
            if pause:
                self._check_losses()
                self.progress.seconds += time.perf_counter() - mark
                for action in pause:
                    action(bar)
                mark = time.perf_counter()
        self.progress.seconds += time.perf_counter() - mark

    def _due(self, total: int) -> list[Callable[[tqdm], None]]:
        """What is to be done after this step, in order."""
        steps, found = self.trainer.steps, []
        if steps % self._print_freq == 0:
            found.append(self._report)
        if steps % self._test_freq == 0 and total > steps >= self.options.test_after * len(self.loader):
            found.append(self._test)
        if self.keeper and self.keeper.due:
            found.append(lambda _: self.keeper.save())
        if self.keeper and self.keeper.signal:
            found.append(self._end_by_signal)
        return found

    def _end_by_signal(self, _: tqdm) -> None:
        self.progress.signal = self.keeper.signal
        self.progress.ended = f"{self.keeper.signal.name} after step {self.trainer.steps}"

    def _test(self, bar: tqdm) -> None:
        place = self.trainer.steps / len(self.loader)
        self.log.test_start(place)
        found = self.test()
        self.progress.tests.append((self.trainer.steps, found))
        self.log.tested(self.trainer.steps, place, found)
        bar.write(
            f"step {self.trainer.steps}: AUC {found.auc:.5f}, log loss {found.log_loss:.5f}, calibration "
            f"{found.calibration:.3f}", file=sys.stderr,
        )  # fmt: skip
        if self.keeper:
            self.keeper.tested(found)
        if found.auc >= self.options.auc_threshold:
            self.progress.reached = True
            self.progress.ended = f"AUC {self.options.auc_threshold} reached at step {self.trainer.steps}"

    def _report(self, bar: tqdm) -> None:
        loss, lr = self._last_loss, self.trainer.schedule.at(self.trainer.steps)
        bar.set_postfix_str(f"loss {loss:.4f}, lr {lr:.4g}", refresh=False)
        self.log.trained(self.trainer.steps, loss, lr, self.progress)

    def _check_losses(self) -> None:
        """Look at the losses since the last time, all at once: each look waits for the device."""
        if not self._losses:
            return
        losses = self.trainer.whole_losses(torch.stack(self._losses)).cpu()
        self._losses = []
        self._last_loss = losses[-1].item()
        bad = (~losses.isfinite()).nonzero()
        if not len(bad):
            return
        step = self.trainer.steps - len(losses) + 1 + int(bad[0])
        epoch, number = divmod(step - 1, len(self.loader))
        rows = ""
        if hasattr(self.loader, "ranges"):
            begin, end = self.loader.ranges(epoch, number)[0]
            rows = f", rows {begin + 1} to {end} of the training split"
        saved = self.keeper and self.keeper.latest
        raise ConfigError(
            f"step {step} (epoch {epoch + 1}, batch {number + 1}{rows}): the loss is {losses[bad[0]].item()}; "
            f"lower --lr, or raise --warmup_steps. Last good checkpoint: {saved or 'none'}"
        )


def fit(trainer: Trainer, loader, test: Callable[[], Metrics], options: LoopOptions, *more) -> Progress:
    """Loop(...).run()."""
    return Loop(trainer, loader, test, options, *more).run()


def profile(trainer: Trainer, loader, steps: int, folder: Path) -> str:
    """Train `steps` steps under torch's profiler; writes the trace into the folder, returns the table of costs."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if trainer.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    threads = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)  # those of the fused CPU step too
    with torch.profiler.profile(activities=activities, experimental_config=threads) as profiler:
        for batch, _ in zip(loader.batches(), range(steps), strict=False):
            trainer.step(batch)
    folder.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(folder / "trace.json"))
    return profiler.key_averages().table(sort_by=f"self_{trainer.device.type}_time_total", row_limit=20)
