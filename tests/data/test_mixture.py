from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unidiff.data.sources import BLOCK, MixtureSchedule, parse_sources


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.05, 10), min_size=1, max_size=5), st.integers(0, 5), st.integers(0, 4 * BLOCK))
def test_every_draw_is_located_exactly(weights, seed, index):
    schedule = MixtureSchedule(tuple(weights), seed)
    assert sum(schedule.counts) == BLOCK
    for count, weight in zip(schedule.counts, weights, strict=True):
        assert abs(count / BLOCK - weight / sum(weights)) < 1 / BLOCK
    source, number = schedule.locate(index)
    drawn = Counter()
    for block in range(index // BLOCK + 1):
        sources = schedule.block(block)
        last = index % BLOCK if block == index // BLOCK else BLOCK
        drawn.update(sources[:last].tolist())
    assert sources[index % BLOCK] == source
    assert drawn[source] == number


def test_the_order_changes_with_seed_and_block():
    schedule = MixtureSchedule((1.0, 1.0), 0)
    assert schedule.block(0).tolist() != schedule.block(1).tolist()
    assert schedule.block(0).tolist() != MixtureSchedule((1.0, 1.0), 1).block(0).tolist()
    assert schedule.block(3).tolist() == MixtureSchedule((2.0, 2.0), 0).block(3).tolist()


@pytest.mark.parametrize(
    "weights", [(), (0.0, 1.0), (-1.0, 2.0), (float("nan"), 1.0), (float("inf"), 1.0), (1e-9, 1.0)]
)
def test_bad_weights(weights):
    with pytest.raises(ValueError, match="mixture weights"):
        MixtureSchedule(weights)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("a.tar", [("a.tar", 1.0)]),
        ("a.tar::b.tar", [("a.tar::b.tar", 1.0)]),
        ("a.tar@3 :: b-{0..2}.tar@0.5", [("a.tar", 3.0), ("b-{0..2}.tar", 0.5)]),
        ("a.tar::b.tar@2", [("a.tar", 1.0), ("b.tar", 2.0)]),
        (["a.tar", "b.tar"], [("a.tar::b.tar", 1.0)]),
        ("https://user@host/a.tar", [("https://user@host/a.tar", 1.0)]),
        ("https://user@host/a.tar@2", [("https://user@host/a.tar", 2.0)]),
    ],
)
def test_source_settings(spec, expected):
    assert parse_sources(spec) == expected


@pytest.mark.parametrize("weight", ["nan", "-1", "0", "1e400", "inf", "", "two", "-0.0", "1,5"])
def test_odd_weights_get_a_sentence(weight):
    for spec in (f"a.tar@{weight}", f"a.tar@2 :: b.tar@{weight}"):
        with pytest.raises(ValueError, match=f"the weight '{weight}' behind @; expected a"):
            parse_sources(spec)


def test_existing_names_that_end_like_a_weight(tmp_path, monkeypatch):
    (tmp_path / "tok@2").mkdir()
    monkeypatch.chdir(tmp_path)
    for spec in ("tok@2", f"{tmp_path}/tok@2", (tmp_path / "tok@2").as_uri()):
        assert parse_sources(spec) == [(spec, 1.0)]
        assert parse_sources(f"{spec}@3::tok@2") == [(spec, 3.0), ("tok@2", 1.0)]
    assert parse_sources("other@2") == [("other", 2.0)]
    assert parse_sources("a@{0..3}.tar::b@c.tar") == [("a@{0..3}.tar::b@c.tar", 1.0)]


@pytest.mark.parametrize("spec", ["", "a.tar::", " :: ", []])
def test_empty_source_settings(spec):
    with pytest.raises(ValueError, match="empty shard pattern"):
        parse_sources(spec)
