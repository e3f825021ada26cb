"""What a worker of a Dask cluster is asked before it gets work.

All of this travels by value: it runs on workers that do not have the project, so nothing here imports it at the top,
and the standard library suffices.
"""

import asyncio
import hashlib
import importlib
import importlib.util
import os
import pickle
import socket
import sys
import time
import uuid
from pathlib import Path

PACKAGE, PACKAGES = "gpu_etl", ("gpu_etl", "common")


def code_files(root: Path) -> list[Path]:
    """The source files of this project's packages that tasks may import, below the folder that holds them."""
    return sorted(path for package in PACKAGES for path in (root / package).rglob("*.py"))


def code_digest(root: Path) -> str:
    """SHA-256 over the names and bytes of code_files(), as 64 hex digits."""
    found = hashlib.sha256()
    for path in code_files(root):
        text = path.read_bytes()
        found.update(f"{path.relative_to(root).as_posix()} {len(text)}\n".encode() + text)
    return found.hexdigest()


def code_root() -> Path | None:
    """The folder that holds the package where this process would import it from; None where it would not find it."""
    importlib.invalidate_caches()
    found = importlib.util.find_spec(PACKAGE)
    return None if found is None or found.origin is None else Path(found.origin).parent.parent


def who() -> dict:
    """Host, process and code of this worker; digest is None where it does not have the project. Of code that was
    imported already, the files may be others by now."""
    root, tasks = code_root(), sys.modules.get(f"{PACKAGE}.cluster_tasks")
    digest = None if root is None else code_digest(root)
    return {
        "host": socket.gethostname(), "pid": os.getpid(), "root": str(root or ""),
        "digest": getattr(tasks, "CODE_DIGEST", digest),
    }  # fmt: skip


def _folder_fault(work: Path, token: str, name: str, seconds: float) -> str | None:
    """What keeps this process from work in a folder where a file of that name holds the token; None if nothing.
    seconds: how much later than elsewhere the file may be seen here, as a network file system allows."""
    mine, deadline = work / f"{name}.{uuid.uuid4().int}", time.monotonic() + seconds
    while True:
        try:
            if (work / name).read_text() == token:
                mine.write_text(token)
                mine.unlink()
                return None
            fault = "another folder than the one of this command"
        except OSError as error:
            fault = error.strerror or str(error)
        if time.monotonic() > deadline:
            return f"{work}: {fault}"
        time.sleep(0.2)


def _faults(packed: bytes, work: str, token: str, name: str, seconds: float) -> list[str]:
    """What keeps this worker from the tasks, in words. packed: what cluster_check.Check sends, pickled."""
    try:
        tasks = importlib.import_module(f"{PACKAGE}.cluster_tasks")
        sources, modules, device = pickle.loads(packed)
    except Exception as error:  # whatever an import on another machine may raise
        return [f"its {PACKAGE} cannot be imported ({type(error).__name__}: {error})"]
    faults = [f"the package {name} is missing" for name in modules if importlib.util.find_spec(name) is None]
    try:
        tasks.check_device(device)
    except ValueError as error:
        faults.append(str(error))
    folder = _folder_fault(Path(work), token, name, seconds)
    faults += [folder] if folder else []
    for file in (file for source in sources for file in source.files):
        expected = tuple(file.stamp)
        try:
            found = os.stat(file.path)
            found = found.st_size, found.st_mtime_ns
        except OSError as error:
            found = error.strerror
        if found != expected:
            faults.append(f"{file.path}: expected {_stamp_words(expected)}, found there: {_stamp_words(found)}")
    return faults


def _stamp_words(stamp: tuple[int, int] | str) -> str:
    return stamp if isinstance(stamp, str) else f"{stamp[0]:,} bytes, written at {stamp[1] / 1e9:.6f} s"


async def faults(*arguments) -> list[str]:
    """_faults(), in a thread, so that the worker is heard of meanwhile."""
    return await asyncio.to_thread(_faults, *arguments)
