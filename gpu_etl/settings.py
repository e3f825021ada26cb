"""What an encode is asked to do."""

from dataclasses import asdict, dataclass

from gpu_etl import formats, packages
from gpu_etl.bad_rows import BadRows
from gpu_etl.errors import DataError
from gpu_etl.schema import PRESETS, Preset

MIN_SLAB_BYTES = 1 << 10
MAX_TIMEOUT = 1_000_000  # seconds
MOST_SLAB_BYTES = 1 << 40
MOST_THREADS = 1024
MOST_DAYS = 10_000
SEEDS = -(2**63), 2**64 - 1


def without_bad_rows(shaping: dict) -> dict:
    """Settings.shaping() but for what is done about bad rows."""
    return {name: value for name, value in shaping.items() if name != "bad_rows"}


@dataclass(frozen=True)
class Settings:
    """Everything that shapes the encoded bytes, and what does not: device, threads, workers, scheduler, slab_bytes,
    memory_limit, keep_on_device, max_bad_rows, dashboard_address, security, worker_timeout.

    days: cut the one input file into so many days; 0: every file is a day. fractions: shares of all rows that train,
    test and validate, in file order, instead of halving the last day. form: one of formats.FORMS. bad_rows: "error" or
    "skip", up to max_bad_rows. threads: of the CPU, 0 for all cores. workers, scheduler: spread the days over so many
    processes of this machine, or over those of a Dask scheduler (see cluster.py). dashboard_address: of the former,
    "" for a free port of 127.0.0.1; security: TLS of either (see cluster_start.py); worker_timeout: seconds in which a
    worker must come, and be heard of where no task ends. slab_bytes: of text held at
    a time, 0 for what suits the device. memory_limit: bytes of device memory, 0 for no limit. keep_on_device: with
    "cuda", leave coded rows there between the passes where they fit.
    """

    preset: Preset = PRESETS["count"]
    days: int = 0
    fractions: tuple[float, ...] = ()
    shuffle: bool = True
    seed: int = 0
    form: str = "records"
    bad_rows: str = "error"
    max_bad_rows: int = 1000
    device: str = "auto"
    threads: int = 0
    workers: int = 0
    scheduler: str = ""
    dashboard_address: str = ""
    security: str = ""
    worker_timeout: float = 120.0
    slab_bytes: int = 0
    memory_limit: int = 0
    keep_on_device: bool = True

    def check(self, inputs: int) -> None:
        """Raise DataError where a setting is out of range or does not fit the number of input files."""
        self.preset.check()
        if self.slab_bytes and not MIN_SLAB_BYTES <= self.slab_bytes <= MOST_SLAB_BYTES:
            raise DataError(f"--slab-bytes: expected {MIN_SLAB_BYTES} to {MOST_SLAB_BYTES}, got {self.slab_bytes}")
        if not 0 <= self.threads <= MOST_THREADS or self.workers < 0:
            raise DataError(
                f"--threads, --workers: expected 0 or more, up to {MOST_THREADS} threads, got {self.threads} and "
                f"{self.workers}"
            )
        if not SEEDS[0] <= self.seed <= SEEDS[1]:
            raise DataError(f"--seed: expected {SEEDS[0]} to {SEEDS[1]}, got {self.seed}")
        if self.on_cluster:
            packages.require("distributed", "--workers, --scheduler")
        self._check_cluster()
        if self.on_cluster and (self.days or self.fractions):
            raise DataError(
                "--workers and --scheduler give each day file to one worker: not with --days or --fractions, where all "
                "rows must be counted before it is known which of them train"
            )
        if self.form not in formats.FORMS:
            raise DataError(f"--format: expected one of {', '.join(formats.FORMS)}, got {self.form!r}")
        BadRows(self.bad_rows, self.max_bad_rows).check()
        if self.days and (not 2 <= self.days <= MOST_DAYS or inputs != 1):
            raise DataError(
                f"--days {self.days} with {inputs} input files: expected one file to cut into 2 to {MOST_DAYS} days"
            )
        shares = self.fractions
        if shares and not (len(shares) == 3 and min(shares) >= 0 and abs(sum(shares) - 1) <= 1e-9):
            raise DataError(f"--fractions {shares}: expected three shares (train, test, val) that add up to 1")
        if self.fractions and self.days:
            raise DataError("--fractions and --days: choose one")
        if self.days and self.preset.sample != self.preset.sample_last:
            raise DataError(
                f"--days with --sample {self.preset.sample} --sample-last {self.preset.sample_last}: where the last "
                "day of one file begins is not known before it was read; give both the same value"
            )

    def _check_cluster(self) -> None:
        if self.dashboard_address and (self.scheduler or not self.workers):
            raise DataError("--dashboard-address: goes with --workers; a scheduler of --scheduler has its own")
        if self.security and not self.on_cluster:
            raise DataError("--security: goes with --scheduler or --workers")
        if not 0 < self.worker_timeout <= MAX_TIMEOUT:
            raise DataError(f"--worker-timeout: expected 0 to {MAX_TIMEOUT} seconds, got {self.worker_timeout}")

    @property
    def on_cluster(self) -> bool:
        """Whether several processes share the work."""
        return bool(self.workers or self.scheduler)

    @property
    def keeps_all_rows(self) -> bool:
        """Whether every row of the days comes into the data set."""
        preset = self.preset
        return preset.sample == preset.sample_last == 1 and not preset.drop_negatives and self.bad_rows == "error"

    def to_buckets(self, days: int) -> list[bool]:
        """Of each day, whether its rows go into the shuffle's buckets as they are read: whole days train, unless the
        input is cut in another way; then both passes are needed to know which rows do."""
        whole_days = self.shuffle and not self.days and not self.fractions
        return [whole_days and day < days - 1 for day in range(days)]

    def shaping(self) -> dict:
        """The part that the manifest records."""
        return {
            "preset": asdict(self.preset), "days": self.days, "fractions": list(self.fractions),
            "shuffle": self.shuffle, "seed": self.seed, "format": self.form,
            "integers": "log(x + 1)" if formats.FORMS[self.form].logged else "unlogged; loaders take log(x + 1)",
            "bad_rows": self.bad_rows,
        }  # fmt: skip
