"""Several processes make the bytes of one, also when a worker is killed in either pass."""

import hashlib
import os
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("dask.distributed")
from dask.distributed import Client, LocalCluster

from gpu_etl import cluster as cluster_module
from gpu_etl import cluster_start, cpu, formats, parts
from gpu_etl.__main__ import main
from gpu_etl.errors import DataError
from gpu_etl.pipeline import Settings, encode_days
from gpu_etl.schema import choose_preset
from gpu_etl.verify import verify
from tests import reference

ROWS = (3000, 500, 1200, 801)


@pytest.fixture(scope="module", autouse=True)
def environment():
    """Dask puts OMP_NUM_THREADS=1 and more into the environment, which processes of later tests would inherit."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def four_days(tmp_path_factory):
    folder = tmp_path_factory.mktemp("four")
    paths = [folder / f"day_{day}" for day in range(4)]
    for day, path in enumerate(paths):
        path.write_bytes(reference.write_rows(seed=50 + day, rows=ROWS[day]))
    return paths


@pytest.fixture(scope="module")
def cluster():
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0", silence_logs=50) as running:
        yield running


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch):
    monkeypatch.setattr(cpu, "BUCKET_BYTES", 20_000)


def digests(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize(
    ("preset", "settings"),
    [
        ("count", {"form": "dle"}),
        ("torchrec", {"form": "dist"}),
        ("mlperf", {"shuffle": False}),
        ("deepspark", {"form": "records"}),
    ],
)
def test_the_bytes_are_those_of_one_process(four_days, cluster, tmp_path, preset, settings):
    rules = {"sample": 0.9, "sample_last": 0.8, "drop_negatives": 0.2} if preset == "deepspark" else {}
    one = Settings(preset=choose_preset(preset, **rules), seed=4, **settings)
    encode_days(four_days, tmp_path / "one", one)
    several = replace(one, scheduler=cluster.scheduler_address, slab_bytes=9000)
    made, report = encode_days(four_days, tmp_path / "several", several)
    assert digests(tmp_path / "one") == digests(tmp_path / "several")
    assert report.distinct and sum(made.rows.values()) == sum(source["kept"] for source in made.sources)
    verify(tmp_path / "several")


@pytest.mark.parametrize("shuffle_rows", [True, False])
@pytest.mark.parametrize("end", [b"", b"\n"])
def test_days_of_text_are_cut_for_many_workers(four_days, cluster, tmp_path, monkeypatch, shuffle_rows, end):
    monkeypatch.setattr(parts, "MIN_BYTES", 60_000)
    long = tmp_path / "long"
    texts = [path.read_bytes() for path in four_days]
    long.write_bytes(b"".join(texts) + reference.write_rows(seed=9, rows=2)[:-1] + end)
    days = [long, *four_days[1:]]
    one = Settings(preset=choose_preset("torchrec"), shuffle=shuffle_rows)
    encode_days(days, tmp_path / "one", one)
    seen = []
    monkeypatch.setattr(parts, "save", lambda found, work: seen.extend(found))
    encode_days(days, tmp_path / "cut", replace(one, scheduler=cluster.scheduler_address, slab_bytes=9000))
    assert [sum(part.day == day for part in seen) for day in range(4)] == [3, 1, 1, 1]
    assert digests(tmp_path / "one") == digests(tmp_path / "cut")


def test_a_bad_row_of_a_cut_day_has_its_number(four_days, cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "MIN_BYTES", 60_000)
    bad = tmp_path / "bad"
    bad.write_bytes(four_days[0].read_bytes() + b"1\t2\n" + four_days[1].read_bytes())
    with pytest.raises(DataError, match=r"bad: row 3001: expected 40 tab-separated fields, got 2"):
        encode_days([bad, four_days[1]], tmp_path / "set", Settings(scheduler=cluster.scheduler_address))


def test_as_a_command_with_workers_of_its_own(four_days, tmp_path, capsys):
    words = [*map(str, four_days), "--min-count", "3"]
    assert main(["encode", *words, "--out", str(tmp_path / "one")]) == 0
    assert main(["encode", *words, "--out", str(tmp_path / "two"), "--workers", "2", "--threads", "1"]) == 0
    assert "Dask dashboard: http://" in capsys.readouterr().err
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


def lines(path):
    return path.read_bytes().count(b"\n") if path.is_file() else 0


@pytest.mark.parametrize("when", ["count", "encode"])
def test_a_killed_worker_costs_time_only(four_days, tmp_path, when):
    settings = Settings(slab_bytes=2000, threads=1)
    encode_days(four_days, tmp_path / "one", replace(settings, slab_bytes=1 << 20))
    work, killed = tmp_path / "set" / ".work", []

    def reached() -> bool:
        if when == "count":
            return lines(work / "part_0" / "journal.jsonl") > 20
        path = work / formats.files("records", "train")[0]
        return path.is_file() and path.stat().st_blocks > 0  # allocated empty; some rows are in it now

    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0", silence_logs=50) as running:

        def kill() -> None:
            while not reached():
                time.sleep(0.001)
            worker = next(iter(running.workers.values()))
            killed.append((worker.process.pid, (tmp_path / "set" / "manifest.json").exists()))
            os.kill(worker.process.pid, signal.SIGKILL)

        thread = threading.Thread(target=kill, daemon=True)
        thread.start()
        encode_days(four_days, tmp_path / "set", replace(settings, scheduler=running.scheduler_address))
        thread.join(timeout=5)
    ((_, finished),) = killed
    assert not finished
    assert digests(tmp_path / "one") == digests(tmp_path / "set")


def test_errors_of_a_worker_are_the_commands(four_days, cluster, tmp_path):
    bad = tmp_path / "bad"
    bad.write_bytes(four_days[1].read_bytes() + b"1\t2\n")
    settings = Settings(scheduler=cluster.scheduler_address)
    with pytest.raises(DataError, match=r"bad: row 501: expected 40 tab-separated fields, got 2"):
        encode_days([four_days[0], bad], tmp_path / "set", settings)
    skip = replace(settings, bad_rows="skip")
    made, _ = encode_days([bad, four_days[0]], tmp_path / "skipped", skip)
    assert made.sources[0]["dropped"] == {"wrong number of fields": 1}
    with pytest.raises(DataError, match=r"[Mm]ore than --max-bad-rows 0"):
        encode_days([bad, four_days[0]], tmp_path / "none", replace(skip, max_bad_rows=0))


def test_what_cannot_be(four_days, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster_start, "START_SECONDS", 1.0)
    with pytest.raises(DataError, match="not with --days or --fractions"):
        encode_days(four_days, tmp_path / "set", Settings(workers=2, fractions=(0.5, 0.3, 0.2)))
    with pytest.raises(DataError, match="no Dask scheduler answers there"):
        encode_days(four_days, tmp_path / "set", Settings(scheduler="tcp://127.0.0.1:9"))


def test_a_set_is_published_before_the_cluster_ends(four_days, cluster, tmp_path, monkeypatch, capsys):
    clients = []

    def close(self, *_, **__):
        clients.append(self)
        raise TimeoutError("timed out after 30 s")

    real = Client.close
    monkeypatch.setattr(Client, "close", close)
    settings = Settings(scheduler=cluster.scheduler_address)
    encode_days(four_days, tmp_path / "set", settings)
    verify(tmp_path / "set")
    assert "Dask did not end in order (TimeoutError: timed out after 30 s)" in capsys.readouterr().err
    monkeypatch.undo()
    for client in clients:
        real(client)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("part_0/bucket_1", flip),
        ("part_1/keys", flip),
        ("part_3/rows_3", flip),
        ("part_2/counts.npz", flip),
        ("part_2/counts.npz", os.unlink),
        ("part_0/journal.jsonl", flip),
        ("parts.json", flip),
        ("parts.json", os.unlink),
        ("job.json", flip),
    ],
)
def test_damaged_work_of_workers_is_made_anew(four_days, cluster, tmp_path, monkeypatch, name, change):
    settings = Settings(scheduler=cluster.scheduler_address, slab_bytes=20_000)
    encode_days(four_days, tmp_path / "whole", settings)

    def late(*_):
        raise TimeoutError

    monkeypatch.setattr(cluster_module.Cluster, "encode", late)
    with pytest.raises(DataError, match="not a fault of the disk"):
        encode_days(four_days, tmp_path / "set", settings)
    monkeypatch.undo()
    monkeypatch.setattr(cpu, "BUCKET_BYTES", 20_000)
    change(tmp_path / "set" / ".work" / name)
    encode_days(four_days, tmp_path / "set", settings)
    assert digests(tmp_path / "set") == digests(tmp_path / "whole")


def test_a_day_that_changed_between_two_runs_of_a_cluster(four_days, cluster, tmp_path, monkeypatch, capsys):
    days = [shutil.copy(path, tmp_path) for path in four_days]
    settings = Settings(scheduler=cluster.scheduler_address)

    def late(*_):
        raise TimeoutError

    monkeypatch.setattr(cluster_module.Cluster, "encode", late)
    with pytest.raises(DataError, match="not a fault of the disk"):
        encode_days(days, tmp_path / "set", settings)
    monkeypatch.undo()
    monkeypatch.setattr(cpu, "BUCKET_BYTES", 20_000)
    text = Path(days[1]).read_bytes()
    Path(days[1]).write_bytes(text.replace(b"\n0\t", b"\n1\t", 1))
    encode_days(days, tmp_path / "set", settings)
    assert "day_1: not proven to be the bytes that the unfinished run" in capsys.readouterr().err
    encode_days(days, tmp_path / "new", settings)
    assert digests(tmp_path / "set") == digests(tmp_path / "new")
