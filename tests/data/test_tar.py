import gzip
import tarfile

import pytest
import webdataset
from shard_samples import sample, truncate, write_samples, write_tar

from unidiff.data import report
from unidiff.data.report import Skip
from unidiff.data.sources import expand_shards
from unidiff.data.tar import ShardWriter, read_shard

PAIR = (("png", "jpg", "webp"), ("txt",))


def read(path, require=PAIR):
    """(keys of samples, skips)."""
    items = list(read_shard(str(path), require))
    return [i["__key__"] for i in items if not isinstance(i, Skip)], [i for i in items if isinstance(i, Skip)]


@pytest.mark.parametrize(
    "source",
    [
        "pipe:touch {}",
        "PIPE:touch {}",
        " pipe:touch {}",
        "a.tar::pipe:touch {}",
        "{{pipe,x}}:touch {}",
        "pipe:touch {}/",
    ],
)
def test_pipe_is_refused_in_one_sentence(tmp_path, source):
    marker = tmp_path / "ran"
    with pytest.raises(ValueError, match="runs a shell command") as caught:
        expand_shards(source.format(marker))
    assert "\n" not in str(caught.value)
    assert not marker.exists()
    if "::" not in source and "{{" not in source:
        with pytest.raises(ValueError, match="shell command"):
            list(read_shard(source.format(marker).strip()))
        assert not marker.exists()


@pytest.mark.parametrize("source", ["dask://x/a.tar", "github://x/a.tar", "ftp://x/a.tar", "scp:host/a.tar", "-"])
def test_other_schemes_are_refused(source):
    with pytest.raises(ValueError, match="not a shard unidiff reads"):
        expand_shards(source)


def test_expansion(tmp_path):
    write_samples(tmp_path, 25, 10)
    names = [str(tmp_path / f"0000{i}.tar") for i in range(3)]
    assert expand_shards(str(tmp_path)) == names
    assert expand_shards(str(tmp_path / "*.tar")) == names
    assert expand_shards(str(tmp_path / "{00000..00002}.tar")) == names
    assert expand_shards([names[2], names[0]]) == [names[2], names[0]]
    assert expand_shards(f"{names[1]}::{names[0]}") == [names[1], names[0]]
    assert expand_shards("https://host/{a,b}.tar") == ["https://host/a.tar", "https://host/b.tar"]
    assert len(expand_shards("missing-{00..11}.tar")) == 12


def test_globs_endings_and_names_with_signs(tmp_path):
    for name in (
        "a1.tar",
        "a2.TAR",
        "b.tar.gz",
        "c.tgz",
        ".hidden.tar",
        "._a1.tar",
        "notes.txt",
        "x[1].tar",
        "y{1,2}.tar",
    ):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "p::q").mkdir()
    (tmp_path / "p::q" / "z.tar").write_bytes(b"")

    def names(pattern):
        return [url.rsplit("/", 1)[-1] for url in expand_shards(str(tmp_path / pattern))]

    assert names("") == ["a1.tar", "a2.TAR", "b.tar.gz", "c.tgz", "x[1].tar", "y{1,2}.tar"]
    assert names("a?.*") == ["a1.tar", "a2.TAR"] and names("a[1-9].tar") == ["a1.tar"]
    assert names("x[1].tar") == ["x[1].tar"] and names("y{1,2}.tar") == ["y{1,2}.tar"]
    assert names("p::q") == ["z.tar"]
    assert expand_shards((tmp_path / "a1.tar").as_uri()) == [str(tmp_path / "a1.tar")]
    assert expand_shards("https://host/a.tar?x=[1]&y=*") == ["https://host/a.tar?x=[1]&y=*"]
    (tmp_path / "p::q" / "z.tar").rename(tmp_path / "p::q" / "z.parquet")
    with pytest.raises(ValueError, match=r"holds no \.tar shards.*1 with \.parquet"):
        names("p::q")


@pytest.mark.parametrize(
    "pattern", ["{0..99999999999}.tar", "{a,b}" * 40, "{{0..999}{0..999}{0..999},x}", "http://h/{0..9}{0..999999}"]
)
def test_no_pattern_takes_for_ever(pattern):
    with pytest.raises(ValueError, match="more than 1,000,000 shards"):
        expand_shards(pattern)


