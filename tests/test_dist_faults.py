"""Ranks killed, starved and misled for real: the job ends everywhere, soon, with the words of the one that failed, and
goes on from its last checkpoint to the same weights."""

import functools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from gpu_etl.pipeline import Settings, encode_days
from model.checkpoint import files as checkpoint
from model.distributed.trainer import RankTrainer
from tests.conftest import ROOT
from tests.ranks import free_port, run_main
from tests.test_kill_training import digests

FLAGS = ["--batch_size", "32", "--test_batch_size", "200", "--lr", "0.01", "--warmup_steps", "5", "--save_freq", "4",
         "--keep", "2", "--test_freq", "9", "--optimizer", "adam", "--embedding_optimizer", "adagrad", "--threads", "1",
         "--model_config", "criteo_kaggle_tiny", "--auc_threshold", "1"]  # fmt: skip
SOON = 30


@pytest.fixture(scope="module")
def folder(day_files, tmp_path_factory):
    out = tmp_path_factory.mktemp("set")
    encode_days(day_files, out, Settings())
    return out


def flags(folder, out):
    return ["--dataset", str(folder), "--output_dir", str(out), *FLAGS]


def at_step(number, action):
    """Do something in the midst of step `number`: after forward, before backward."""
    real = RankTrainer.loss

    def loss(self, batch):
        if self.steps == number:
            action()
        return real(self, batch)

    RankTrainer.loss = loss


def ends_soon(ends, failed, message, status=1):
    """All ranks ended soon after the first; one of them, once, said the message."""
    said = "".join(end.err for end in ends)
    assert max(end.seconds for end in ends) < SOON
    assert ends[failed].status == status and all(end.status == 1 for r, end in enumerate(ends) if r != failed), said
    assert said.count(message) == 1 and said.count("error: ") == 1 and "Traceback" not in said, said


KILLED = "was killed by SIGKILL"


def kill_rank_1(rank, words):
    if rank == 1:
        at_step(7, lambda: os.kill(os.getpid(), signal.SIGKILL))


def test_a_rank_is_killed(folder, tmp_path):
    ends = run_main(3, flags(folder, tmp_path), tmp_path, kill_rank_1)
    ends_soon(ends, 1, KILLED, -signal.SIGKILL)
    assert re.search(rf"error: rank 1 of 3, process \d+ on \S+, {KILLED} ", "".join(end.err for end in ends))
    assert [path.name for path in sorted(tmp_path.glob("step_*"))] == ["step_4"]


def kill_while_saving(rank, words):
    real, count = checkpoint.save_file, []

    def save_file(tensors, path):
        count.append(path)
        if rank == 1 and len(count) == 3:  # of the second checkpoint, the first of two files
            path.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        return real(tensors, path)

    checkpoint.save_file = save_file


def test_a_rank_is_killed_while_it_writes_a_checkpoint(folder, tmp_path):
    ends = run_main(2, flags(folder, tmp_path), tmp_path, kill_while_saving)
    ends_soon(ends, 1, KILLED, -signal.SIGKILL)
    assert checkpoint.find(tmp_path).name == "step_4"


def starve(rank, words):
    if rank == 1:

        def fill():
            resource.setrlimit(resource.RLIMIT_AS, (8 << 30, resource.RLIM_INFINITY))
            torch.ones(4 << 30)

        at_step(5, fill)


def test_a_rank_runs_out_of_memory(folder, tmp_path):
    ends = run_main(2, flags(folder, tmp_path), tmp_path, starve)
    ends_soon(ends, 1, "rank 1: error: out of memory: ")
    assert "start more ranks, lower --batch_size" in ends[1].err


def other_set(rank, words):
    if rank == 1:
        at = words.index("--dataset") + 1
        words[at] = words[at] + "_of_rank_1"
    return words


def test_a_rank_has_no_data(folder, tmp_path):
    ends = run_main(2, flags(folder, tmp_path), tmp_path, other_set)
    ends_soon(ends, 1, "_of_rank_1: no data set; expected")


