"""Train a DLRM on many GPUs, or on many processes of CPUs: embeddings in pieces by ranks, MLPs copied to all.

    torchrun --nproc_per_node=8 dist_train.py --model_config official_config --dataset DIR --lr 0.1 \\
        --batch_size 2048 ...                                             (the flags of train.py; batches are global)

    python -m torch.distributed.launch --use_env --nproc_per_node 8 dist_train.py ...     (as older READMEs write it)

    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29400 --max-restarts=3 \\
        dist_train.py --save_minutes 10 ...   (on each of two machines, which share DIR and --output_dir)

The loss curve is that of train.py with the same flags, and checkpoints are interchangeable, whatever the number of
ranks. Started again by torchrun after a fault, it goes on from the latest checkpoint in --output_dir. Rank 0 writes
words and progress to stderr and, as the last line of stdout, one JSON object. Exit status as of train.py's.
"""

import argparse
import contextlib
import os
import sys
import traceback
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

import train
from common.numbers import number, whole
from gpu_etl.load.identity import sample
from model import memory
from model.checkpoint import files as checkpoint, runs
from model.checkpoint.manager import CheckpointManager
from model.checkpoint.state import State
from model.cli import flags, options
from model.cli.parser import Boolean
from model.config import ConfigError, ModelConfig
from model.distributed.heartbeat import FailureDetector
from model.distributed.process_group import BACKENDS, choose_device, join
from model.distributed.trainer import RankCheckpointManager, RankLoader, RankTrainer, make_model
from model.dlrm import DLRM
from model.layers.embedding import Storage
from model.layers.optimizers import Optimizer
from model.outcome import StoppedError, explain, say, sigterm_raises, tell
from model.planner import placement
from model.planner.cost_model import MACHINES, Job
from model.planner.plan import Plan, read_plan
from model.planner.report import show

WIRES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Flags that ranks need not have in common: paths on their machine, what is theirs to choose, what only rank 0 uses.
RANKS_OWN = {"dataset", "model_config", "ckpt", "local_rank", "log_dir", "mlperf_log", "plan", "save_plan", "memory",
             "loader", "cache", "prefetch", "threads"}  # fmt: skip
STARTED = ".started"  # in --output_dir: this run may go on from the checkpoints there
MEMORY_SHARE = 0.9  # of what is free, for the plan; the rest is for what it does not know of


def build_parser() -> argparse.ArgumentParser:
    """The flags of train.py, and those of many ranks."""
    parser = flags.build_parser(__doc__)
    group = parser.add_argument_group("many ranks")
    group.add_argument(
        "--backend", default="auto", choices=BACKENDS, help="nccl on GPUs, gloo on CPUs (default: by the device)"
    )
    group.add_argument("--cache_eval_data", action=Boolean, default=False, help="keep the test batches on the device")
    group.add_argument("--plan", type=Path, metavar="FILE", help="place tables by this plan (default: make one)")
    group.add_argument("--save_plan", type=Path, metavar="FILE", help="write the plan, to be edited and given back")
    group.add_argument(
        "--wire_dtype", default="fp32", choices=sorted(WIRES), help="of vectors and gradients sent (default: fp32)"
    )
    group.add_argument(
        "--memory", type=number(above=True), metavar="GB",
        help="of a rank, for the plan (default: 90 %% of what is free)",
    )  # fmt: skip
    # torch.distributed.launch's:
    group.add_argument("--local_rank", "--local-rank", type=whole(0), help=argparse.SUPPRESS)
    return parser