@pytest.mark.parametrize("pattern", ["{", "a{1,2", "{" * 2000 + "}" * 2000])
def test_patterns_that_are_none(pattern):
    with pytest.raises(ValueError, match="brace pattern"):
        expand_shards(pattern)


def test_expansion_refuses_nothing(tmp_path):
    for patterns in ([], "", ["a.tar", " "]):
        with pytest.raises(ValueError, match=r"pattern|no shards"):
            expand_shards(patterns)
    for pattern in (tmp_path, tmp_path / "*.tar"):
        with pytest.raises(ValueError, match=r"holds no \.tar"):
            expand_shards(str(pattern))


def test_writer_makes_shards_that_webdataset_reads(tmp_path):
    keys = write_samples(tmp_path, 7, 3)
    shards = expand_shards(str(tmp_path))
    assert [p.rsplit("/")[-1] for p in shards] == ["00000.tar", "00001.tar", "00002.tar"]
    data = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert [s["__key__"] for s in data] == keys
    assert data[4]["txt"] == b"caption 4"
    assert [key for shard in shards for key in read(shard)[0]] == keys


def test_writer_is_deterministic_and_atomic(tmp_path):
    write_samples(tmp_path / "a", 5, 3)
    write_samples(tmp_path / "b", 5, 3)
    for name in ("00000.tar", "00001.tar"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with pytest.raises(RuntimeError), ShardWriter(tmp_path / "c", 2) as writer:
        for number in range(3):
            writer.write(str(number), {"txt": "x"})
        raise RuntimeError
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["00000.tar"]
    assert writer.written == {"00000.tar": 2}


@pytest.mark.parametrize(
    ("key", "members", "message"),
    [
        ("a.b", {"txt": "x"}, "without dots"),
        ("", {"txt": "x"}, "non-empty"),
        ("__k", {"txt": "x"}, "start with __"),
        ("twice", {"txt": "x"}, "already in this shard"),
        ("k", {}, "no members"),
        ("k", {"pkl": b"x"}, "never decoded"),
    ],
)
def test_writer_refuses(tmp_path, key, members, message):
    with pytest.raises(ValueError, match=message), ShardWriter(tmp_path) as writer:
        writer.write("twice", {"txt": "x"})
        writer.write(key, members)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="at least 1"):
        ShardWriter(tmp_path, 0)


@pytest.mark.parametrize("pax", [False, True])
def test_every_cut_is_counted_exactly_once(tmp_path, pax):
    """Cut a 3-sample tar at every block boundary and in between: whole samples survive, one entry names the loss."""
    path = tmp_path / "00000.tar"
    write_samples(tmp_path, 3)
    if pax:  # as img2dataset writes them: a PAX header before every member
        items = list(read_shard(str(path)))
        with webdataset.TarWriter(str(path), encoder=False) as writer:
            for item in items:
                writer.write({k: v for k, v in item.items() if k == "__key__" or not k.startswith("__")})
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        members = [(info.name.split(".")[0], info.offset_data, info.offset_data + info.size) for info in tar]
    # The json comes first and is not required: a sample is whole once its image and caption are.
    whole_at = {key: max(end for name, _, end in members if name == key) for key in ("000000", "000001", "000002")}
    archive_end = (members[-1][2] + 511) // 512 * 512 + 512
    for size in sorted({*range(0, archive_end, 512), *range(100, archive_end, 512)}):
        path.write_bytes(whole[:size])
        keys, skips = read(path)
        assert keys == [key for key, end in whole_at.items() if end <= size], size
        assert len(skips) == 1, (size, skips)
        started = [key for key, data, _ in members if data <= size]
        if not started:
            assert skips[0].reason == report.UNREADABLE_SHARD
        else:
            assert skips[0].reason == report.TRUNCATED_SHARD
            assert skips[0].key == (started[-1] if started[-1] not in keys else ""), size
    path.write_bytes(whole)
    assert read(path) == (list(whole_at), [])


def _header(data: bytes, name: str) -> int:
    return data.index(name.encode() + b"\x00") // 512 * 512


