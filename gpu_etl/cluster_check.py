"""What is asked of a cluster before work is given to it: that it can do it, and to the same bytes."""

import asyncio
import pickle
import sys
import time
import uuid
from collections.abc import Callable, Coroutine, Iterable
from contextlib import suppress
from pathlib import Path

import cloudpickle
from dask.distributed import Client
from distributed.versions import get_versions

from gpu_etl import cluster_code, cluster_probe
from gpu_etl.cluster_tasks import CODE_DIGEST
from gpu_etl.cluster_watch import ASK_SECONDS, CANCELLED, LOOK_SECONDS, NAMED, QUIET_SECONDS, ask
from gpu_etl.errors import DataError
from gpu_etl.extract import kind_of
from gpu_etl.settings import Settings
from gpu_etl.source import Source

for travelling in (cluster_probe, cluster_code):
    cloudpickle.register_pickle_by_value(travelling)
EVERYWHERE = ("dask", "distributed")
OF_WORKERS = (*EVERYWHERE, "numpy", "numba")
MODULES = {"zstd": "zstandard", "parquet": "pyarrow"}  # by kind of day file
CHECK_NAME = "check"
FOLDER_SECONDS = 5.0  # until a network file system shows everywhere what was written
ALL_ALIKE = "all must have what this command has: make one environment for all of them, and start them from it"
SAME_FOLDERS = "all workers must see the same files under the same paths, and write there"


