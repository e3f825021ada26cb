"""Counting, merging and numbering of category values."""

import numpy as np
import pytest

from gpu_etl.backend.cpu import slab as cpu
from gpu_etl.common.errors import DataError
from gpu_etl.rows import scalar as rows, vocabulary
from gpu_etl.rows.numbered import NUMBERED
from gpu_etl.rows.random_keys import keys_of
from gpu_etl.schema import PRESETS, choose_preset
from tests import reference


def parsed(seed, rows_):
    text = np.frombuffer(reference.write_rows(seed, rows_), np.uint8)
    values, missing, codes = cpu.parse(text, cpu.find_rows(text))
    assert not codes.any()
    return values, missing


def count(values, missing, preset, slab=0, workers=2, first_row=0):
    dictionaries = cpu.Dictionaries(preset, workers)
    slab = slab or len(values)
    for begin in range(0, len(values), slab):
        piece = np.array(values[begin : begin + slab], order="F")
        dictionaries.code(piece, missing[begin : begin + slab], first_row + begin)
    dictionaries.close()
    return dictionaries.counts()


def as_sets(counts):
    return [set(zip(c.keys.tolist(), c.counts.tolist(), c.first_rows.tolist(), strict=True)) for c in counts.columns]


def same(a, b):
    return as_sets(a) == as_sets(b)


PRESET_CASES = [("mlperf", 0, 0), ("mlperf", 0, 100), ("count", 0, 0), ("count", 3, 0), ("count", 10, 50)]


@pytest.mark.parametrize(("name", "min_count", "index_range"), PRESET_CASES)
def test_ids_are_those_of_the_reference(name, min_count, index_range):
    preset = choose_preset(name, min_count=min_count, max_index_range=index_range)
    values, missing = parsed(7, 900)
    words, _ = vocabulary.build(count(values, missing, preset), preset)
    expected = reference.vocabularies(reference.read_rows(reference.write_rows(7, 900)), name, min_count, index_range)
    for c, ids in enumerate(expected):
        found = {int(key): preset.first_id + i for i, key in enumerate(words.keys[c])}
        assert found == ids
        assert words.table_sizes[c] == max([0, *ids.values()]) + 1
    lookup = words.lookup()
    for c, ids in enumerate(expected):
        for key in [*ids, 12345, 0xFFFFFFFE]:
            slot = rows.find_slot(lookup.table, lookup.base[c], lookup.mask[c], key)
            assert rows.entry_payload(lookup.table[slot]) == (ids[key] + 1 if key in ids else 0)


@pytest.mark.parametrize("slab", [1, 13, 512, 899])
@pytest.mark.parametrize("workers", [1, 3, 99])
def test_slabs_and_workers_do_not_matter(slab, workers):
    values, missing = parsed(2, 900)
    assert same(count(values, missing, PRESETS["count"], slab, workers), count(values, missing, PRESETS["count"]))


@pytest.mark.parametrize("name", ["mlperf", "count"])
def test_codes_lead_to_the_ids_that_encode_finds(name):
    preset = choose_preset(name, min_count=4 if name == "count" else 0, max_index_range=5000)
    values, missing = parsed(5, 900)
    dictionaries = cpu.Dictionaries(preset, 2)
    coded, keys = np.array(values, order="F"), []
    for begin in (0, 333, 899):
        end = {0: 333, 333: 899, 899: 900}[begin]
        piece = np.array(coded[begin:end], order="F")
        cpu.integers(piece, missing[begin:end])
        dictionaries.code(piece, missing[begin:end], begin)
        coded[begin:end] = piece
        keys.append(dictionaries.new_keys()())
    words, ids = vocabulary.build(dictionaries.counts(), preset)
    numbered = np.empty(900, NUMBERED)
    numbered["row"], numbered["coded"] = np.random.default_rng(0).permutation(900), coded.view(np.int32)
    order = np.argsort(keys_of(4, numbered["row"]))
    found = np.empty((900, 40), np.int32)
    coded = np.ascontiguousarray(coded).view(np.int32)
    finisher = cpu.Finisher(ids, np.zeros(1, np.int64))
    finisher.take_shuffled(numbered, 4)
    finisher.finish(0, len(order), found)
    assert found.tolist() == cpu.encode(values, missing, words.lookup(), preset)[order].tolist()

    # Dictionaries that take over their keys and rows count the same, and go on with the same codes.
    joined = [np.concatenate(column) for column in zip(*keys, strict=True)]
    again = cpu.Dictionaries(preset, 1, joined)
    again.recount(coded[500:], np.arange(500, 900))
    again.recount(coded[:500], np.arange(500))
    for one, other in zip(again.counts().columns, dictionaries.counts().columns, strict=True):
        assert all((getattr(one, f) == getattr(other, f)).all() for f in ("keys", "counts", "first_rows"))
    assert not any(len(column) for column in again.new_keys()())
    more = np.array(values, order="F")
    again.code(more, missing, 900)
    assert (more[:, 14:].view(np.int32) == coded[:, 14:]).all()


def test_partial_counts_merge_in_any_order():
    values, missing = parsed(4, 700)
    preset = PRESETS["mlperf"]
    whole = count(values, missing, preset)
    parts = [count(values[a:b], missing[a:b], preset, first_row=a) for a, b in ((0, 100), (100, 101), (101, 700))]
    assert same(parts[0].merge(parts[1]).merge(parts[2]), whole)
    assert same(parts[2].merge(parts[0].merge(parts[1])), whole)


def test_many_distinct_values_make_the_tables_grow():
    n = 20_000
    values = np.zeros((n, 40), np.uint32)
    values[:, 14:] = (np.arange(n, dtype=np.uint32) * np.uint32(2654435761))[:, None]
    values[:, 20] = 0xFFFFFFFF
    found = count(values, np.zeros(n, np.uint64), PRESETS["mlperf"], slab=3000)
    assert [len(column.keys) for column in found.columns] == [n] * 6 + [1] + [n] * 19
    assert found.columns[6].keys.tolist() == [0xFFFFFFFF]
    assert found.columns[6].counts.tolist() == [n]


def test_saved_vocabulary_reads_back(tmp_path):
    values, missing = parsed(7, 300)
    words, _ = vocabulary.build(count(values, missing, PRESETS["count"]), PRESETS["count"])
    words.save(tmp_path)
    again = vocabulary.Vocabulary.load(tmp_path)
    assert again.first_id == words.first_id
    assert all((a == b).all() for a, b in zip(again.keys + again.counts, words.keys + words.counts, strict=True))
    with pytest.raises(DataError, match="no such file"):
        vocabulary.Vocabulary.load(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("name", "rules", "words"),
    [
        ("none", {}, "expected one of"),
        ("count", {"min_count": -1}, "--min-count"),
        ("count", {"max_index_range": 2**31}, "--max-index-range"),
        ("count", {"max_table_size": 1}, "expected more than 1"),
        ("count", {"dense": "log"}, "--dense: expected one of clamp, min, plus2"),
        ("count", {"last_day": "all"}, "--last-day: expected one of"),
        ("count", {"sample_last": 1.5}, "--sample-last: expected a share"),
        ("mlperf", {"min_count": 5}, "no id for rare ones"),
        ("mlperf", {"max_table_size": 5}, "no id for rare ones"),
    ],
)
def test_presets_refuse_what_they_cannot_do(name, rules, words):
    with pytest.raises(DataError, match=words):
        choose_preset(name, **rules)
