"""Tasks of a cluster on their way: results in order, and words for what ends them."""

import importlib
import os
import signal
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("dask.distributed")
import dask
from dask.distributed import Client, LocalCluster

from gpu_etl.cluster import watch as cluster_watch
from gpu_etl.cluster.byte_ranges import CountTask
from gpu_etl.cluster.probe import code_digest
from gpu_etl.cluster.tasks import checked, count_part
from gpu_etl.cluster.watch import WorkerMonitor
from gpu_etl.common import packages
from gpu_etl.common.errors import DataError, KeepWorkError
from gpu_etl.passes.journal import Journal
from gpu_etl.passes.settings import Settings
from gpu_etl.passes.work_dir import JOB
from gpu_etl.raw.reader import open_sources
from tests import reference
from tests.gpu_etl.dask_processes import ROOT, Processes
from tests.gpu_etl.test_cluster import environment  # noqa: F401 - what Dask puts there must not stay
from tests.gpu_etl.test_cluster_failures import encode, last_line, two_days  # noqa: F401


@pytest.fixture(scope="module")
def client():
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 0}),
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0", silence_logs=50) as cluster,
        Client(cluster, set_as_default=False) as found,
    ):
        yield found


@pytest.fixture
def watch(client, tmp_path):
    return WorkerMonitor(client, 60.0, tmp_path, {})


def test_results_come_in_the_order_of_the_calls(client, watch):
    seen = []
    calls = [(pow, (base, 2)) for base in range(50)]
    assert cluster_watch.run(client, watch, "some", calls, seen.append) == [base**2 for base in range(50)]
    assert sorted(seen) == list(range(50))
    for exponent in range(20):  # Dask takes a key that it still knows for the task that had it
        assert cluster_watch.run(client, watch, "some", [(pow, (2, exponent))]) == [2**exponent]
    assert cluster_watch.run(client, watch, "none", []) == []


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ((os._exit, (1,)), r"odd-0-\w+: workers die at this task, the last was tcp://.*: out of memory\?"),
        ((bytearray, (1 << 62,)), r"a worker is out of memory \(.*\); give it more of it"),
        ((importlib.import_module, ("no_such_module",)), r"cannot run it \(No module named 'no_such_module'\)"),
    ],
)
def test_what_ends_a_task_has_words_and_keeps_the_work(client, watch, tmp_path, call, words):
    with pytest.raises(KeepWorkError, match=words) as caught:
        cluster_watch.run(client, watch, "odd", [call])
    assert f"the work in {tmp_path} is kept" in str(caught.value)


def test_errors_of_a_task_come_as_they_are(client, watch):
    with pytest.raises(DataError, match="a day: the package no_such_one is missing") as caught:
        cluster_watch.run(client, watch, "odd", [(pow, (2, 2)), (packages.require, ("no_such_one", "a day"))])
    assert type(caught.value) is DataError


def test_time_that_the_command_itself_takes_is_not_the_workers(client, tmp_path):
    watch = WorkerMonitor(client, 1.0, tmp_path, {})
    time.sleep(1.2)
    calls = [(pow, (2, 2))] * 3
    assert cluster_watch.run(client, watch, "late", calls, lambda place: time.sleep(0.6)) == [4] * 3
    assert cluster_watch.run(client, watch, "late", [(time.sleep, (3,))]) == [None]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("who", "sign", "words"),
    [
        ("worker", signal.SIGSTOP, r"no task has ended .* not heard of: tcp://"),
        ("scheduler", signal.SIGKILL, "is gone, or has dropped the tasks"),
    ],
)
def test_results_that_cannot_be_had(tmp_path, who, sign, words):
    """The task has ended, but whoever passes on what came of it is no more."""
    with Processes() as processes:
        processes.start_workers(1)
        struck = processes.workers[0] if who == "worker" else processes.scheduler
        with Client(processes.address, set_as_default=False) as own:
            watch, gather = WorkerMonitor(own, 2.0, tmp_path, {}), own.gather

            def strike(futures):
                os.kill(struck.pid, sign)
                return gather(futures)

            own.gather = strike
            with pytest.raises(KeepWorkError, match=words):
                cluster_watch.run(own, watch, "held", [(pow, (2, 2))])


@pytest.mark.slow
def test_a_worker_without_memory_is_named(two_days, tmp_path, capfd):  # noqa: F811
    with Processes() as processes:
        processes.start_workers(1, memory="60MB")
        assert encode(two_days, tmp_path / "set", processes.address, "--worker-timeout", "4") == 1
        assert f"process {processes.workers[0].pid}" in (said := last_line(capfd))
    assert "no task has ended and no worker at one was heard of for" in said
    assert "paused, its memory is full: tcp://" in said


def test_a_worker_that_came_later_is_looked_at_again(tmp_path):
    digest = code_digest(ROOT)
    with pytest.raises(KeepWorkError, match=r"does not see .*all workers must see the same folders"):
        checked(digest, tmp_path, pow, (2, 3))
    (tmp_path / JOB).touch()
    assert checked(digest, tmp_path, pow, (2, 3)) == 8
    with pytest.raises(KeepWorkError, match=r"another state of this project's code .* that of the command \(0000"):
        checked("0" * 64, tmp_path, pow, (2, 3))


def test_a_task_waits_for_one_of_an_earlier_run(tmp_path):
    day = tmp_path / "day_0"
    day.write_bytes(reference.write_rows(seed=1, rows=20))
    sources, part = open_sources([day]), CountTask(0, 0, 0, 0, day.stat().st_size)
    folder = part.folder(tmp_path)
    folder.mkdir()
    earlier = Journal(folder / "journal.jsonl")
    settings = Settings(threads=1, worker_timeout=0.5)
    with pytest.raises(KeepWorkError, match=r"still held by a task of an earlier run after 0.5 s"):
        count_part(sources, part, settings, tmp_path, 1)
    ended = []

    def end() -> None:
        time.sleep(0.5)
        ended.append(True)
        earlier.close()

    threading.Thread(target=end).start()
    tally, rows, _ = count_part(sources, part, Settings(threads=1, worker_timeout=60.0), tmp_path, 1)
    assert ended and tally.kept == 20 and rows == [0]


def test_the_digest_tells_any_change_of_code(tmp_path):
    def write(name: str, text: str) -> str:
        path = Path(tmp_path, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return code_digest(tmp_path)

    digests = [code_digest(tmp_path), write("gpu_etl/a.py", "x"), write("gpu_etl/a.py", "y"), write("common/a.py", "y")]
    (tmp_path / "common" / "a.py").rename(tmp_path / "common" / "b.py")
    digests += [code_digest(tmp_path), write("gpu_etl/load/a.py", "")]
    assert len(set(digests)) == len(digests)
    assert write("gpu_etl/notes.txt", "x") == write("model/a.py", "x") == digests[-1]
