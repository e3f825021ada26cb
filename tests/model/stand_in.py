"""A GPU that is not there: tensors that say they lie on it, with their numbers on the CPU, so that the host code of
training runs as it would, and what it must not do is found.

Every operation on such a tensor comes through run(), which refuses what CUDA refuses (tensors of two devices, waiting
inside a graph's recording) and notes as faults what would be slow or wrong: copies from memory that is not pinned, the
host waiting for the device, streams that touch the same memory without an order, memory given away while a stream still
uses it. stand_in_cuda.py has streams, events and graphs; Triton's kernels run in its interpreter.

Not seen here: what kernels of CUDA do, their types inside, timing, and what only C++ asks for (streams of autograd).
"""

import torch
from torch import is_tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from tests.model.stand_in_machine import MACHINE

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
aten = torch.ops.aten
COPIES = {aten.copy_.default, aten._to_copy.default}
# Operations whose result's shape or value the host needs.
WAITS = {
    "_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive",
    "unique_dim_consecutive", "equal", "bincount", "repeat_interleave", "_coalesce", "is_nonzero", "histc",
}  # fmt: skip
ONE_BLOCK = {"cummax", "cummin"}  # milliseconds for a batch's look-ups: scans along one row, which one block does
RANDOM = {"uniform_", "normal_", "random_", "bernoulli_", "exponential_"}  # drawn by the generator of the GPU


class OnDevice(torch.Tensor):
    """A tensor that says it lies on the GPU; elem: its numbers. To torch's C++ it is one on the CPU."""

    @staticmethod
    def __new__(cls, elem: torch.Tensor):
        """Wrap a CPU tensor."""
        made = torch.Tensor._make_wrapper_subclass(
            cls, elem.size(), strides=elem.stride(), storage_offset=elem.storage_offset(), dtype=elem.dtype,
            layout=elem.layout, device=CPU, requires_grad=False,
        )  # fmt: skip
        made.elem = elem
        MACHINE.made(made)
        return made

    device, is_cuda, is_cpu = property(lambda self: CUDA), property(lambda self: True), property(lambda self: False)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """See run()."""
        return run(func, args, kwargs or {})

    def __repr__(self, **_):
        return f"OnDevice({self.elem!r})"

    def to(self, *args, copy: bool = False, **kwargs):
        """torch's, which must not take this for a tensor on the CPU."""
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None and device.type == "cpu":
            return self.cpu() if dtype is None else self.cpu().to(dtype)
        if dtype in (None, self.dtype) and not copy:
            return self
        return torch.Tensor.to(self, dtype or self.dtype, copy=copy)

    def cpu(self):
        """A copy on the host, which waits for it."""
        MACHINE.waits("copy to the host")
        return self.detach().elem.clone()

    def tolist(self):
        """Waits."""
        return self.cpu().tolist()

    def numpy(self, *_, **__):
        """Refused, as by torch."""
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")

    def record_stream(self, stream) -> None:
        """The memory is not given away before that stream's work of now is done."""
        MACHINE.memory[self.elem.untyped_storage().data_ptr()].recorded.add(stream.number)


