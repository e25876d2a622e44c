import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_samples import write_samples

from unidiff.data.mixture import BLOCK, MixedSource, MixtureSchedule, parse_sources
from unidiff.data.shards import ShardSource


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


@pytest.fixture()
def folders(tmp_path):
    for name, count in (("a", 12), ("b", 7), ("c", 5)):
        write_samples(tmp_path / name, count, 4)
    return [str(tmp_path / name) for name in "abc"]


def mixed(folders, weights=(0.6, 0.3, 0.1), repeat=True, seed=5):
    sources = [ShardSource(f, ("txt",), shuffle=5, seed=seed, repeat=repeat) for f in folders]
    return MixedSource(sources, weights, seed)


def test_proportions(folders):
    stream = iter(mixed(folders))
    drawn = Counter(next(stream)["__url__"].rsplit("/", 2)[1] for _ in range(2 * BLOCK))
    assert drawn == {"a": 1200, "b": 600, "c": 200}
    stream = iter(mixed(folders))
    early = Counter(next(stream)["__url__"].rsplit("/", 2)[1] for _ in range(300))
    assert 140 < early["a"] < 220 and 60 < early["b"] < 120 and 10 < early["c"] < 50


def test_the_mixture_goes_on_until_all_are_exhausted(folders):
    samples = list(mixed(folders, repeat=False))
    names = [(s["__url__"].rsplit("/", 2)[1], s["__key__"]) for s in samples]
    assert len(set(names)) == len(names) == 24


@pytest.mark.parametrize("repeat", [True, False])
def test_resuming_a_mixture(folders, repeat):
    def take(source, count):
        stream = iter(source)
        return [s["__url__"] + s["__key__"] for s, _ in zip(stream, range(count), strict=False)]

    count = 60 if repeat else 24
    keys = take(mixed(folders, repeat=repeat), count)
    assert len(keys) == count
    running = mixed(folders, repeat=repeat)
    stream = iter(running)
    for position in range(count):
        if position % 7 == 0:
            resumed = mixed(folders, repeat=repeat)
            resumed.load_state_dict(json.loads(json.dumps(running.state_dict())))
            assert take(resumed, count - position) == keys[position:]
        next(stream)


def test_a_mixture_refuses_what_does_not_fit(folders):
    with pytest.raises(ValueError, match="one weight per source"):
        mixed(folders, (1.0,))
    with pytest.raises(ValueError, match="saved position has weights"):
        mixed(folders).load_state_dict(mixed(folders, (1.0, 1.0, 1.0)).state_dict())


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
