import json
import logging
from itertools import pairwise

import pytest
import torch
from shard_samples import Damage, picture, skipped_keys, write_samples

from unidiff.data import report
from unidiff.data.shards import ShardSource

# 5 % truncated pictures, two captions that are no UTF-8, three samples without a part; samples 60-69 (and truncated 65
# with them) and 94-99 are in the vanished and the cut shard
DAMAGE = Damage(
    truncated={5, 25, 45, 65, 85}, bad_caption={11, 71}, no_caption={12, 52}, no_image={33}, vanished=6, cut=94
)


@pytest.mark.parametrize(("shuffle", "workers"), [(0, 0), (0, 3), (16, 0), (1000, 2)])
def test_damage_is_skipped_counted_and_named(tmp_path, caplog, shuffle, workers):
    damaged = DAMAGE.write(tmp_path, 100, 10)
    expected, counts = [f"{number:06d}" for number in damaged.good], damaged.counts
    assert counts == {
        "corrupt_image": 4, "bad_caption": 2, "missing_member": 3, "truncated_shard": 1, "missing_shard": 1,
    }  # fmt: skip
    source = ShardSource(damaged.pattern, optional=("json",), shuffle=shuffle, workers=workers, allow_missing=True)
    with caplog.at_level(logging.WARNING):
        samples = list(source)
    keys = [s["__key__"] for s in samples]
    assert (keys if not shuffle else sorted(keys)) == expected
    assert source.report.counts == counts
    for reason, found in damaged.named.items():
        assert {int(key) for key in skipped_keys(source.report, reason)} == found
    assert skipped_keys(source.report, report.MISSING_SHARD) == []
    assert [skip.shard for skip in source.report.examples[report.MISSING_SHARD]] == [str(tmp_path / "00006.tar")]
    assert source.report.total == sum(counts.values())
    assert "corrupt_image" in caplog.text  # never silent
    for reason, count in counts.items():
        assert f"{count} {reason}" in source.report.summary()
    for sample in samples:
        number = int(sample["__key__"])
        assert sample["txt"] == f"caption {number}"
        assert sample["json"]["n"] == number
        assert sample["image"].shape == (3, 12, 16) and sample["image"].dtype == torch.uint8
        if number % 3 != 1:  # png and lossless webp
            assert torch.equal(sample["image"], picture(number))


def test_order_depends_on_seed_and_epoch_alone(tmp_path):
    write_samples(tmp_path, 60, 7)

    def keys(seed=0, workers=0, shuffle=20, count=120):
        source = ShardSource(str(tmp_path), shuffle=shuffle, seed=seed, workers=workers, repeat=True)
        stream = iter(source)
        return [next(stream)["__key__"] for _ in range(count)]

    first = keys()
    assert first == keys() == keys(workers=1) == keys(workers=4)
    assert first != keys(seed=1)
    assert sorted(first[:60]) == sorted(first[60:]) == sorted({*first})
    assert first[:60] != first[60:]
    assert keys(shuffle=0)[:60] == keys(shuffle=0)[60:] == sorted({*first})
    # Shards are permuted and samples cross shard borders: neighbours rarely stay neighbours.
    stayed = sum(int(b) - int(a) == 1 for a, b in pairwise(first))
    assert stayed < 20


@pytest.mark.parametrize("shuffle", [0, 1, 7, 25, 500])
def test_resuming_anywhere_gives_the_same_rest(tmp_path, shuffle):
    damaged = DAMAGE.write(tmp_path, 100, 10)

    def source(workers=0):
        return ShardSource(
            damaged.pattern, optional=("json",), shuffle=shuffle, seed=3, workers=workers, allow_missing=True
        )

    whole = source()
    keys = [s["__key__"] for s in whole]
    assert sorted(int(key) for key in keys) == damaged.good
    running = source()
    stream = iter(running)
    for position in range(len(keys) + 1):
        if position % 9 == 0 or position in (1, len(keys) - 1, len(keys)):
            state = json.loads(json.dumps(running.state_dict()))
            resumed = source(workers=position % 3)
            resumed.load_state_dict(state)
            assert [s["__key__"] for s in resumed] == keys[position:]
            assert resumed.report.counts == damaged.counts
            assert resumed.report.state_dict() == whole.report.state_dict()
        if position < len(keys):
            assert next(stream)["__key__"] == keys[position]


