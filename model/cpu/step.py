"""Forward, backward and the tables' update on a CPU, on parts of the batch that fit the cache.

The eager step (trainer.py) is the specification. There, every operation runs over the whole batch and is cut among the
cores; at 16,384 samples each one then reads and writes tens of megabytes. Here every core takes its own share of the
batch through the whole model, some hundred samples at a time, and meets the others only at the end: gradients of the
MLPs are summed over all parts, and those of the rows wait until the last part is through. So every part sees the
weights that the step began with, and the mathematics is that of one large batch.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from threading import Barrier

import numpy as np
import torch
from torch import nn

from model.cpu import loops as cpu_kernels
from model.dlrm import DLRM
from model.layers.embedding import JointEmbedding
from model.layers.interaction import DotInteraction

PART = 1024  # samples a core has in hand: with official_config, 1 to 2 MB a layer
LEAST = 64  # samples worth a core of their own
MATRICES, LOOKUPS, UPDATE = "MLPs", "look-up + interaction", "update of the tables"


@cache
def _threads(count: int) -> ThreadPoolExecutor:
    """Threads that run torch's operations on one core each."""
    barrier = Barrier(count)

    def begin():
        torch.get_num_threads()  # a thread's first call takes the process's number, and would undo the next line
        torch.set_num_threads(1)
        barrier.wait()

    pool = ThreadPoolExecutor(count, "cpu-step", initializer=begin)
    list(pool.map(lambda _: None, range(count)))
    return pool


@contextmanager
def alone() -> Iterator[int]:
    """Torch's operations of the calling thread on one core; gives the number of cores that there are for the step.

    After an operation on several cores, the threads that torch keeps for those would spin on them for milliseconds,
    beside the threads of the step.
    """
    cores = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield cores
    finally:
        torch.set_num_threads(cores)


def _run(count: int, task: Callable[[int], object]) -> list:
    """[task(0), ... task(count - 1)], each on one core, without autograd; the first one in the calling thread, which
    has to be alone()."""

    def quiet(i: int):
        with torch.no_grad():
            return task(i)

    others = [_threads(count - 1).submit(quiet, i) for i in range(1, count)]
    return [quiet(0), *(other.result() for other in others)]


