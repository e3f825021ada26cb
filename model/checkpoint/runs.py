"""Who a training run is, and which folder is its own: what one run wrote, no other replaces, deletes or continues.

    OUTPUT_DIR/.lock        held by the process that trains into the folder
    OUTPUT_DIR/run.json     the run that the folder belongs to: the first that wrote there
    OUTPUT_DIR/step_N, best its checkpoints
    OUTPUT_DIR/run_ID/      of a run that found the folder taken: the same once more

The run's id stands in each checkpoint's state and in each line of metrics.jsonl.
"""

import fcntl
import json
import os
import platform
import uuid
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from common import atomic, typed
from common.numbers import MOST_THREADS
from model.checkpoint.files import RUN_FOLDERS, find, steps_in
from model.checkpoint.state import STATE, CheckpointError, State, read_state
from model.config import ConfigError

RUN, LOCK, BEST = "run.json", ".lock", "best"
VERSION = 1


@dataclass(frozen=True)
class RunState:
    """What a checkpoint holds of its run. run: its id; dataset: path of the data set; data: digests of what gives the
    model's inputs their meaning (gpu_etl.load.identity); place: what makes up the order of its batches; threads: of the
    CPU; best_auc: on validation so far."""

    __pydantic_config__ = typed.STRICT

    run: str
    dataset: str
    data: dict[str, str]
    place: dict[str, int | str | bool | None]
    threads: int
    best_auc: float

    def __post_init__(self):
        if not 1 <= self.threads <= MOST_THREADS or not 0 <= self.best_auc <= 1:
            raise ValueError(
                f"expected 1 to {MOST_THREADS} threads and a best_auc from 0 to 1, got {self.threads}, {self.best_auc}"
            )


def run_state(state: State, folder: Path) -> RunState:
    """A checkpoint's. Raises CheckpointError where it holds none, as train.py writes them."""
    return typed.read(RunState, state.run, f"{Path(folder) / STATE}: run", CheckpointError)


@dataclass(frozen=True)
class RunFile:
    """run.json."""

    __pydantic_config__ = typed.STRICT

    version: int
    run: str


@dataclass(frozen=True)
class Run:
    """A run: its id, the --output_dir, the folder that it writes into, the checkpoint that it goes on from, and whether
    it does so in that one's folder, as the same run."""

    id: str
    output_dir: Path
    folder: Path
    source: Path | None = None
    continues: bool = False


def plan(output_dir: Path, ckpt: Path | None) -> Run:
    """Who the run is that --output_dir and --ckpt make; touches nothing.

    Where the checkpoint is the latest of its run, that run goes on: in its own folder, if that is --output_dir or one
    of the run folders in it, else in --output_dir, if no checkpoints are there. All others are new runs.
    """
    source = find(ckpt) if ckpt else None
    if source and [path.name for _, path in steps_in(source.parent)][-1:] == [source.name]:
        same = run_state(read_state(source), source).run
        known = {folder.resolve(): folder for folder in (output_dir, *output_dir.glob(RUN_FOLDERS))}
        folder = known.get(source.parent.resolve())
        if folder:
            return Run(same, output_dir, folder, folder / source.name, True)
        if owner(output_dir) is None:
            return Run(same, output_dir, output_dir, source)
    return Run(uuid.uuid4().hex[:12], output_dir, output_dir, source)


def owner(folder: Path) -> str | None:
    """The id of the run with checkpoints in the folder; None where there are none; "unknown" where nothing tells."""
    if not steps_in(folder) and not (folder / BEST / STATE).is_file():
        return None
    try:
        return typed.read_json(RunFile, (folder / RUN).read_bytes(), str(folder / RUN), ConfigError, VERSION).run
    except (FileNotFoundError, ConfigError):
        return "unknown"


class Claim:
    """Makes a run's folder its own, until release(): from then on no other run may write there.

    Raises ConfigError where another process trains into --output_dir (must_lock; else the run takes a folder of its
    own), OSError where it cannot be written. A run that does not go on in its checkpoint's folder, and finds the
    checkpoints of another there, takes the folder run_ID within it. run: as it is then; said: words for the user.
    """

    def __init__(self, run: Run, must_lock: bool = True):
        self.run, self.said, self._lock = run, "", None
        run.output_dir.mkdir(parents=True, exist_ok=True)
        locked = self._take_lock(must_lock)
        taken = None if run.continues else owner(run.output_dir)
        if taken or not locked:
            self.run = replace(run, folder=run.output_dir / f"run_{run.id}")
            self.run.folder.mkdir(exist_ok=True)
            who = f"checkpoints of the run {taken}" if taken else "another run at work"
            words = f"{run.output_dir} has {who}: this run, {run.id}, writes into {self.run.folder}"
            self.said = "\n".join(filter(None, (self.said, words)))
        atomic.recover(self.run.folder)
        text = json.dumps(asdict(RunFile(VERSION, run.id)), allow_nan=False) + "\n"
        atomic.write_text(self.run.folder / RUN, text)

    def _take_lock(self, must: bool) -> bool:
        path = self.run.output_dir / LOCK
        self._lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            who = path.read_text(errors="replace").strip()
            self.release()
            if must:
                raise ConfigError(
                    f"--output_dir {self.run.output_dir}: another run is writing there ({who or 'it says not which'}); "
                    "wait for its end, or name another folder"
                ) from None
            return False
        except OSError as error:  # some network file systems
            self.said = f"{path} cannot be locked ({error.strerror}): a second run at work there would go unnoticed"
        os.truncate(self._lock, 0)
        os.write(self._lock, f"run {self.run.id}, process {os.getpid()} on {platform.node()}\n".encode())
        return True

    def release(self) -> None:
        """Let others have it."""
        if self._lock is not None:
            os.close(self._lock)  # and with it goes the lock, as it does when the process is killed
            self._lock = None


@dataclass(frozen=True)
class Given:
    """What a checkpoint is to be used with: the data set's path and meaning (RunState.data), and, to go on, the place
    (RunState.place); allow: differences are told, and no error."""

    folder: Path
    data: dict[str, str]
    place: dict | None = None
    allow: bool = False


def compare(there: RunState, here: Given, ckpt: Path) -> list[str]:
    """Hold what a checkpoint's run was trained on against what it is given; returns what the user is to know: what
    cannot be compared, as one side does not know it, and differences that are allowed.

    Raises ConfigError, naming both sides, for others.
    """
    found, allow = [], "; take that one, or --allow_other_data if both mean the same"
    if words := _different(there.data, here.data, there.data.keys() & here.data.keys()):
        found.append(f"{here.folder} is not like {there.dataset}, which the model was trained on: {words}")
    if here.place and (words := _different(there.place, here.place, there.place.keys() | here.place.keys())):
        found.append(f"cannot go on with other data or another order: {words}")
        allow = ""
    if found and not here.allow:
        raise ConfigError(f"--ckpt {ckpt}: {'; '.join(found)}{allow}")
    unknown = sorted(there.data.keys() ^ here.data.keys())
    remark = f"{here.folder}: one of it and {there.dataset} has no manifest: {', '.join(unknown)} cannot be compared"
    return [f"warning: --ckpt {ckpt}: {words}" for words in found] + [remark] * bool(unknown)


def _different(there: dict, here: dict, keys: Iterable[str]) -> str:
    differs = [key for key in sorted(keys) if there.get(key) != here.get(key)]
    return ", ".join(f"{key} {there.get(key)} there, {here.get(key)} here" for key in differs)
