"""Plans: made for any number of ranks, shown, saved, checked, refused; and what they are predicted to cost."""

import json
from dataclasses import replace

import pytest

from model import placement
from model.config import read_config
from model.placement import check_memory, make_plan, total_bytes
from model.plan_command import main
from model.plan_report import forecast, show
from model.predict import MACHINES, Job, costs, exchange_bytes, rank_bytes
from model.sharding import Piece, Plan, PlanError, read_plan, whole
from tests.model.helpers import SIZES, small_config

H200 = MACHINES["h200"]


def job_of(name="mlperf_40m.limit", batch_size=65536, optimizer="sgd"):
    return Job(read_config(name)[0], batch_size, optimizer)


@pytest.mark.parametrize("world", [1, 2, 3, 7, 8, 16, 100])
@pytest.mark.parametrize("optimizer", ["sgd", "rowwise_adagrad"])
@pytest.mark.parametrize("name", ["official_config", "mlperf_40m.limit"])
def test_a_plan_covers_every_number_once_and_fits(name, optimizer, world):
    job = job_of(name, optimizer=optimizer)
    plan = make_plan(job, world, H200)
    plan.check(job.config, world, optimizer, "here")
    check_memory(plan, job, H200)
    numbers = [0] * len(plan.sizes)
    for piece in plan.pieces:
        numbers[piece.table] += piece.rows * piece.width
    for t, size in enumerate(plan.sizes):
        assert numbers[t] == (0 if t in plan.replicated else size * plan.dim)
    if world == 1:
        assert plan.kinds() == {"whole": 26}


def test_load_and_memory_are_even():
    plan = make_plan(job_of(), 8, H200)
    found = costs(plan, job_of(), H200)
    times, sizes = [cost.milliseconds for cost in found], [cost.gigabytes for cost in found]
    assert max(times) < 1.05 * min(times) and max(sizes) < 1.2 * sum(sizes) / 8


def test_a_table_larger_than_a_rank_is_cut_by_rows_where_columns_cannot_be():
    job = job_of(optimizer="rowwise_adagrad")
    small = replace(H200, memory=18e9)  # the largest tables have 20 GB
    plan = make_plan(job, 8, small)
    check_memory(plan, job, small)
    assert "rows" in plan.kinds() and "columns" not in plan.kinds()
    by_columns = make_plan(job_of(), 8, small)
    assert "columns" in by_columns.kinds() and "rows" not in by_columns.kinds()


def test_what_cannot_fit_is_refused_with_the_shortfall_and_a_remedy():
    job, machine = job_of(optimizer="adam"), replace(H200, memory=80e9)
    with pytest.raises(PlanError) as refused:
        make_plan(job, 2, machine)
    short = (total_bytes(job, 2) - 160e9) / 1e9
    assert short > 100
    assert f"on 2 ranks of 80.0 GB, {short:.1f} GB short; what would help: 4 ranks; " in str(refused.value)
    assert "--embedding_optimizer rowwise_adagrad" in str(refused.value)
    make_plan(job, 4, machine)
    make_plan(replace(job, optimizer="rowwise_adagrad"), 2, machine)


def test_saved_and_given_back(tmp_path):
    plan = make_plan(job_of(), 12, replace(H200, memory=20e9))
    plan.write(tmp_path / "a" / "plan.json")
    assert read_plan(tmp_path / "a" / "plan.json") == plan
    lines = (tmp_path / "a" / "plan.json").read_text().splitlines()
    assert len(lines) == 28  # a line a table