def _cut(begin: int, end: int, pieces: int) -> list[tuple[int, int]]:
    """begin to end in pieces, equal to within one."""
    size = end - begin
    return [(begin + size * i // pieces, begin + size * (i + 1) // pieces) for i in range(pieces)]


def _bits(tensor: torch.Tensor) -> np.ndarray:
    """A tensor as the kernels take it, bfloat16 as uint16; no copy."""
    return tensor.view(torch.int16).numpy().view(np.uint16) if tensor.dtype == torch.bfloat16 else tensor.numpy()


class _Layers:
    """The linear layers of an MLP: their parameters in the dtype of the matrix products, as of the last refresh()."""

    def __init__(self, mlp: nn.Sequential, dtype: torch.dtype, last_relu: bool):
        self.linears, self.dtype = [layer for layer in mlp if isinstance(layer, nn.Linear)], dtype
        self.sizes = [self.linears[0].in_features, *(linear.out_features for linear in self.linears)]
        self.relu = [True] * (len(self.linears) - 1) + [last_relu]

    def refresh(self) -> None:
        """Once a step: the parameters have changed."""
        self.weights = [linear.weight.detach().to(self.dtype) for linear in self.linears]
        self.biases = [linear.bias.detach().to(self.dtype) for linear in self.linears]


class _Activations:
    """Of an MLP for up to `rows` samples: values, their gradients, and the sums of its parameters' gradients."""

    def __init__(self, layers: _Layers, rows: int):
        self._layers = layers
        self.values, self.grads = (
            [torch.empty(rows, size, dtype=layers.dtype) for size in layers.sizes] for _ in range(2)
        )
        self.sums = [torch.zeros(p.shape) for linear in layers.linears for p in (linear.weight, linear.bias)]

    def forward(self, n: int) -> torch.Tensor:
        """values[0][:n] through all layers; returns the last of them."""
        layers = self._layers
        for k, weight in enumerate(layers.weights):
            x, y = self.values[k][:n], self.values[k + 1][:n]
            if y.dtype == torch.float32:
                torch.mm(x, weight.t(), out=y)
                cpu_kernels.bias_relu(y.numpy(), layers.biases[k].numpy(), layers.relu[k])
                continue
            torch.addmm(layers.biases[k], x, weight.t(), out=y)  # the bias before the sum is rounded
            if layers.relu[k]:
                y.relu_()
        return self.values[-1][:n]

    def backward(self, n: int, to_input: bool) -> torch.Tensor:
        """grads[-1][:n] through all layers, adding to `sums`; returns the input's gradient, if wanted."""
        layers = self._layers
        for k in reversed(range(len(layers.weights))):
            grad, x, y = self.grads[k + 1][:n], self.values[k][:n], self.values[k + 1][:n]
            cpu_kernels.relu_backward(_bits(grad), _bits(y), self.sums[2 * k + 1].numpy(), layers.relu[k])
            if grad.dtype == torch.float32:
                self.sums[2 * k].addmm_(grad.t(), x)
            else:
                self.sums[2 * k].add_(grad.t() @ x)
            if k or to_input:
                torch.mm(grad, layers.weights[k], out=self.grads[k][:n])
        return self.grads[0][:n]


class _Core:
    """One core's memory for parts of up to `rows` samples, and the seconds it spent."""

    def __init__(self, step: "CpuStep", rows: int):
        self.rows, self._loops = rows, step.loops
        self._bottom, self._top = _Activations(step.bottom, rows), _Activations(step.top, rows)
        self.sums = self._bottom.sums + self._top.sums
        self.seconds = dict.fromkeys((MATRICES, LOOKUPS, UPDATE), 0.0)

    def tensors(self) -> list[torch.Tensor]:
        """All that it holds."""
        return [*self.sums, *(t for one in (self._bottom, self._top) for t in (*one.values, *one.grads))]

    def timed(self, part: str, mark: float) -> float:
        """Count the time since `mark`; returns now."""
        now = time.perf_counter()
        self.seconds[part] += now - mark
        return now

    def forward(self, dense: torch.Tensor, table: np.ndarray, index: np.ndarray) -> torch.Tensor:
        """dense [n, N], table float32 [R, D], index int64 [n, T] -> logits [n], in the dtype of the activations."""
        n, mark = len(dense), time.perf_counter()
        self._bottom.values[0][:n] = dense
        bottom = self._bottom.forward(n)
        mark = self.timed(MATRICES, mark)
        self._loops.forward(table, index, _bits(bottom), _bits(self._top.values[0][:n]))
        mark = self.timed(LOOKUPS, mark)
        logits = self._top.forward(n)
        self.timed(MATRICES, mark)
        return logits[:, 0]

    def backward(self, n: int, table: np.ndarray, index: np.ndarray, grad_rows: np.ndarray) -> None:
        """From grad_logits(n), which the caller has filled, after forward() of the same samples: adds to `sums`, fills
        grad_rows float32 [n, T, D]."""
        mark = time.perf_counter()
        grad = self._top.backward(n, True)
        mark = self.timed(MATRICES, mark)
        bottom, grad_bottom = self._bottom.values[-1][:n], self._bottom.grads[-1][:n]
        self._loops.backward(table, index, _bits(bottom), _bits(grad), _bits(grad_bottom), grad_rows)
        mark = self.timed(LOOKUPS, mark)
        self._bottom.backward(n, False)
        self.timed(MATRICES, mark)

    def grad_logits(self, n: int) -> torch.Tensor:
        """The memory for the logits' gradient, [n]."""
        return self._top.grads[-1][:n, 0]


class CpuStep:
    """A model's forward and backward pass and its tables' update, on as many cores as torch has threads.

    half: activations and matrices in bfloat16, as under autocast; gradients are summed in float32 either way. Memory
    beside the model's: the rows' gradients, 4 B T D bytes, and what the cores have in hand.
    """

    def __init__(self, model: DLRM, half: bool):
        self.dtype = dtype = torch.bfloat16 if half else torch.float32
        self._mlps, self._embedding = model.dense_parameters(), model.embedding
        self.bottom, self.top = _Layers(model.bottom, dtype, True), _Layers(model.top, dtype, False)
        shape = len(model.embedding.sizes), model.embedding.dim
        self.loops = cpu_kernels.interaction(*shape, model.config.self_interaction)
        self._cores: list[_Core] = []
        self._grad_rows = np.empty((0, *shape), np.float32)

    @staticmethod
    def takes(model: DLRM) -> bool:
        """Whether the model is one for this step: float32 on the CPU, dot interaction, tables updated in backward."""
        return (
            type(model.embedding) is JointEmbedding
            and type(model.interaction) is DotInteraction
            and all(p.dtype == torch.float32 and p.device.type == "cpu" for p in model.parameters())
        )

    def _begin(self, batch, cores: int) -> tuple[np.ndarray, np.ndarray]:
        """Get ready for a batch on up to so many cores. Returns the table float32 [R, D] and the batch's index int64
        [B, T] into it; raises ConfigError for an id beyond its table."""
        rows = len(batch.sparse)
        count = max(1, min(cores, rows // LEAST))
        part = min(PART, -(-rows // count))
        if len(self._cores) != count or self._cores[0].rows < part:
            self._cores = [_Core(self, part) for _ in range(count)]
        self.bottom.refresh()
        self.top.refresh()
        table, index = self._embedding.weight.detach(), self._embedding.rows(batch.sparse)
        return table.numpy(), index.view(batch.sparse.shape).numpy()

    def _parts(self, core: int, rows: int) -> list[tuple[int, int]]:
        """The parts of a batch that a core takes: as even as can be, and the same in every run."""
        begin, end = _cut(0, rows, len(self._cores))[core]
        return _cut(begin, end, -(-(end - begin) // PART))

    def logits(self, batch) -> torch.Tensor:
        """Logits float32 [B]."""
        with alone() as cores:
            table, index = self._begin(batch, cores)
            found = torch.empty(len(index))

            def share(i: int) -> None:
                for begin, end in self._parts(i, len(index)):
                    found[begin:end] = self._cores[i].forward(batch.dense[begin:end], table, index[begin:end])

            _run(len(self._cores), share)
        return found

    def gradients(self, batch) -> torch.Tensor:
        """Put the MLPs' gradients of the mean loss into .grad, and let the tables take their step; returns the loss."""
        with alone() as cores:
            table, index = self._begin(batch, cores)
            return self._gradients(batch, table, index)

    def _gradients(self, batch, table: np.ndarray, index: np.ndarray) -> torch.Tensor:
        rows, label = len(index), batch.label.numpy()
        if len(self._grad_rows) < rows:
            self._grad_rows = np.empty((rows, *self._grad_rows.shape[1:]), np.float32)
        grad_rows = self._grad_rows[:rows]

        def share(i: int) -> float:
            core, total = self._cores[i], 0.0
            torch._foreach_zero_(core.sums)
            for begin, end in self._parts(i, rows):
                logits = core.forward(batch.dense[begin:end], table, index[begin:end])
                grad = _bits(core.grad_logits(end - begin))
                total += cpu_kernels.loss(_bits(logits), label[begin:end], 1 / rows, grad)
                core.backward(end - begin, table, index[begin:end], grad_rows[begin:end])
            return total

        losses = _run(len(self._cores), share)
        first, *others = (core.sums for core in self._cores)
        for other in others:
            torch._foreach_add_(first, other)
        for parameter, total in zip(self._mlps, first, strict=True):
            parameter.grad = total
        self._update(table, index.reshape(-1), grad_rows.reshape(-1, table.shape[1]))
        return torch.tensor(sum(losses) / rows if rows else float("nan"))

    def _update(self, table: np.ndarray, index: np.ndarray, grad: np.ndarray) -> None:
        embedding, cores = self._embedding, self._cores
        mark = time.perf_counter()
        if embedding.optimizer.name == "sgd":
            lr = np.float32(embedding.lr.item())
            _run(len(cores), lambda i: cpu_kernels.sgd(table, index, grad, lr, i, len(cores)))
        else:
            embedding.update(torch.from_numpy(index), torch.from_numpy(grad))
        cores[0].timed(UPDATE, mark)

    @property
    def memory(self) -> int:
        """Bytes that it holds beside the model."""
        tensors = [tensor for core in self._cores for tensor in core.tensors()]
        return self._grad_rows.nbytes + sum(tensor.nbytes for tensor in tensors)

    def seconds(self) -> dict[str, float]:
        """Wall-clock seconds by part since the last call; the mean of the cores."""
        cores = self._cores
        found = {part: sum(core.seconds[part] for core in cores) / len(cores) for part in (MATRICES, LOOKUPS)}
        found[UPDATE] = cores[0].seconds[UPDATE]
        for core in cores:
            core.seconds = dict.fromkeys(core.seconds, 0.0)
        return found