class Mode(TorchDispatchMode):
    """Sees to it that what is made on the GPU is OnDevice."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """See run()."""
        return run(func, args, kwargs or {})


class Functions(TorchFunctionMode):
    """Those that ask C++ for the GPU before they come to run()."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """The function itself, but for that."""
        kwargs = kwargs or {}
        if func is torch.tensor and torch.device(kwargs.get("device") or "cpu").type == "cuda":
            return run(aten._to_copy.default, (func(*args, **{**kwargs, "device": CPU}),), {"device": CUDA})
        if func is torch.Tensor.to and not isinstance(args[0], OnDevice):
            device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args[1:], **kwargs)
            if device is not None and device.type == "cuda":
                there = run(aten._to_copy.default, args[:1], {"device": CUDA, "non_blocking": non_blocking})
                return there if dtype is None else there.to(dtype)
        before, MACHINE.local.backward = getattr(MACHINE.local, "backward", False), (
            func is torch.Tensor.backward and isinstance(args[0], OnDevice)
        )  # fmt: skip
        try:
            return func(*args, **kwargs)
        finally:
            MACHINE.local.backward = before


def run(func, args, kwargs):
    """An operation, on the numbers behind the tensors."""
    with MACHINE.lock:
        if func is aten._to_copy.default and isinstance(args[0], OnDevice):
            # Autograd's way back from a cast names the device that C++ knows; a user's .cpu() is above.
            kwargs = {name: value for name, value in kwargs.items() if name != "device"}
        blocks = func in COPIES and _check_copy(func, args, kwargs)
        flat, _ = tree_flatten((args, kwargs))
        ours = [x for x in flat if isinstance(x, OnDevice)]
        device = kwargs.get("device")
        on_device = bool(ours) if device is None else torch.device(device).type == "cuda"
        if getattr(MACHINE.local, "backward", False) and all(isinstance(x, OnDevice) for x in flat if is_tensor(x)):
            on_device = True  # made by C++ for a gradient, on the device that it knows
        if ours and func not in COPIES:
            _check(func, flat)
        if func is aten.is_pinned.default:
            return MACHINE.is_pinned(args[0])
        if func is aten._pin_memory.default:
            return MACHINE.pin(args[0].clone())
        wrappers = {id(x.elem): x for x in ours}
        plain_args, plain = tree_map(_plain, (args, kwargs))
        name = func.overloadpacket.__name__
        if on_device and name in RANDOM and plain.get("generator") is None:
            plain["generator"] = MACHINE.generator
        pinned = plain.pop("pin_memory", False)
        if not (on_device or ours):
            found = func(*plain_args, **plain)
            return MACHINE.pin(found) if pinned else found

        def work():
            return func(*plain_args, **plain)

        written = _written(func, plain_args, plain)
        if MACHINE.recording:
            MACHINE.capture.before(written)
        found = work()
        outputs = [x for x in tree_flatten(found)[0] if isinstance(x, torch.Tensor)] if on_device else []
        fresh = [x for x in outputs if id(x) not in wrappers]
        wrapped = tree_map(
            lambda x: wrappers.get(id(x)) if id(x) in wrappers else OnDevice(x)
            if isinstance(x, torch.Tensor) and on_device else x, found
        )  # fmt: skip
        inputs = {x.elem.untyped_storage().data_ptr() for x in ours}
        views = bool(fresh) and all(x.untyped_storage().data_ptr() in inputs for x in fresh) and not written
        if not views:
            new = [x for x in fresh if x.untyped_storage().data_ptr() not in inputs]
            MACHINE.touch([x.elem for x in ours], written + new, str(func))
            if blocks:
                MACHINE.order.all_streams_wait_for_stream(MACHINE.stream)
            if MACHINE.recording:
                MACHINE.capture.note(work, new, on_device)
        return wrapped


def _plain(x):
    if isinstance(x, OnDevice):
        return x.elem
    return CPU if isinstance(x, torch.device) and x.type == "cuda" else x


def _written(func, args, kwargs) -> list[torch.Tensor]:
    """The tensors among the arguments that the operation changes."""
    found = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            found += [x for x in tree_flatten(value)[0] if isinstance(x, torch.Tensor)]
    return found


def _check(func, flat: list) -> None:
    """Tensors of one device, but for scalars; and no waiting."""
    strangers = [x for x in flat if isinstance(x, torch.Tensor) and not isinstance(x, OnDevice) and x.dim()]
    name = func.overloadpacket.__name__
    if strangers and func.namespace == "aten":
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! ({func})"
        )
    masks = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
        isinstance(x, OnDevice) and x.dtype in (torch.bool, torch.uint8) for x in flat[1:]
    )
    if name in ONE_BLOCK and MACHINE.steady:
        MACHINE.found("one block", str(func))
    if name in WAITS or masks:
        MACHINE.waits(str(func))


def _check_copy(func, args, kwargs) -> bool:
    """Copies between host and device; returns whether the host waits for it."""
    if func is aten.copy_.default:
        to, source = args[:2]
        blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
    else:
        source, to = args[0], None
        blocking = not kwargs.get("non_blocking", False)
    device = kwargs.get("device")
    onto = isinstance(to, OnDevice) if to is not None else (
        isinstance(source, OnDevice) if device is None else torch.device(device).type == "cuda"
    )  # fmt: skip
    if onto and not isinstance(source, OnDevice):
        if not MACHINE.is_pinned(source):
            if MACHINE.recording:
                raise RuntimeError("CUDA error: operation not permitted when stream is capturing (pageable copy)")
            if MACHINE.steady:
                MACHINE.found("pageable", f"{func} of {source.numel()} numbers")
        elif blocking:
            MACHINE.waits(f"{func} that blocks")
        return blocking
    if not onto and isinstance(source, OnDevice) and (blocking or to is None or not MACHINE.is_pinned(to)):
        MACHINE.waits(f"{func} to the host")
    return False