def small_plan(*pieces, replicated=(), world=2, sizes=SIZES):
    rest = [t for t in range(len(sizes)) if t not in replicated and t not in {p[1] for p in pieces}]
    pieces = [*pieces, *((0, t, 0, sizes[t], 0, 8) for t in rest)]
    return Plan(world, sizes, 8, replicated, tuple(sorted(Piece(*piece) for piece in pieces)))


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (small_plan((0, 2, 0, 100, 0, 8)), "table 2: its pieces leave 800 numbers to no rank"),
        (small_plan((0, 2, 0, 120, 0, 8), (1, 2, 100, 200, 0, 8)), "table 2: .* overlap"),
        (small_plan((2, 2, 0, 200, 0, 8)), "table 2: expected ranks 0 to 1, rows within 0 to 200 .*'rank': 2"),
        (small_plan((0, 2, 0, 201, 0, 8)), "rows within 0 to 200 and columns within 0 to 8, got"),
        (small_plan((0, 2, 0, 200, 0, 8), replicated=(2,)), "table 2 is replicated and has pieces as well"),
        (small_plan(world=3), "made for 3 ranks, started with 2"),
        (small_plan(sizes=(3, 11, 200, 2)), "made for 4 tables of 216 rows and dim 8; this model has 4 of 215"),
        (small_plan((0, 2, 0, 200, 0, 4), (1, 2, 0, 200, 4, 8)), "by columns, but rowwise_adagrad needs whole rows"),
    ],
)
def test_wrong_plans_are_refused(plan, message):
    with pytest.raises(PlanError, match=f"my.json: .*{message}"):
        plan.check(small_config(), 2, "rowwise_adagrad", "my.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "expected an object of keys and values"),
        ('{"version": 2}', "expected version 1, got 2"),
        ('{"version": 1, "world": "1", "dim": 4, "tables": []}', "world: expected a valid integer, got '1'"),
        ('{"version": 1, "world": 1, "dim": 4.0, "table": []}', "table: no such key; did you mean tables"),
        ('{"version": 1, "world": 1, "dim": 4, "tables": [{"table": 1, "rows": 3}]}', "the tables 0 to 0 in order"),
        ('{"version": 1, "world": 1, "dim": 4, "tables": [{"table": 0, "rows": 3, "pieces": [{"rank": 0}]}]}', "rows"),
    ],
)
def test_damaged_plans_are_refused(tmp_path, text, message):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(PlanError, match=message):
        read_plan(tmp_path / "plan.json")


def test_a_plan_that_does_not_fit_is_refused():
    job = job_of()
    plan = whole(2, job.config, [0] * 26)
    with pytest.raises(PlanError, match=r"rank 0 needs 1\d\d\.\d GB of 80\.0 GB, \d\d\.\d GB too much"):
        check_memory(plan, job, replace(H200, memory=80e9))


def test_bytes_are_counted_by_hand():
    """Two ranks, global batch 10: table 0 replicated, 1 whole on rank 0, 2 by rows, 3 by columns."""
    config = small_config()
    plan = small_plan(
        (0, 1, 0, 11, 0, 8), (0, 2, 0, 50, 0, 8), (1, 2, 50, 200, 0, 8), (0, 3, 0, 1, 0, 3), (1, 3, 0, 1, 3, 8),
        replicated=(0,),
    )  # fmt: skip
    job = Job(config, 10)
    mlps = 13 * 16 + 16 + 16 * 8 + 8 + (8 + 10 + 1) * 16 + 16 + 16 + 1
    assert job.dense_numbers == mlps
    assert exchange_bytes(plan, job, 0) == {
        "ids": 5 * 2 * 4, "vectors": 5 * (8 + 8 + 3) * 4, "gradients": 5 * (8 + 5) * 4, "all_reduce": (3 * 8 + mlps) * 4
    }  # fmt: skip
    assert exchange_bytes(plan, replace(job, wire=2), 1)["vectors"] == 5 * (8 + 5) * 2
    assert rank_bytes(plan, job, 0) > 4 * 8 * (11 + 50 + 3)


def test_forecast_scales_as_it_must():
    one, eight = forecast(job_of(), 1, H200), forecast(job_of(), 8, H200)
    assert one["times_one_rank"] == one["strong_efficiency"] == one["weak_efficiency"] == 1
    assert 1 < eight["times_one_rank"] < 8
    large = forecast(job_of(batch_size=8 * 65536), 8, H200)
    assert large["strong_efficiency"] > eight["strong_efficiency"]
    half = forecast(replace(job_of(), wire=2), 8, H200)
    assert half["samples_per_second"] > eight["samples_per_second"]


def test_command(tmp_path, capsys):
    words = ["--model_config", "mlperf_40m.limit", "--world", "64", "--gpu", "h100", "--save_plan", tmp_path / "p.json"]
    assert main([str(word) for word in words]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["world"] == 64 and "assumed: " in said.err and said.err.count("\n") > 64
    again = ["--model_config", "mlperf_40m.limit", "--world", "64", "--plan", str(tmp_path / "p.json")]
    assert main(again) == 0
    capsys.readouterr()
    assert main([*again[:-4], "--world", "2", "--plan", str(tmp_path / "p.json")]) == 1
    assert "error: --plan" in capsys.readouterr().err
    assert main(["--model_config", "mlperf_40m.limit", "--world", "2", "--memory", "20"]) == 1
    assert "GB short; what would help: " in capsys.readouterr().err


def test_the_table_tells_every_rank():
    plan, job = make_plan(job_of("official_config"), 3, H200), job_of("official_config")
    lines = show(plan, job, H200).splitlines()
    assert lines[0].startswith("26 tables on 3 ranks: ") and len(lines) == 5
    assert placement.WIRES == {"fp32": 4, "bf16": 2, "fp16": 2}
