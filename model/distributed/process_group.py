"""The processes that train together: who they are, and what they say to each other (torch.distributed)."""

import atexit
import datetime
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.distributed.nn  # else by optimisers, later: its functions would then refer to the group there is, for good

from model.config import ConfigError

BACKENDS = ("auto", "nccl", "gloo")
# How long a collective may take before it is given up. Faults are noticed long before (heartbeat.py).
PATIENCE = datetime.timedelta(minutes=30)


@dataclass
class Groups:
    """The ranks, several times: for ids sent ahead, and for words between hosts (always gloo) in the main thread and in
    the one that writes checkpoints, so that each queues behind nothing else. Held here alone, as they end when nothing
    refers to them."""

    ids: dist.ProcessGroup | None
    control: dist.ProcessGroup | None
    saving: dist.ProcessGroup | None


@dataclass(frozen=True)
class Ranks:
    """rank of world processes; device: this one's; words: which of the groups everyone() and what builds on it use."""

    rank: int
    world: int
    device: torch.device
    groups: Groups
    words: str = "control"

    def all_to_all(
        self, received: torch.Tensor, sent: torch.Tensor, received_sizes: list[int], sent_sizes: list[int],
        ids: bool = False,
    ):  # fmt: skip
        """Start the exchange of flat tensors, cut by rank as the sizes say; returns what has wait()."""
        group = self.groups.ids if ids else None
        return dist.all_to_all_single(received, sent, received_sizes, sent_sizes, group=group, async_op=True)

    def all_reduce(self, tensor: torch.Tensor, wait: bool = True):
        """Sum over all ranks, in place; without `wait`, returns what has wait()."""
        work = dist.all_reduce(tensor, async_op=True)
        if wait:
            work.wait()
        return work

    def all_max(self, tensor: torch.Tensor):
        """Start the maximum over all ranks of a tensor on the host, in place; returns what has wait()."""
        return dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.groups.control, async_op=True)

    def everyone(self, value) -> list:
        """Each rank's value (small, of plain types), by rank, on every rank."""
        found = [None] * self.world
        dist.all_gather_object(found, value, group=getattr(self.groups, self.words))
        return found

    def check_same(self, values: dict[str, object], what: str, remedy: str) -> None:
        """Raise ConfigError, on every rank that has others than rank 0, where the values (small, of plain types) by
        name are not the same on all ranks. All ranks call it together."""
        found = self.everyone(values)
        keys = [key for key in sorted(found[0].keys() | values.keys()) if found[0].get(key) != values.get(key)]
        if keys:
            words = "; ".join(f"{key}: {values.get(key)} here, {found[0].get(key)} on rank 0" for key in keys)
            raise ConfigError(f"{what}: {words}; {remedy}")

    def first(self, value):
        """Rank 0's value, on every rank."""
        return self.everyone(value if self.rank == 0 else None)[0]

    def end(self) -> None:
        """Nothing is sent any more; call it once all ranks have come here (everyone()).

        destroy_process_group() leaves gloo's threads at work as long as anything refers to a group. One of them that
        lets go of a last tensor while Python shuts down is ended by Python, and the process by "terminate called
        without an active exception"; without references, the threads end here."""
        if dist.is_initialized():
            dist.destroy_process_group()
        self.groups.ids = self.groups.control = self.groups.saving = None


def choose_device(name: str) -> torch.device:
    """This process's device: for "auto" and "cuda" the GPU with its local number. Raises ConfigError where it is
    missing."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    local, found = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if local >= found:
        raise ConfigError(
            f"--device cuda: local rank {local} has no GPU of its own, torch finds {found}; start "
            f"--nproc_per_node={found or 1} ranks on this machine, or use --device cpu"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def join(backend: str, device: torch.device, store: dist.Store | None = None) -> Ranks:
    """Find the other processes, as torchrun's environment says, by its store; alone where there is none of it."""
    if backend == "auto":
        backend = "nccl" if device.type == "cuda" else "gloo"
    if backend == "nccl" and device.type != "cuda":
        raise ConfigError("--backend nccl: works on GPUs only; use --backend gloo, or --device cuda")
    bound = {"device_id": device} if backend == "nccl" else {}
    if "RANK" in os.environ:
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group(backend, timeout=PATIENCE, store=store, rank=rank, world_size=world, **bound)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, **bound)
    groups = Groups(*(dist.new_group(backend=name, timeout=PATIENCE) for name in (backend, "gloo", "gloo")))
    found = Ranks(dist.get_rank(), dist.get_world_size(), device, groups)
    if found.world == 1:  # after an error too; with others, to wait for what is under way could be for ever
        atexit.register(found.end)
    return found