def test_a_damaged_header_in_the_middle_is_reported(tmp_path):
    write_samples(tmp_path, 4)
    path = tmp_path / "00000.tar"
    data = bytearray(path.read_bytes())
    position = _header(bytes(data), "000002.png" if b"000002.png" in data else "000002.webp")
    data[position : position + 512] = b"\x5a" * 512
    path.write_bytes(bytes(data))
    keys, skips = read(path)
    assert keys == ["000000", "000001"]
    assert [(s.reason, s.key) for s in skips] == [(report.TRUNCATED_SHARD, "000002")]
    assert "header" in skips[0].detail


def test_two_tars_glued_together_are_reported(tmp_path):
    write_samples(tmp_path, 4, 2)
    first, second = tmp_path / "00000.tar", tmp_path / "00001.tar"
    first.write_bytes(first.read_bytes() + second.read_bytes())
    keys, skips = read(first)
    assert keys == ["000000", "000001"]
    assert len(skips) == 1 and "after the end-of-archive mark" in skips[0].detail


def test_gzip_shards(tmp_path):
    write_samples(tmp_path, 4)
    data = gzip.compress((tmp_path / "00000.tar").read_bytes())
    path = tmp_path / "a.tar.gz"
    path.write_bytes(data)
    assert read(path) == (["000000", "000001", "000002", "000003"], [])
    truncate(path, len(data) - 20)
    assert [s.reason for s in read(path)[1]] == [report.TRUNCATED_SHARD]
    damaged = bytearray(data)
    damaged[-6] ^= 0xFF  # the checksum
    path.write_bytes(bytes(damaged))
    assert len(read(path)[1]) == 1


def test_what_is_not_a_tar(tmp_path):
    for name, data in (("empty", b""), ("text", b"hello" * 500), ("zeros", b"")):
        path = tmp_path / f"{name}.tar"
        path.write_bytes(data)
        keys, skips = read(path)
        assert keys == [] and [s.reason for s in skips] == [report.UNREADABLE_SHARD]
    keys, skips = read(tmp_path / "vanished.tar")
    assert keys == [] and [s.reason for s in skips] == [report.MISSING_SHARD]
    assert "No such file" in skips[0].detail
    with tarfile.open(tmp_path / "none.tar", "w"):
        pass
    assert read(tmp_path / "none.tar") == ([], [])


def test_missing_and_duplicate_members(tmp_path):
    path = tmp_path / "a.tar"
    write_tar(
        path,
        [
            ("a.png", b"1"), ("a.txt", b"1"),
            ("b.png", b"1"),
            ("c.txt", b"1"),
            ("d.png", b"1"), ("d.txt", b"1"), ("d.txt", b"2"),
            ("e.pkl", b"1"),
            ("f.PNG", b"1"), ("f.txt", b"1"),
        ],
    )  # fmt: skip
    keys, skips = read(path)
    assert keys == ["a", "f"]
    assert [(s.key, s.reason) for s in skips] == [
        ("b", report.MISSING_MEMBER),
        ("c", report.MISSING_MEMBER),
        ("d", report.DUPLICATE_MEMBER),
        ("e", report.MISSING_MEMBER),
    ]
    assert skips[0].detail == "no txt" and "png or jpg" in skips[1].detail


def test_members_of_other_types_are_left_out_and_named(tmp_path):
    path = tmp_path / "a.tar"
    write_tar(
        path, [("a.png", b"1"), ("a.txt", b"1"), ("a.pkl", b"1"), ("README", b"1"), ("b.png", b"1"), ("b.txt", b"")]
    )
    items = list(read_shard(str(path), PAIR))
    assert [sorted(k for k in i if not k.startswith("__")) for i in items] == [["png", "txt"], ["png", "txt"]]
    assert sorted(e for i in items for e in i["__ignored__"]) == ["", "pkl"]


def test_sample_writer_round_trip_keeps_bytes(tmp_path):
    from unidiff.data.members import encode_member

    write_samples(tmp_path, 3)
    items = list(read_shard(str(tmp_path / "00000.tar"), PAIR))
    for number, item in enumerate(items):
        for name, value in sample(number).items():
            assert item[name] == encode_member(name, value)
