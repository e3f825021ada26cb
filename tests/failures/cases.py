"""What can go wrong with each public command: the faults, and how a folder is prepared for each.

A case works in a folder of its own, a copy of what template() makes: days/day_0 ... (small), set/ (their data set),
runs/ (a trained model), model.json, plan.json; BIG is beside all of them: a large day and its data set, read only.
"""

import gzip
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import train
from gpu_etl.__main__ import main as gpu_etl
from model.plan_command import main as sharding
from tests.reference import write_rows

GPU_ETL, BENCH, SHARDING = ("-m", "gpu_etl"), ("-m", "bench"), ("-m", "model.sharding")
TRAIN, DIST = ("train.py",), ("-m", "torch.distributed.run", "--nproc_per_node=2", "dist_train.py")
FLAGS = ("--model_config", "criteo_kaggle_tiny", "--threads", "1", "--batch_size", "128", "--test_batch_size", "256",
         "--lr", "0.1", "--warmup_steps", "2", "--epochs", "1", "--device", "cpu")  # fmt: skip
DAYS = ("days/day_0", "days/day_1", "days/day_2")
FULL_BYTES = "300k"  # of the disk that is full


@dataclass(frozen=True)
class Case:
    """A fault of one command. words: behind python, in which W/ is the case's folder and BIG/ the one beside all.

    prepare: changes the folder first; ctrl_c: SIGINT is sent once stderr shows this; twice: the command ran before;
    guarded: may not read what the file's mode forbids, even as root; full: W/full is a disk of FULL_BYTES.
    """

    command: str
    fault: str
    words: tuple[str, ...]
    prepare: Callable[[Path], object] = lambda folder: None
    ctrl_c: str = ""
    twice: bool = False
    guarded: bool = False
    full: bool = False


def template(folder: Path) -> None:
    """What every case gets a copy of."""
    (folder / "days").mkdir(parents=True)
    days = [folder / day for day in DAYS]
    for day, path in enumerate(days):
        path.write_bytes(write_rows(seed=day, rows=(500, 301, 251)[day]))
    assert gpu_etl(["encode", *map(str, days), "--out", str(folder / "set")]) == 0
    words = ["--dataset", str(folder / "set"), *FLAGS, "--output_dir", str(folder / "runs"), "--save_freq", "4"]
    assert train.main([*words, "--epochs", "2"]) == 0
    shutil.copy(Path(train.__file__).parent / "model" / "configs" / "criteo_kaggle_tiny.json", folder / "model.json")
    words = ["--model_config", "criteo_kaggle_tiny", "--world", "2", "--gpu", "cpu", "--batch_size", "128"]
    assert sharding([*words, "--save_plan", str(folder / "plan.json")]) == 0


def big(folder: Path) -> None:
    """Large days and their data set, for what is stopped on the way."""
    assert gpu_etl(["synth", "--out", str(folder / "days"), "--rows", "400000", "--no-gzip", "--days", "2"]) == 0
    assert gpu_etl(["encode", str(folder / "days"), "--out", str(folder / "set")]) == 0