class RankSession(train.Session):
    """One rank's data, model and trainer."""

    less_memory = "start more ranks, lower --batch_size, or move tables to other ranks (--save_plan, --plan)"

    def __init__(self, args: argparse.Namespace, store: dist.Store | None):
        self._store, self._kept = store, {}
        super().__init__(args)

    def join(self) -> torch.device:
        """Meet the other ranks; rank 0 says which checkpoint to go on from, and alone writes logs."""
        args, device = self.args, choose_device(self.args.device)
        self.ranks = join(args.backend, device, self._store)
        # What each rank has for itself may differ; all else shapes the steps, or the order in which ranks meet.
        shared = {f"--{name}": str(value) for name, value in vars(args).items() if name not in RANKS_OWN}
        shared["torch"] = torch.__version__
        self.ranks.check_same(shared, "not the flags of rank 0", "start all ranks with the same ones")
        args.ckpt = self.ranks.first(args.ckpt)
        if self.ranks.rank:
            args.log_dir = args.mlperf_log = None
        if args.profile_steps:
            args.output_dir = args.output_dir / f"rank_{self.ranks.rank}"
        return device

    def make_model(self, config: ModelConfig, tables: Optimizer) -> DLRM:
        """The model, this rank's part of its tables. Raises PlanError where it does not fit, before it is made."""
        args, ranks = self.args, self.ranks
        if options.storage(args) != Storage():
            raise ConfigError(
                "--embedding_dtype, --stochastic_rounding, --table_placement: expected train.py; the tables of several "
                "ranks are float32 on their devices"
            )
        self.check_same_data(config)
        half = args.amp or args.fp16 or (args.fp16 is None and self.device.type == "cuda")
        job = Job(config, args.batch_size, tables.name, placement.WIRES[args.wire_dtype], 2 if half else 4)
        self.plan = ranks.first(self.make_plan(job) if ranks.rank == 0 else self.machine() and None)
        self.plan.check(config, ranks.world, tables.name, f"--plan {args.plan}")
        torch.manual_seed(args.seed)
        return make_model(config, self.plan, ranks, tables, WIRES[args.wire_dtype], args.use_embedding_ext)

    def make_plan(self, job: Job) -> Plan:
        """The plan by --plan, or the best one; shown, and checked to fit."""
        args, machine = self.args, self.machine()
        plan = read_plan(args.plan) if args.plan else placement.make_plan(job, self.ranks.world, machine)
        plan.check(job.config, self.ranks.world, job.optimizer, f"--plan {args.plan}")
        placement.check_memory(plan, job, machine)
        say(show(plan, job, machine))
        if args.save_plan:
            plan.write(args.save_plan)
        return plan

    def machine(self):
        """What the ranks run on, for the plan: the memory of the one that has least. All ranks call it together."""
        name = "cpu"
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info()
            card = torch.cuda.get_device_name().lower()
            name = next((known for known in MACHINES if known in card), "h100")
        else:
            local_world = int(os.environ.get("LOCAL_WORLD_SIZE", self.ranks.world))
            free = memory.available(self.device) / local_world
        free = 1e9 * self.args.memory if self.args.memory else MEMORY_SHARE * free
        return replace(MACHINES[name], memory=min(self.ranks.everyone(free)))

    def check_same_data(self, config: ModelConfig) -> None:
        """Raise ConfigError where a rank sees other data, or another model, than rank 0 does."""
        found = {split: source.rows for split, source in self.data.splits.items()}
        if self.data.manifest:
            found |= {name: file.get("sha256") for name, file in self.data.manifest.files.items()}
        found |= {f"bytes of {split}": sample(source.paths) for split, source in self.data.splits.items()}
        what = f"{self.data.folder}: not the data set that rank 0 sees"
        self.ranks.check_same(found, what, "(rows, or checksums) give all ranks the same files")
        model = {key: list(value) if isinstance(value, tuple) else value for key, value in config.to_json().items()}
        self.ranks.check_same(model, "not the model that rank 0 has", "give all ranks the same --model_config")

    def make_trainer(self, *settings) -> RankTrainer:
        """What trains this rank's share of batches."""
        return RankTrainer(self.ranks, *settings)

    def load(self, split: str, batch_size: int, *order) -> RankLoader:
        """A loader of this rank's share of a split's batches."""
        if split in self._kept:
            return self._kept[split]
        loader = super().load(split, batch_size, *order, rank=self.ranks.rank, world=self.ranks.world)
        keep = self.args.cache_eval_data and split != "train"
        found = RankLoader(loader, self.trainer.model.embedding, batch_size, loader.source.rows, keep)
        if keep:
            self._kept[split] = found
        return found

    def restore(self, folder: Path) -> State:
        """Go on where a checkpoint is, written by any number of ranks."""
        return checkpoint.restore(folder, self.trainer, self.ranks)

    def plan_run(self) -> runs.Run:
        """Who this run is: rank 0 says."""
        return self.ranks.first(super().plan_run() if self.ranks.rank == 0 else None)

    def claim(self, run: runs.Run, must_lock: bool) -> runs.Run:
        """Rank 0 makes the run's folder its own."""
        return self.ranks.first(super().claim(run, must_lock) if self.ranks.rank == 0 else None)

    def fill(self) -> None:
        """Take the weights of --ckpt."""
        checkpoint.load(self.args.ckpt, self.trainer.model, self.ranks)

    def keep(self, *settings) -> CheckpointManager:
        """What writes checkpoints, all ranks together."""
        return RankCheckpointManager(self.ranks, *settings)


