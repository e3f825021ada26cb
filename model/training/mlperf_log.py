"""The log of MLPerf training: lines of `:::MLLOG {json}`, as mlperf_logging's mllog writes them."""

import inspect
import json
import time
from pathlib import Path

from common.jsonable import jsonable
from model.config import ConfigError

BENCHMARK, DIVISION = "dlrm", "closed"
MARKER = ":::MLLOG"


class MLPerfLog:
    """Writes a file that mlperf_logging's compliance checker (training, 0.7.0) reads. Replaces an older log.

    Raises OSError where the file cannot be written, ConfigError where it is there and is no such log.
    """

    def __init__(self, path: Path, organisation: str = "none", platform: str = "none"):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file() and path.stat().st_size:
            with open(path, "rb") as file:
                if file.read(len(MARKER)) != MARKER.encode():
                    raise ConfigError(f"--mlperf_log {path}: is there, and is no MLPerf log; name another file")
        self._file = open(path, "w", buffering=1)  # noqa: SIM115 - closed in stop()
        self._write("INTERVAL_START", "init_start", None)
        self.event("submission_benchmark", BENCHMARK)
        self.event("submission_division", DIVISION)
        self.event("submission_org", organisation)
        self.event("submission_platform", platform)
        self.event("submission_status", "research")

    def _write(self, kind: str, key: str, value, **metadata) -> None:
        caller = inspect.stack()[2]
        line = {
            "namespace": "", "time_ms": int(1000 * time.time()), "event_type": kind, "key": key, "value": value,
            "metadata": {"file": Path(caller.filename).name, "lineno": caller.lineno, **metadata},
        }  # fmt: skip
        self._file.write(f"{MARKER} {json.dumps(jsonable(line), allow_nan=False)}\n")

    def event(self, key: str, value=None, **metadata) -> None:
        """One line. Keys that end in _start and _stop mark intervals, others a point in time."""
        intervals = {"start": "INTERVAL_START", "stop": "INTERVAL_END"}
        self._write(intervals.get(key.rpartition("_")[2], "POINT_IN_TIME"), key, value, **metadata)

    def run(self, settings: dict) -> None:
        """Everything is ready: note the settings, end the initialisation, start the run."""
        for key, value in settings.items():
            self.event(key, value)
        self.event("init_stop")
        self.event("run_start")

    def stop(self, success: bool) -> None:
        """The run is over: it reached its target, or not."""
        self.event("run_stop", status="success" if success else "aborted")
        self._file.close()
