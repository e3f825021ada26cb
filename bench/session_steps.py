"""The steps of bench/gpu_session.sh by stage, as commands."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gpu_etl.common.packages import is_there

DAYS = 8  # synthetic days are written by a thread each


@dataclass(frozen=True)
class Session:
    """What a session is about: device "cuda" or "cpu", synthetic rows, seconds of each measurement of a training step;
    data: folder of the days and data sets; out: of the results."""

    device: str
    rows: int
    seconds: float
    data: Path
    out: Path
    gpus: int = 1

    @property
    def on_gpu(self) -> bool:
        """Whether this is more than a trial of the steps."""
        return self.device == "cuda"

    @property
    def batch_size(self) -> int:
        """Of a training run: some 2,000 steps an epoch, so that neither launches nor steps are too few to learn by."""
        return 1 << max(7, min(14, (self.rows // 2000).bit_length()))

    @property
    def set(self) -> Path:
        """The data set to train on."""
        return self.data / "set_cpu"


@dataclass(frozen=True)
class Step:
    """words: behind `python`; seconds: more than it should take on an H100; makes: what else it leaves, and others
    need; clear: a folder in Session.data that goes first."""

    name: str
    words: tuple[object, ...]
    seconds: int = 120
    makes: Path | None = None
    clear: Path | None = None


def _days(one: Session) -> list[Path]:
    return [one.data / "days" / f"day_{day}" for day in range(DAYS)]


def _encode(one: Session, device: str) -> Step:
    out = one.data / f"set_{device}"
    words = "-m", "gpu_etl", "encode", *_days(one), "--out", out, "--device", device
    return Step(f"encode_{device}", words, 120, out / "manifest.json", out)


def data(one: Session) -> list[Step]:
    """Days and data set, which most stages need."""
    words = "-m", "gpu_etl", "synth", "--rows", one.rows, "--days", DAYS, "--no-gzip", "--out", one.data / "days"
    return [Step("synth", words, 90, one.data / "days" / "truth.json"), _encode(one, "cpu")]


def correct(one: Session) -> list[Step]:
    """Does everything compute what it should?"""
    side_by_side = ("-n", 4) if one.on_gpu and is_there("xdist") else ()  # most tests compile kernels of their own
    return [
        Step("doctor", ("-m", "gpu_etl", "doctor", "--out", one.data), 240),
        Step("pytest", ("-m", "pytest", "-m", "gpu", *side_by_side), 300),
    ]


def etl(one: Session) -> list[Step]:
    """Text to data set."""
    steps = data(one)
    if one.on_gpu:
        steps += [
            _encode(one, "cuda"),
            Step("same_bytes", ("-m", "bench.same_bytes", one.data / "set_cpu", one.data / "set_cuda")),
        ]
    rows = ("--rows", min(one.rows, 1 << 18))
    return [
        *steps, Step("slab", ("-m", "bench", "slab", "--device", one.device, *rows)),
        Step("etl", ("-m", "bench", "etl", "--rows", one.rows, "--repeat", 2, "--device", one.device), 260),
    ]  # fmt: skip


def load(one: Session) -> list[Step]:
    """Data set to batches."""
    rows = min(one.rows, 4_000_000)
    words = "--rows", rows, "--device", one.device, *(() if one.on_gpu else ("--batch_size", 2048, "--repeat", 1))
    return [Step("load", ("-m", "bench", "load", *words, "--step_batch_size", 65536 if one.on_gpu else 512), 420)]


def _training(one: Session) -> tuple[object, ...]:
    return (
        "--dataset", one.set, "--model_config", "criteo_kaggle_tiny", "--device", one.device, "--batch_size",
        one.batch_size, "--optimizer", "adam", "--lr", 0.002, "--embedding_optimizer", "rowwise_adagrad",
        "--embedding_lr", 0.05, "--warmup_steps", 100, "--auc_threshold", 1,
    )  # fmt: skip


def train(one: Session) -> list[Step]:
    """The training step: its speed beside peers and limits, whole runs in one process and by ranks."""
    sizes = (2048, 16384, 65536) if one.on_gpu else (256,)
    timed = "--device", one.device, "--seconds", one.seconds
    shapes = "--batch_size", *sizes, *(() if one.on_gpu else ("--table_gib", 0.1))
    speed = [
        Step(f"train_{name}", ("-m", "bench", "train", "--model_config", name, *shapes, *timed), 200)
        for name in ("mlperf_40m.limit", "official_config")
    ]
    launch = "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={one.gpus}", "dist_train.py"
    ways = {"learn": ("train.py",), "dist": launch} | ({"learn_graphs": ("train.py",)} if one.on_gpu else {})
    runs = []
    for name, script in ways.items():
        folder, more = one.data / "runs" / name, ("--cuda_graphs",) if name == "learn_graphs" else ()
        words = *script, *_training(one), *more, "--output_dir", folder
        runs.append(Step(name, words, 120, clear=folder))
    scaling = "--world", 1, "--batch_size", sizes[-1], "--model_config", "official_config"
    return [*speed, *data(one), *runs, Step("scaling", ("-m", "bench", "scaling", *scaling, *timed), 120)]


def profile(one: Session) -> list[Step]:
    """Where the time goes: the step's kernels one by one, traces of steps, the encoder's functions on the host."""
    kernels = ("mlperf_10m.limit", 65536) if one.on_gpu else ("criteo_kaggle_tiny", 256)
    steps = [
        Step(f"step_kernels_{dtype}", ("-m", "bench", "step_kernels", "--model_config", kernels[0], "--batch_size",
                                       kernels[1], "--embedding_dtype", dtype))
        for dtype in ("float32", "bfloat16")
    ]  # fmt: skip
    steps += data(one)
    shape = "--model_config", "official_config", "--batch_size", min(kernels[1], max(64, one.rows // 8))
    folder, out = one.out / "profile", one.data / "profiled"
    ways = {"eager": (), "graphs": ("--cuda_graphs",)} if one.on_gpu else {"eager": ()}
    for name, more in ways.items():
        words = "train.py", "--dataset", one.set, *shape, "--device", one.device, "--profile_steps", 8, *more
        steps.append(Step(f"steps_{name}", (*words, "--output_dir", folder / name), 120, folder / name / "trace.json"))
    words = "-m", "cProfile", "-o", folder / "encode.pstats", "-m", "gpu_etl", "encode", *_days(one), "--out", out
    return [*steps, Step("encode", (*words, "--device", one.device), 120, folder / "encode.pstats", out)]


STAGES: dict[str, Callable[[Session], list[Step]]] = {
    "correct": correct, "etl": etl, "load": load, "train": train, "profile": profile
}  # fmt: skip
