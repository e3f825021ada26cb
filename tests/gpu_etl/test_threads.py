"""Threads of an encode: which of them may touch a device, and that no error of theirs is lost."""

import threading
import time
from types import ModuleType

import numpy as np
import pytest

from gpu_etl.__main__ import main
from gpu_etl.backend import select as backend
from gpu_etl.backend.cpu import slab as cpu
from gpu_etl.cluster.byte_ranges import CountTask
from gpu_etl.cluster.tasks import count_part
from gpu_etl.common.buffers import ScratchBuffer
from gpu_etl.common.errors import notes
from gpu_etl.common.threads import BackgroundWorker
from gpu_etl.passes import journal
from gpu_etl.pipeline import Settings, encode_days
from gpu_etl.raw.reader import open_sources


@pytest.fixture
def device(monkeypatch):
    """The CPU's functions where each, and whatever it returns to be called later, insists that its thread has entered.

    A driver does the same: the thread that runs the command has a context, any other must make it current first.
    """
    entered, called = {threading.main_thread()}, set()

    def checked(function):
        def wrapped(*arguments):
            assert threading.current_thread() in entered, f"{function} called in a thread that has no context"
            called.add(threading.current_thread())
            found = function(*arguments)
            return checked(found) if callable(found) else found

        return wrapped

    class Finisher(cpu.Finisher):
        take, take_shuffled = checked(cpu.Finisher.take), checked(cpu.Finisher.take_shuffled)
        finish = checked(cpu.Finisher.finish)

    module = ModuleType("device")
    vars(module).update({name: value for name, value in vars(cpu).items() if name[0] != "_"})
    for name in ("find_rows", "group", "host_bytes", "parse", "rows_of"):
        setattr(module, name, checked(getattr(cpu, name)))
    module.Finisher = Finisher
    module.enter_thread = lambda: entered.add(threading.current_thread())
    monkeypatch.setattr(backend, "device", lambda name: module)
    monkeypatch.setattr(cpu, "BUCKET_BYTES", 40_000)
    module.called = called
    return module


@pytest.mark.parametrize("shuffled", [True, False])
def test_every_thread_that_touches_the_device_has_entered_it(device, day_files, tmp_path, shuffled):
    encode_days(day_files, tmp_path / "out", Settings(slab_bytes=20_000, shuffle=shuffled))
    assert len(device.called) > 2  # the readers' and the writers' among them


def test_tasks_of_any_thread_enter_the_device(device, day_files, tmp_path):
    days = open_sources(day_files)
    part, failed = CountTask(0, 0, 0, 0, days[0].size), []

    def task():
        try:
            count_part(days, part, Settings(slab_bytes=20_000), tmp_path, 3)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=task)
    thread.start()
    thread.join()
    assert not failed


Finisher = cpu.Finisher


class SlowCopies(Finisher):
    """Takes rows as a device does: the copy starts in take(), goes on meanwhile, and is over when someone waited for
    it."""

    def take(self, coded, day):
        return self._begin(coded, lambda rows: Finisher.take(self, rows, day))

    def take_shuffled(self, numbered, seed):
        return self._begin(numbered, lambda rows: Finisher.take_shuffled(self, rows, seed))

    def _begin(self, rows, take):
        once, arrived = threading.Lock(), []

        def wait():
            with once:
                if not arrived:
                    arrived.append(rows.copy())

        self._take = lambda: take((wait(), arrived[0])[1])
        return wait

    def finish(self, begin, end, records):
        take = self._take

        def finished():
            time.sleep(0.02)  # long enough for the reader to fill memory again that it is not kept from
            take()
            return Finisher.finish(self, begin, end, records)()

        return finished


def test_memory_that_a_device_still_copies_from_is_not_filled_again(day_files, tmp_path, monkeypatch):
    monkeypatch.setattr(cpu, "BUCKET_BYTES", 10_000)
    settings = Settings(slab_bytes=20_000)
    expected, _ = encode_days(day_files, tmp_path / "expected", settings)
    monkeypatch.setattr(cpu, "Finisher", SlowCopies)
    found, _ = encode_days(day_files, tmp_path / "found", settings)
    assert found == expected


def test_memory_waits_once_for_what_holds_it():
    memory, waited = ScratchBuffer(), []
    memory.empty((3,), np.int32)
    memory.hold(lambda: waited.append(1))
    for _ in range(2):
        memory.empty((2,), np.int32)
    assert waited == [1]


def fail(words):
    raise OSError(28, words)


@pytest.mark.parametrize("jobs_before", [0, 1])
def test_the_error_of_the_last_job_is_raised(jobs_before):
    with pytest.raises(OSError, match="the last one"), BackgroundWorker() as behind:
        for _ in range(jobs_before):
            behind.submit(lambda: None)
        behind.submit(fail, "the last one")


def test_the_error_of_a_job_is_raised_once():
    with pytest.raises(OSError, match="a job") as raised, BackgroundWorker() as behind:
        behind.submit(fail, "a job")
        behind.submit(lambda: None)
    assert not hasattr(raised.value, "__notes__")


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt()])
def test_no_error_hides_another(error):
    with pytest.raises(type(error)) as raised, BackgroundWorker() as behind:
        behind.submit(fail, "the job's")
        raise error
    assert notes(raised.value) == ["meanwhile, in the background: OSError: [Errno 28] the job's"]


def test_both_errors_are_told_to_the_user(day_files, tmp_path, monkeypatch, capsys):
    bad = tmp_path / "day_of_a_bad_row"
    bad.write_bytes(b"bad\n")
    real = journal.Journal.record

    def record(self, **event):
        return fail("no room") if "day" in event else real(self, **event)

    monkeypatch.setattr(journal.Journal, "record", record)
    assert main(["encode", str(day_files[0]), str(bad), "--threads", "1", "--out", str(tmp_path / "out")]) == 1
    told = capsys.readouterr().err
    assert "day_of_a_bad_row: row 1" in told and "meanwhile, in the background: OSError: [Errno 28] no room" in told