def test_resuming_across_epochs(tmp_path):
    write_samples(tmp_path, 23, 5)

    def source():
        return ShardSource(str(tmp_path), shuffle=8, seed=1, repeat=True)

    stream = iter(source())
    keys = [next(stream)["__key__"] for _ in range(70)]
    for position in (22, 23, 24, 46, 47, 60):
        running = source()
        ahead = iter(running)
        for _ in range(position):
            next(ahead)
        resumed = source()
        resumed.load_state_dict(running.state_dict())
        rest = iter(resumed)
        assert [next(rest)["__key__"] for _ in range(70 - position)] == keys[position:]


def test_a_finished_source_stays_finished(tmp_path):
    write_samples(tmp_path, 4)
    source = ShardSource(str(tmp_path))
    assert len(list(source)) == 4
    assert list(source) == []
    other = ShardSource(str(tmp_path))
    other.load_state_dict(source.state_dict())
    assert list(other) == []


def test_a_position_of_another_run_is_refused(tmp_path):
    write_samples(tmp_path, 10, 5)
    state = ShardSource(str(tmp_path), seed=1).state_dict()
    for other in (
        ShardSource(str(tmp_path), seed=2),
        ShardSource(str(tmp_path), seed=1, shuffle=4),
        ShardSource(str(tmp_path), ("txt",), seed=1),
        ShardSource(str(tmp_path / "00000.tar"), seed=1),
    ):
        with pytest.raises(ValueError, match="belongs to other shards"):
            other.load_state_dict(state)


def test_members_are_chosen(tmp_path):
    write_samples(tmp_path, 6)
    for require, optional, names in (
        (("txt",), (), {"txt"}),
        (("image",), ("txt",), {"image", "txt"}),
        (("image", "json"), (), {"image", "json"}),
    ):
        for sample in ShardSource(str(tmp_path), require, optional):
            assert {name for name in sample if not name.startswith("__")} == names
    with pytest.raises(ValueError, match="never decoded"):
        ShardSource(str(tmp_path), ("image", "pkl"))
    with pytest.raises(ValueError, match="shell command"):
        ShardSource("pipe:cat x.tar")
    with pytest.raises(ValueError, match="negative"):
        ShardSource(str(tmp_path), shuffle=-1)


def test_a_damaged_optional_member_skips_the_sample(tmp_path):
    def change(number, members):
        return members | {"json": b"{"} if number == 2 else members

    write_samples(tmp_path, 5, change=change)
    source = ShardSource(str(tmp_path), optional=("json",))
    assert len(list(source)) == 4
    assert skipped_keys(source.report, report.BAD_JSON) == ["000002"]


def test_repeating_nothing_is_an_error_not_a_hang(tmp_path):
    write_samples(tmp_path, 3, change=lambda number, members: {"txt": members["txt"]})
    with pytest.raises(ValueError, match=r"no usable sample in 1 shards; skipped 3 \(3 missing_member\)"):
        next(iter(ShardSource(str(tmp_path), repeat=True)))
    assert list(ShardSource(str(tmp_path))) == []
    with pytest.raises(FileNotFoundError, match=r"2 shards do not exist: '.*gone0\.tar', '.*gone1\.tar'"):
        ShardSource(str(tmp_path / "gone{0,1}.tar"), ("image",), repeat=True)
    with pytest.raises(ValueError, match="no usable sample in 2 shards"):
        next(iter(ShardSource(str(tmp_path / "gone{0,1}.tar"), repeat=True, allow_missing=True)))


def test_many_keys_are_counted_but_only_some_listed():
    account = report.SkipReport(listed=2)
    for number in range(5):
        account.add(report.Skip(report.BAD_JSON, "a.tar", str(number), "x"))
    account.ignore("pkl")
    assert account.counts == {report.BAD_JSON: 5} and skipped_keys(account, report.BAD_JSON) == ["0", "1"]
    merged = account.merge(account)
    assert merged.counts == {report.BAD_JSON: 10} and len(merged.examples[report.BAD_JSON]) == 2
    assert merged.ignored == {"pkl": 2}
    assert "and 3 more" in account.summary(shown=2) and "pkl" in account.summary()
    assert report.SkipReport.from_state_dict(json.loads(json.dumps(account.state_dict()))) == account
    assert report.SkipReport().summary() == "nothing was skipped"