class Check:
    """One look at a cluster. seconds: how long workers may take to come, and to answer each question."""

    def __init__(self, client: Client, sources: list[Source], settings: Settings, work: Path):
        self._client, self._sources, self._settings, self._work = client, sources, settings, work
        self._address, self._seconds = client.scheduler.address, settings.worker_timeout

    def run(self) -> dict[str, str]:
        """Host and process of each worker by address, in words. Raises DataError where one cannot do the work."""
        try:
            self._wait()
            self._versions()
            workers = self._code()
            self._folders()
        except (RuntimeError, *CANCELLED) as error:  # what Dask says where a client has no scheduler any more
            raise self._silent(error) from error
        return {address: f"host {found['host']}, process {found['pid']}" for address, found in workers.items()}

    def _wait(self) -> None:
        """Until there is a worker."""
        begin = said = time.monotonic()
        while not self._ask(lambda: self._client.scheduler.identity(n_workers=-1))["workers"]:
            now = time.monotonic()
            if now - begin > self._seconds:
                raise DataError(
                    f"{self._address}: no worker has come within {self._seconds:g} s (--worker-timeout); start some, "
                    f"`dask worker {self._address}`, and give the same command again"
                )
            if now - said > min(QUIET_SECONDS, self._seconds / 4):
                print(f"{self._address}: no worker yet, for {now - begin:.0f} s", file=sys.stderr)
                said = now
            time.sleep(min(LOOK_SECONDS, self._seconds / 4))

    def _ask(self, question: Callable[[], Coroutine]):
        try:
            return ask(self._client, question, min(ASK_SECONDS, self._seconds))
        except OSError as error:
            raise self._silent(error) from error

    def _silent(self, error: BaseException) -> DataError:
        words = str(error) or type(error).__name__
        return DataError(f"{self._address}: the Dask scheduler does not answer ({words}); is it still there?")

    def _ask_workers(self, question: Callable[[str], Coroutine]) -> dict:
        """What each worker answers, by address. Raises DataError with the names of those that do not."""

        async def all_of_them() -> tuple[dict, dict]:
            workers = (await self._client.scheduler.identity(n_workers=-1))["workers"]
            tasks = {address: asyncio.ensure_future(question(address)) for address in workers}
            done, late = await asyncio.wait(tasks.values(), timeout=self._seconds)
            for task in late:
                task.cancel()
            failed = {address: task.exception() for address, task in tasks.items() if task in done and task.exception()}
            failed |= {address: "no answer" for address, task in tasks.items() if task in late}
            return {a: task.result() for a, task in tasks.items() if a not in failed}, failed

        try:
            found, failed = ask(self._client, all_of_them, self._seconds + ASK_SECONDS)
        except OSError as error:
            raise self._silent(error) from error
        if failed:
            words = {a: f"{type(e).__name__}: {e}" if isinstance(e, BaseException) else e for a, e in failed.items()}
            _refuse(words, f"within {self._seconds:g} s (--worker-timeout); end such a worker, or mend it")
        return found

    def _versions(self) -> None:
        """Python and packages, asked in Dask's own way, before any code is sent."""
        question = {"op": "versions", "packages": list(OF_WORKERS)}
        here = get_versions(packages=OF_WORKERS)["packages"]
        scheduler = self._ask(lambda: self._client.scheduler.versions(packages=list(EVERYWHERE)))
        wrong = {f"the scheduler {self._address}": _different(here, scheduler["packages"], EVERYWHERE)}

        async def of_worker(address: str) -> dict:
            return (await self._client.scheduler.broadcast(msg=question, workers=[address]))[address]["packages"]

        found = self._ask_workers(of_worker)
        wrong |= {address: _different(here, there, OF_WORKERS) for address, there in found.items()}
        _refuse(wrong, f"this command: {_versions_words(here, OF_WORKERS)}; {ALL_ALIKE}")

    def _run_on(self, address: str, function: Callable, *arguments) -> Coroutine:
        async def answer():
            return (await self._client.run(function, *arguments, workers=[address]))[address]

        return answer()

    def _code(self) -> dict[str, dict]:
        """Give this code to workers without it; returns what who() says of each."""
        digest = CODE_DIGEST
        found = self._ask_workers(lambda address: self._run_on(address, cluster_probe.who))
        lacking = [address for address, there in found.items() if there["digest"] is None]
        if lacking:
            print(f"{len(lacking)} workers do not have this project: its code is sent to them", file=sys.stderr)
            code = cluster_code.Code(cluster_code.packed_code(cluster_probe.code_root()), digest)
            self._ask(lambda: self._client.register_plugin(code))
            found = self._ask_workers(lambda address: self._run_on(address, cluster_probe.who))
        wrong = {
            address: f"{there['root'] or 'no folder'} has {(there['digest'] or 'none')[:12]}"
            for address, there in found.items()
            if there["digest"] != digest
        }
        _refuse(
            wrong,
            f"another state of this project's code than that of this command, {digest[:12]}: bring it up to date and "
            "start the worker anew, or start it where it cannot be imported: then it is sent there",
        )
        return found

    def _folders(self) -> None:
        """Imports, packages, the device, the days and the work folder, as each worker sees them."""
        token, name = uuid.uuid4().hex, CHECK_NAME
        seconds = min(FOLDER_SECONDS, self._seconds / 4)
        kinds = {kind_of(file.path) for source in self._sources for file in source.files}
        modules = [module for kind, module in MODULES.items() if kind in kinds]
        packed = pickle.dumps((self._sources, modules, self._settings.device))
        arguments = packed, str(self._work), token, name, seconds
        (self._work / name).write_text(token)
        try:
            found = self._ask_workers(lambda address: self._run_on(address, cluster_probe.faults, *arguments))
        finally:
            with suppress(OSError):
                (self._work / name).unlink(missing_ok=True)
        _refuse({address: "; ".join(some[:NAMED]) for address, some in found.items()}, SAME_FOLDERS)


def _short(version: str | None, package: str) -> str:
    """A version; of Python what bytecode depends on."""
    return ".".join(version.split(".")[:2]) if version and package == "python" else str(version)


def _different(here: dict, there: dict, packages: Iterable[str]) -> str:
    """Words for the versions that are others; empty where none is."""
    names = ("python", *packages)
    return _versions_words(there, [p for p in names if _short(here[p], p) != _short(there[p], p)], ())


def _versions_words(found: dict, packages: Iterable[str], always: Iterable[str] = ("python",)) -> str:
    names = [*always, *packages]
    return ", ".join(f"{name} {found[name].split('.final')[0] if found[name] else 'missing'}" for name in names)


def _refuse(faults: dict[str, str], advice: str) -> None:
    """Raise DataError with the faults of some workers, if any has one."""
    found = [f"{address}: {words}" for address, words in faults.items() if words]
    if found:
        more = f", and {len(found) - NAMED} more" if len(found) > NAMED else ""
        raise DataError("; ".join(found[:NAMED]) + f"{more}; {advice}")
