"""The learning rate, step by step."""

import pytest

from model.cli import options
from model.cli.flags import build_parser
from model.training.schedule import Schedule
from tests.reference import learning_rate

RECIPES = [
    # lr, warm-up, factor, decay start, decay steps, power, end
    (0.1, 2750, 0, 49315, 27772, 2, 0.0),
    (8.0, 1000, 0, 48000, 0, 2, 8.0),
    (24.0, 10, 3, 20, 15, 2, 1.0),
    (1.0, 0, 0, 0, 5, 1, 0.25),
    (1.0, 5, 0, 2, 10, 3, 0.0),
]


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_step_is_the_formula(recipe):
    lr, warmup, factor, start, steps, power, end = recipe
    schedule = Schedule(lr, warmup, factor, start, steps, power, end)
    edges = {warmup, start, start + steps}
    for step in {s + d for s in edges for d in range(-3, 4)} | set(range(1, 40)) | {10**6}:
        if step >= 1:
            assert schedule.at(step) == pytest.approx(learning_rate(step, *recipe), rel=1e-12, abs=1e-15)


@pytest.mark.parametrize(
    ("step", "expected"),
    [(1, 0.1 / 2750), (1375, 0.05), (2750, 0.1), (49315, 0.1), (63201, 0.025), (77087, 0.0), (10**6, 0.0)],
)
def test_deepsparkhubs_recipe_at_known_steps(step, expected):
    assert Schedule(*RECIPES[0]).at(step) == pytest.approx(expected)


def test_what_a_run_will_not_see_is_told():
    schedule = Schedule(*RECIPES[0])
    assert len(schedule.warnings(2000)) == 2
    (only,) = schedule.warnings(14_750)
    assert "never reached in 14750 steps" in only
    assert schedule.warnings(49_316) == []
    assert Schedule(1.0).warnings(10) == []


@pytest.mark.parametrize(
    ("warmup", "steps", "words"),
    [
        (10, 5, "outlasts the run of 5: the learning rate ends at 0.05, not 0.1"),
        (10**6, 10**6 - 1, "ends at 0.0999999, not 0.1"),
        (10**15, 10**15 - 1, "ends at 0.09999999999999991, not 0.1"),
        (7, 7, "fills the run of 7: the learning rate reaches 0.1 in the last step only"),
    ],
)
def test_a_warm_up_that_is_too_long_ends_elsewhere_than_at_the_height(warmup, steps, words):
    (only,) = Schedule(0.1, warmup).warnings(steps)
    assert words in only


@pytest.mark.parametrize(
    ("unit", "lengths", "steps"),
    [
        ("steps", (3, 7, 5), (3, 7, 5)),
        ("samples", (101, 200, 299), (2, 2, 3)),  # of batches of 100: a step that has begun counts
        ("epochs", (0.15, 0.26, 0.5), (3, 6, 10)),  # of epochs of 20 steps: 3, 5.2, 10
    ],
)
def test_lengths_in_any_unit_become_steps_rounded_up(unit, lengths, steps):
    flags = ["--schedule_unit", unit, "--batch_size", "100", "--dataset", "x"]
    for name, length in zip(("--warmup_steps", "--decay_start_step", "--decay_steps"), lengths, strict=True):
        flags += [name, str(length)]
    found = options.schedule(build_parser("").parse_args(flags), steps_per_epoch=20)
    assert (found.warmup_steps, found.decay_start_step, found.decay_steps) == steps
