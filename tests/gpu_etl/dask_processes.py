"""Real processes of `dask scheduler` and `dask worker`, to be stopped and killed."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from dask.distributed import Client

ROOT = Path(__file__).parent.parent.parent
DASK = [sys.executable, "-m", "dask"]
QUIET = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
START_SECONDS = 60


class Processes:
    """A scheduler and workers in a folder of their own, for use in `with`; tls: flags of Dask's for all of them."""

    def __init__(self, tls: tuple[str, ...] = ()):
        self._folder = tempfile.TemporaryDirectory(prefix="dask")
        self.folder, self._tls, self._running = Path(self._folder.name), tls, []
        self.workers: list[subprocess.Popen] = []
        self.start_scheduler()

    def _start(self, *words: str, hidden: Path | None = None, **settings) -> subprocess.Popen:
        outside = {"cwd": self.folder, **QUIET, **settings}  # not where this project can be imported by chance
        words = [*DASK, *words, *self._tls]
        if hidden is not None:
            words = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(hidden), *words]
        process = subprocess.Popen(words, **outside)
        self._running.append(process)
        return process

    def start_scheduler(self) -> None:
        """A scheduler; self.address is its."""
        file = self.folder / f"scheduler_{len(self._running)}.json"
        place = "--host", "127.0.0.1", "--port", "0", "--dashboard-address", "127.0.0.1:0"
        self.scheduler = self._start("scheduler", *place, "--scheduler-file", str(file))
        deadline = time.monotonic() + START_SECONDS
        while not (file.exists() and file.read_text().endswith("}")):  # it is written in place
            assert time.monotonic() < deadline and self.scheduler.poll() is None
            time.sleep(0.05)
        self.address = json.loads(file.read_text())["address"]

    def start_workers(
        self,
        count: int,
        project: Path | None = ROOT,
        security=None,
        hidden: Path | None = None,
        memory: str = "0",
        **environment: str,
    ) -> None:
        """Workers of one thread. project: the folder that they import this project from, None for none; hidden: one in
        whose place they see an empty one; memory: the most that each may have; security: for a client."""
        place = "--host", "127.0.0.1", "--nthreads", "1", "--no-nanny", "--no-dashboard", "--memory-limit", memory
        preload = ("--preload", "gpu_etl.cluster_tasks") if project else ()
        outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        if project:
            outside["PYTHONPATH"] = str(project)
        with Client(self.address, timeout=START_SECONDS, set_as_default=False, security=security) as client:
            there = len(client.scheduler_info(n_workers=-1)["workers"])
        for _ in range(count):
            started = self._start("worker", self.address, *place, *preload, env=outside | environment, hidden=hidden)
            self.workers.append(started)
        with Client(self.address, timeout=START_SECONDS, set_as_default=False, security=security) as client:
            client.wait_for_workers(there + count, timeout=START_SECONDS)

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_) -> None:
        for process in self._running:
            process.kill()
            process.wait()
        self._folder.cleanup()
