"""A short run of the fuzzer, and that it sees what it is there to see.

python -m tests.fuzz --minutes 10    for the long run
"""

import random

import pytest

from tests.fuzz import child, raw
from tests.fuzz.__main__ import MOST_BYTES, fuzz
from tests.fuzz.case import Case, WrongError
from tests.fuzz.kinds import KINDS


def test_a_short_run_finds_nothing():
    kinds = [kind for kind in KINDS if kind != "bombs"]  # which take seconds each
    found = fuzz(kinds, seed=7, seconds=300, count=2 * len(kinds))
    assert not found["faults"], found["faults"]
    assert sum(sum(ends.values()) for ends in found["cases"].values()) == 2 * len(kinds)
    assert found["peak_bytes"] < MOST_BYTES


@pytest.mark.parametrize(
    ("main", "words"),
    [
        (lambda words: 3, "exit status 3"),
        (lambda words: 1, "not one error"),
        (lambda words: print("error: a\nerror: b", file=child.sys.stderr) or 1, "not one error"),
        (lambda words: print("error: : no such file", file=child.sys.stderr) or 1, "words that are none"),
        (lambda words: print("Traceback (most recent call last):", file=child.sys.stderr) or 0, "words that are none"),
        (lambda words: print('{"auc": NaN}') or 0, "NaN in the result"),
    ],
)
def test_ends_that_may_not_be_are_seen(main, words):
    with pytest.raises(WrongError, match=words):
        child._run(main, [])


def test_a_case_is_the_same_for_the_same_seed(tmp_path):
    made = []
    for turn in range(2):
        case = Case(tmp_path, random.Random("text 3"), None)
        made.append([case.mutate(bytes(range(256)) * turn or bytes(range(256))) for _ in range(20)])
    assert made[0] == made[1] and len(set(made[0])) > 10


def test_a_difference_to_the_reference_is_a_fault(tmp_path, monkeypatch):
    """Rows of the reference with one more click: the case of text must notice."""
    (tmp_path / "template" / "days").mkdir(parents=True)
    real = raw.encode_days

    def other(days, *rules, **more):
        found = real(days, *rules, **more)
        found[0][0][0] ^= 1
        return found

    ends = [child.one(tmp_path, "text", seed, MOST_BYTES) for seed in range(4)]
    monkeypatch.setattr(raw, "encode_days", other)
    wrong = [child.one(tmp_path, "text", seed, MOST_BYTES) for seed in range(4)]
    right = [turn for turn, end in enumerate(ends) if end["statuses"] == [0]]
    assert right and not any("fault" in end for end in ends)
    assert all("is another than the reference's" in wrong[turn]["fault"] for turn in right)