def test_a_rank_has_less_data(folder, day_files, tmp_path):
    encode_days(day_files[1:], tmp_path / "set_of_rank_1", Settings())
    words = flags(folder, tmp_path)
    words[1] = str(tmp_path / "set")
    (tmp_path / "set").symlink_to(folder)
    ends = run_main(2, words, tmp_path, other_set)
    ends_soon(ends, 1, "not the data set that rank 0 sees: ")
    assert "train: 301 here, 801 on rank 0" in ends[1].err


def add_flags(more, rank, words):
    return [*words, *more] if rank == 1 else words


def with_flags(*more):
    """Rank 1 gets flags of its own."""
    return functools.partial(add_flags, more)


@pytest.mark.parametrize(
    "more",
    [
        ["--lr", "0.02"], ["--seed", "1"], ["--noshuffle_batch_order"], ["--epochs", "2"], ["--test_freq", "5"],
        ["--save_freq", "3"], ["--batch_size", "31"], ["--optimizer", "sgd"], ["--wire_dtype", "bf16"],
        ["--cache_eval_data"], ["--save_behind"], ["--auc_threshold", "0.9"], ["--mode", "test", "--ckpt", "x"],
    ],
    ids=lambda more: more[0],
)  # fmt: skip
def test_a_rank_has_another_flag(folder, tmp_path, more):
    """Before the first step, and before anything is written: else other weights, or a hang with beats going on."""
    ends = run_main(2, flags(folder, tmp_path), tmp_path, with_flags(*more))
    ends_soon(ends, 1, "rank 1: error: not the flags of rank 0: ")
    assert f"{more[0].replace('--no', '--')}: " in ends[1].err and " on rank 0" in ends[1].err
    assert not list(tmp_path.glob("step_*"))


@pytest.mark.slow
def test_ranks_may_have_other_paths_and_loaders(folder, tmp_path):
    more = with_flags("--loader", "dali", "--prefetch", "3", "--log_dir", str(tmp_path / "nowhere"))
    ends = run_main(2, flags(folder, tmp_path), tmp_path, more)
    assert [end.status for end in ends] == [0, 0], ends
    assert not (tmp_path / "nowhere").exists()


def test_a_rank_has_other_bytes_under_the_same_manifest(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "set_of_rank_1")
    (tmp_path / "set").symlink_to(folder)
    path = tmp_path / "set_of_rank_1" / "terabyte_processed_train.bin"
    data = bytearray(path.read_bytes())
    data[160 * 400] ^= 1  # one label
    path.write_bytes(data)
    ends = run_main(2, flags(tmp_path / "set", tmp_path), tmp_path, other_set)
    ends_soon(ends, 1, "not the data set that rank 0 sees: bytes of train: ")


def test_a_rank_has_another_model(folder, tmp_path):
    values = json.loads((ROOT / "model/configs/criteo_kaggle_tiny.json").read_text())
    (tmp_path / "m.json").write_text(json.dumps(values | {"self_interaction": True}))
    more = with_flags("--model_config", str(tmp_path / "m.json"))
    ends = run_main(2, flags(folder, tmp_path), tmp_path, more)
    ends_soon(ends, 1, "not the model that rank 0 has: self_interaction: True here, False on rank 0")


def drift(rank, words):
    """One weight of rank 1 changes by itself."""
    if rank == 1:
        real = RankTrainer.step

        def step(self, batch):
            if self.steps == 6:
                with torch.no_grad():
                    self.model.top[0].weight[0, 0] += 1e-3
            return real(self, batch)

        RankTrainer.step = step


@pytest.mark.slow
def test_a_rank_whose_weights_drift_away_is_noticed_at_the_next_save(folder, tmp_path):
    ends = run_main(2, [*flags(folder, tmp_path), "--print_freq", "1000"], tmp_path, drift)
    ends_soon(ends, 1, "rank 1: error: this rank does not train what rank 0 trains: digest of the weights: ")
    assert [path.name for path in tmp_path.glob("step_*")] == ["step_4"]


def torchrun(*lines):
    """Run torchrun with each line of words, side by side: (exit status, stdout, stderr) of each."""
    start, pipe = [sys.executable, "-m", "torch.distributed.run"], subprocess.PIPE
    agents = [
        subprocess.Popen([*start, *map(str, words)], cwd=ROOT, stdout=pipe, stderr=pipe, text=True) for words in lines
    ]
    try:
        said = [agent.communicate(timeout=150) for agent in agents]
    finally:
        for agent in agents:
            agent.terminate()  # takes its ranks along
    return [(agent.returncode, *words) for agent, words in zip(agents, said, strict=True)]