def prepare(args: argparse.Namespace) -> None:
    """Raise ConfigError for what only one process can do, and settle where a run that is started again goes on."""
    if args.mode not in ("train", "test") and not args.test_only:
        raise ConfigError(f"--mode {args.mode}: works in one process; use train.py, which reads the same checkpoints")
    if int(os.environ.get("RANK", 0)) or not int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
        return
    # A run that is started again must not take an earlier run's checkpoints for its own: the first start leaves a mark.
    mark, found = args.output_dir / STARTED, checkpoint.latest(args.output_dir)
    restarts = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if restarts and mark.exists():
        args.ckpt = found or args.ckpt
        say(f"started again, time {restarts}")
        return
    mark.unlink(missing_ok=True)
    if found and not args.ckpt:
        raise ConfigError(
            f"--output_dir {args.output_dir}: holds {found.name} of an earlier run, which this one would go on "
            "from after a fault; name another folder, or --ckpt auto to go on with that run"
        )
    args.output_dir.mkdir(parents=True, exist_ok=True)
    mark.touch()


def run(args: argparse.Namespace, watch: FailureDetector | None, store: dist.Store | None) -> None:
    """Do what the flags say, as one of many; rank 0 prints the result."""
    prepare(args)
    sessions = []

    def make_session(args: argparse.Namespace) -> RankSession:
        sessions.append(RankSession(args, store))
        return sessions[0]

    try:
        result = train.run(args, make_session)
    except StoppedError:
        part(sessions[0], watch)
        raise
    session = sessions[0]
    if session.ranks.rank == 0:
        more = {"command": "dist_train", "world": session.ranks.world, "placement": session.plan.kinds()}
        tell({**result, **more})
    part(session, watch)


def part(session: RankSession, watch: FailureDetector | None) -> None:
    """All ranks are done: nobody is missed from here on."""
    if watch:
        watch.end()
    session.ranks.everyone(None)
    session.ranks.end()


def main(argv: list[str] | None = None) -> int:
    """Parse the flags and run; returns the exit status."""
    args = train.parse(build_parser(), argv)
    watch, store = FailureDetector.of_environment()
    if watch:
        watch.hold_off_sigterm()
    quiet = open(os.devnull, "w") if int(os.environ.get("RANK", 0)) else None  # noqa: SIM115 - until the end
    try:
        with contextlib.redirect_stderr(quiet) if quiet else sigterm_raises():
            run(args, watch, store)
    except StoppedError as stopped:
        if not quiet:
            say(str(stopped))
        return stopped.status
    except BaseException as error:
        if args.debug:
            traceback.print_exception(error)
        found = explain(error, train.EXPECTED, RankSession.less_memory)
        if watch and found:
            watch.failed(*found)
        if watch and isinstance(error, Exception):
            watch.broken(error)
        if not found:
            raise
        with contextlib.suppress(OSError):  # nobody may be there to read it
            say(found[1])
        return found[0]
    return 0


if __name__ == "__main__":
    sys.exit(main())