def cut(path: str) -> Callable[[Path], object]:
    return lambda folder: os.truncate(folder / path, (folder / path).stat().st_size * 6 // 10)


def empty(path: str) -> Callable[[Path], object]:
    return lambda folder: (folder / path).write_bytes(b"")


def gone(path: str) -> Callable[[Path], object]:
    return lambda folder: (folder / path).unlink()


def other(path: str) -> Callable[[Path], object]:
    return lambda folder: (folder / path).write_bytes(b"<!DOCTYPE html>\n<html><body>Not found</body></html>\n")


def closed(path: str) -> Callable[[Path], object]:
    return lambda folder: (folder / path).chmod(0)


def squeezed(folder: Path) -> None:
    """day_2 as a gzip file that breaks off."""
    data = gzip.compress((folder / DAYS[2]).read_bytes())
    (folder / DAYS[2]).write_bytes(data[: len(data) * 6 // 10])


def swollen(folder: Path) -> None:
    """Two gzip days of more rows than their sizes let expect."""
    row = write_rows(seed=1, rows=1)
    for day in (7, 8):
        (folder / "days" / f"day_{day}.gz").write_bytes(gzip.compress(row * (3000 + day)))


def _faults(command: str, words: tuple, path: str, kind: Callable = other, **more) -> Iterator[Case]:
    """The faults of a file that a command reads."""
    yield Case(command, f"missing file ({path})", words, gone(path), **more)
    yield Case(command, f"empty file ({path})", words, empty(path), **more)
    yield Case(command, f"file of another kind ({path})", words, kind(path), **more)
    yield Case(command, f"file cut off ({path})", words, cut(path), **more)
    yield Case(command, f"unreadable file ({path})", words, closed(path), guarded=True, **more)


def of_gpu_etl() -> Iterator[Case]:
    """encode, verify, inspect, synth, doctor."""
    encode = (*GPU_ETL, "encode", *(f"W/{day}" for day in DAYS), "--out", "W/new")
    yield from _faults("encode", encode, DAYS[1])
    yield Case("encode", "gzip file cut off", encode, squeezed)
    yield Case("encode", "unreadable folder", (*GPU_ETL, "encode", "W/days", "--out", "W/new"), closed("days"),
               guarded=True)  # fmt: skip
    into = (*GPU_ETL, "encode", *(f"W/{day}" for day in DAYS), "--out")
    yield Case("encode", "--out below a file", (*into, "W/model.json/set"))
    yield Case("encode", "--out in a folder without write permission", (*into, "W/days/set"),
               lambda folder: (folder / "days").chmod(0o500), guarded=True)  # fmt: skip
    yield Case("encode", "full disk", (*into, "W/full/set"), full=True)
    dense = (*GPU_ETL, "encode", "W/days/day_7.gz", "W/days/day_8.gz", "--out", "W/full/set")
    yield Case("encode", "disk that fills up", dense, swollen, full=True)
    yield Case("encode", "second run, same days", encode, twice=True)
    yield Case("encode", "second run, other settings", (*into, "W/set", "--seed", "9"))
    slow = (*GPU_ETL, "encode", "BIG/days", "--out", "W/new", "--slab-bytes", "65536")
    yield Case("encode", "Ctrl-C", slow, ctrl_c="rows/s]")
    for name, words in (("verify", ("verify", "W/set")), ("inspect", ("inspect", "W/set"))):
        for path in ("set/manifest.json", "set/terabyte_processed_train.bin"):
            yield from _faults(name, (*GPU_ETL, *words), path)
        yield Case(name, "missing folder", (*GPU_ETL, name, "W/nowhere"))
        yield Case(name, "unreadable folder", (*GPU_ETL, *words), closed("set"), guarded=True)
        yield Case(name, "second run", (*GPU_ETL, *words), twice=True)
        yield Case(name, "Ctrl-C", (*GPU_ETL, name, "BIG/set"), ctrl_c=name)
    yield from _faults("verify", (*GPU_ETL, "verify", "W/set"), "set/vocabulary.npz")
    draw = (*GPU_ETL, "inspect", "W/set", "--png")
    yield Case("inspect", "full disk (--png)", (*draw, "W/full/a.png"), filled, full=True)
    yield Case("inspect", "--png below a file", (*draw, "W/model.json/a.png"))
    synth = (*GPU_ETL, "synth", "--rows", "20000", "--out")
    yield Case("synth", "--out below a file", (*synth, "W/model.json/days"))
    yield Case("synth", "full disk", (*synth, "W/full/days"), full=True)
    yield Case("synth", "second run", (*synth, "W/new"), twice=True)
    yield Case("synth", "folder with other days", (*synth, "W/days", "--no-gzip"))
    yield Case("synth", "Ctrl-C", (*GPU_ETL, "synth", "--rows", "9000000", "--out", "W/new"), ctrl_c="rows/s]")
    yield Case("doctor", "missing folder (--out)", (*GPU_ETL, "doctor", "--out", "W/nowhere"))
    yield Case("doctor", "unknown check", (*GPU_ETL, "doctor", "--only", "nothing"))
    yield Case("doctor", "Ctrl-C", (*GPU_ETL, "doctor", "--only", "cpu"), ctrl_c="s  ")


def filled(folder: Path) -> None:
    """No byte is left on the full disk."""
    with open(folder / "full" / "ballast", "wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            return


def other_state(folder: Path) -> None:
    """The checkpoint's state is JSON of another kind."""
    for path in (folder / "runs").glob("step_*/state.json"):
        path.write_text(json.dumps([1, None]))


def each_state(change: Callable[[Path], object]) -> Callable[[Path], object]:
    def prepare(folder: Path) -> None:
        for path in (folder / "runs").glob("step_*/state.json"):
            change(path)

    return prepare


def _trained(name: str, words: tuple) -> Iterator[Case]:
    """The faults of a checkpoint."""
    yield Case(name, "missing folder (--ckpt)", words, lambda folder: shutil.rmtree(folder / "runs"))
    yield Case(name, "empty file (state.json)", words, each_state(lambda path: path.write_bytes(b"")))
    yield Case(name, "file of another kind (state.json)", words, other_state)
    yield Case(name, "file cut off (state.json)", words, each_state(lambda path: os.truncate(path, 300)))
    yield Case(name, "unreadable folder (--ckpt)", words, closed("runs"), guarded=True)


def of_training() -> Iterator[Case]:
    """train.py's modes, and dist_train.py."""
    for name, script in (("train.py", TRAIN), ("dist_train.py, 2 ranks", DIST)):
        words = (*script, "--dataset", "W/set", *FLAGS, "--output_dir", "W/new", "--save_freq", "3")
        yield from _faults(name, words, "set/terabyte_processed_train.bin")
        yield Case(name, "missing folder (--dataset)", words, lambda folder: shutil.rmtree(folder / "set"))
        yield Case(name, "unreadable folder (--dataset)", words, closed("set"), guarded=True)
        yield Case(name, "full disk (--output_dir)", (*words, "--output_dir", "W/full/new"), full=True)
        yield Case(name, "--output_dir below a file", (*words, "--output_dir", "W/model.json/new"))
        yield Case(name, "second run in the same folder", words, twice=True)
        yield Case(name, "Ctrl-C", (*words, "--epochs", "1000"), ctrl_c="step/s")
    words = (*TRAIN, "--dataset", "W/set", *FLAGS, "--output_dir", "W/new", "--model_config", "W/model.json")
    yield from _faults("train.py", words, "model.json")
    yield from _faults("train.py", (*TRAIN, "--dataset", "W/set", *FLAGS, "--output_dir", "W/new"), "set/manifest.json")
    again = (*TRAIN, "--dataset", "W/set", *FLAGS, "--ckpt", "W/runs", "--output_dir", "W/new")
    yield from _trained("train.py --ckpt", again)
    mode = (*TRAIN, "--ckpt", "W/runs", "--dataset", "W/set", "--threads", "1", "--device", "cpu", "--mode")
    yield from _trained("train.py --mode test", (*mode, "test"))
    yield Case("train.py --mode test", "second run", (*mode, "test"), twice=True)
    predict = (*mode, "predict", "--input", "W/days/day_2", "--output", "W/scores.parquet")
    yield from _faults("train.py --mode predict", predict, DAYS[2])
    yield from _faults("train.py --mode predict", predict, "set/vocabulary.npz")
    yield Case("train.py --mode predict", "full disk", (*predict, "--output", "W/full/s.parquet"), filled, full=True)
    yield Case("train.py --mode predict", "second run", predict, twice=True)
    yield Case("train.py --mode predict", "output is the input's folder", (*predict, "--output", "W/days"))
    yield Case("train.py --mode predict", "Ctrl-C", (*predict, "--input", "BIG/days/day_0"), ctrl_c="batch/s")
    export = (*mode, "export", "--output", "W/model.pt2")
    yield from _trained("train.py --mode export", export)
    yield Case("train.py --mode export", "full disk", (*export, "--output", "W/full/model.pt2"), filled, full=True)
    yield Case("train.py --mode export", "second run", export, twice=True)
    benchmark = (*mode, "inference_benchmark", "--inference_benchmark_steps", "3")
    yield from _trained("train.py --mode inference_benchmark", benchmark)
    yield Case("train.py --mode inference_benchmark", "second run", benchmark, twice=True)


def of_others() -> Iterator[Case]:
    """The planner and the benchmarks."""
    plan = (*SHARDING, "--model_config", "criteo_kaggle_tiny", "--world", "2", "--gpu", "cpu", "--batch_size", "128")
    yield from _faults("model.sharding --plan", (*plan, "--plan", "W/plan.json"), "plan.json")
    yield from _faults("model.sharding --model_config", (*plan, "--model_config", "W/model.json"), "model.json")
    save = (*plan, "--save_plan")
    yield Case("model.sharding", "full disk (--save_plan)", (*save, "W/full/plan.json"), filled, full=True)
    yield Case("model.sharding", "--save_plan below a file", (*save, "W/model.json/plan"))
    yield Case("model.sharding", "second run (--save_plan)", (*save, "W/new.json"), twice=True)
    yield Case("bench", "unknown benchmark", (*BENCH, "nothing"))
    yield Case("bench kaggle", "missing file (--input)", (*BENCH, "kaggle", "--input", "W/nowhere"))
    yield Case("bench kaggle", "empty file (--input)", (*BENCH, "kaggle", "--input", "W/days/day_0"), empty(DAYS[0]))
    for words in (("load", "--rows", "2000"), ("train", "--quick"), ("scaling", "--world", "1")):
        yield Case(f"bench {words[0]}", "missing file (--model_config)", (*BENCH, *words, "--model_config", "W/no"))
    yield Case("bench quickstart", "--out below a file", (*BENCH, "quickstart", "--out", "W/model.json/x"))
    yield Case("bench quickstart", "Ctrl-C", (*BENCH, "quickstart", "--out", "W/new"), ctrl_c="rows/s]")


def all_cases() -> list[Case]:
    """Every case, command by command."""
    return [*of_gpu_etl(), *of_training(), *of_others()]