# dist_train.py, of which rank 1 kills itself in step 7 of the first attempt.
FRAIL = """
import os, signal, sys
sys.path.insert(0, {root!r})
import dist_train
from tests.test_dist_faults import kill_rank_1
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    kill_rank_1(int(os.environ["RANK"]), [])
sys.exit(dist_train.main())
"""


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    assert [end.status for end in run_main(2, flags(folder, out), out)] == [0, 0]
    return digests(checkpoint.find(out))


@pytest.mark.slow
def test_torchrun_starts_again_and_ends_with_the_same_weights(folder, tmp_path, whole):
    script = tmp_path / "frail.py"
    script.write_text(FRAIL.format(root=str(ROOT)))
    words = ["--standalone", "--nproc_per_node=2", "--max-restarts=1", script, *flags(folder, tmp_path / "run")]
    ((status, out, err),) = torchrun(words)
    assert status == 0, err
    assert "started again, time 1" in err and f"going on from {tmp_path}/run/step_4, step 4" in err
    assert digests(checkpoint.find(tmp_path / "run")) == whole
    assert out.count('"command": "dist_train"') == 1
    ((status, _, err),) = torchrun(words)
    assert status != 0 and "holds step_26 of an earlier run" in err


def meeting(port):
    return ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}",
            "--rdzv_id=job", "--local_addr=127.0.0.1"]  # fmt: skip


def test_two_machines(folder, tmp_path, whole):
    """Two agents that meet at a c10d rendezvous, one rank each, as on two machines."""
    words = [*meeting(free_port()), "dist_train.py", *flags(folder, tmp_path / "run")]
    ended = torchrun(words, words)
    assert [status for status, *_ in ended] == [0, 0], ended
    assert digests(checkpoint.find(tmp_path / "run")) == whole


STOP_HERE = """
import sys
sys.path.insert(0, {root!r})
import dist_train
from tests.test_dist_faults import at_step
import os, signal
if os.environ["GROUP_RANK"] == "1":
    agent = os.getppid()
    at_step(7, lambda: (os.kill(agent, signal.SIGKILL), os.kill(os.getpid(), signal.SIGKILL)))
sys.exit(dist_train.main())
"""


@pytest.mark.slow
def test_one_of_two_machines_is_lost(folder, tmp_path):
    """The second agent and its rank die at once; the first agent ends, and says why."""
    script = tmp_path / "lost.py"
    script.write_text(STOP_HERE.format(root=str(ROOT)))
    words = [*meeting(free_port()), script, *flags(folder, tmp_path / "run")]
    start = time.monotonic()
    lost, left = sorted(torchrun(words, words))
    assert (lost[0], left[0]) == (-signal.SIGKILL, 1) and time.monotonic() - start < 60
    words = left[2]  # which of the two machines holds the job's store is for torchrun to choose
    gone, deaf = "error: rank 1 of 2, process ", "error: the job's store does not answer"
    assert words.count(gone) + words.count(deaf) == 1, words


@pytest.mark.slow
def test_launch_as_older_readmes_write_it(folder, tmp_path, whole):
    words = ["--use_env", "--nproc_per_node", "2", f"--master_port={free_port()}", "dist_train.py",
             *flags(folder, tmp_path)]  # fmt: skip
    line = [sys.executable, "-m", "torch.distributed.launch", *words]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert digests(checkpoint.find(tmp_path)) == whole


def test_sigterm_makes_all_ranks_save_and_end(folder, tmp_path):
    ends = run_main(2, flags(folder, tmp_path), tmp_path, ask_rank_1_to_stop)
    assert [end.status for end in ends] == [143, 143], ends
    found = checkpoint.find(tmp_path)
    assert f"go on with --ckpt {found}" in ends[0].err and checkpoint.read_state(found).steps in (8, 9)


def ask_rank_1_to_stop(rank, words):
    if rank == 1:
        at_step(7, lambda: os.kill(os.getpid(), signal.SIGTERM))
