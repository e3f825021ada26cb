"""Ranks that stop, hang or leave without a word: the others say which, and the job ends soon. No thread is left."""

import ctypes
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from gpu_etl.pipeline import Settings, encode_days
from model.checkpoint import files as checkpoint
from model.distributed import heartbeat as watch
from tests.conftest import ROOT
from tests.ranks import run_main
from tests.test_dist_faults import SOON, at_step, ends_soon, flags, torchrun
from tests.test_kill_training import digests


@pytest.fixture(scope="module")
def folder(day_files, tmp_path_factory):
    out = tmp_path_factory.mktemp("set")
    encode_days(day_files, out, Settings())
    return out


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    assert [end.status for end in run_main(2, flags(folder, out), out)] == [0, 0]
    return digests(checkpoint.find(out))


def test_a_rank_stands_still(folder, tmp_path):
    """It lives, so nobody calls it killed; the others end it, as it cannot leave by itself."""
    ends = run_main(2, flags(folder, tmp_path), tmp_path, stand_still)
    said = "".join(end.err for end in ends)
    assert re.search(r"error: rank 1 of 2, process \d+ on \S+, is stopped \(SIGSTOP", said), said
    assert "(no sign of life for 3 s)" in said and said.count("error: ") == 1 and "killed" not in said, said
    assert [end.status for end in ends] == [1, -signal.SIGKILL] and max(end.seconds for end in ends) < SOON


def stand_still(rank, words):
    watch.LOST_AFTER = 3.0
    if rank == 1:
        at_step(5, lambda: os.kill(os.getpid(), signal.SIGSTOP))


def test_a_rank_hangs_with_its_watch(folder, tmp_path):
    """As in a library that never gives the interpreter back: alive, and not stopped."""
    ends = run_main(2, flags(folder, tmp_path), tmp_path, hold_the_interpreter)
    said = "".join(end.err for end in ends)
    assert re.search(r"error: rank 1 of 2, process \d+ on \S+, is alive but hangs \(state [RS]: ", said), said
    assert [end.status for end in ends] == [1, -signal.SIGKILL] and max(end.seconds for end in ends) < SOON


def hold_the_interpreter(rank, words):
    watch.LOST_AFTER = 3.0
    if rank == 1:
        at_step(5, lambda: ctypes.PyDLL(None).sleep(60))  # PyDLL: without letting other threads of Python run


def test_a_rank_leaves_without_a_word(folder, tmp_path):
    ends = run_main(2, flags(folder, tmp_path), tmp_path, leave_rank_1)
    ends_soon(ends, 1, "ended without a word, with exit status 7", 7)


def leave_rank_1(rank, words):
    if rank == 1:
        at_step(5, lambda: os._exit(7))


def test_ranks_that_were_all_stopped_for_a_while_go_on(folder, tmp_path, whole):
    """As on a machine that was suspended: nobody takes the others for lost when it wakes up."""
    ends = run_main(2, flags(folder, tmp_path), tmp_path, sleep_together)
    assert [end.status for end in ends] == [0, 0], ends
    assert digests(checkpoint.find(tmp_path)) == whole


def sleep_together(rank, words):
    watch.LOST_AFTER = 4.0

    def stop():
        waker = f"import os, signal, time; time.sleep(7); os.kill({os.getpid()}, signal.SIGCONT)"
        subprocess.Popen([sys.executable, "-c", waker])
        os.kill(os.getpid(), signal.SIGSTOP)

    at_step(5, stop)


@pytest.mark.slow
def test_torchrun_does_not_wait_for_a_rank_that_stands_still(folder, tmp_path):
    """It would give it half a minute after SIGTERM, which a stopped process never sees."""
    script = tmp_path / "still.py"
    script.write_text(STILL.format(root=str(ROOT)))
    words = ["--standalone", "--nproc_per_node=2", script, tmp_path / "stopped", *flags(folder, tmp_path / "run")]
    ((status, _, err),) = torchrun(words)
    seconds = time.time() - float((tmp_path / "stopped").read_text())
    assert status == 1 and "is stopped (SIGSTOP" in err and seconds < 3 + 25, (seconds, err)


# dist_train.py, of which rank 1 stops in step 5, and says when.
STILL = """
import os, pathlib, sys, time
sys.path.insert(0, {root!r})
import dist_train
from tests.test_dist_ends import stand_still
pathlib.Path(stopped := sys.argv.pop(1)).write_text(str(time.time()))
stand_still(int(os.environ["RANK"]), [])
sys.exit(dist_train.main())
"""


@pytest.mark.slow
def test_no_thread_of_gloo_or_the_watch_is_left_at_the_end(folder, tmp_path):
    """Python ends those that want it while it shuts down, and by that, sometimes, the process, with SIGABRT."""
    script = tmp_path / "threads.py"
    script.write_text(THREADS.format(root=str(ROOT)))
    words = ["--standalone", "--nproc_per_node=2", script, tmp_path / "left", *flags(folder, tmp_path / "run")]
    ((status, _, err),) = torchrun(words)
    left = [(tmp_path / f"left_{rank}").read_text() for rank in range(2)]
    assert status == 0 and not any("gloo" in names or "watch" in names for names in left), (left, err)


THREADS = """
import os, pathlib, sys, threading
sys.path.insert(0, {root!r})
import dist_train
left = sys.argv.pop(1)
status = dist_train.main()
names = [open(f"/proc/self/task/{{task}}/comm").read().strip() for task in os.listdir("/proc/self/task")]
names += [thread.name for thread in threading.enumerate()]
pathlib.Path(f"{{left}}_{{os.environ['RANK']}}").write_text(",".join(names))
sys.exit(status)
"""
