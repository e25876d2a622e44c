"""Tars as people and programs make them: what is read and what is counted are together what was put in."""

import bz2
import gzip
import io
import lzma
import tarfile
from dataclasses import dataclass, field

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from shard_samples import png_bytes, write_tar

from unidiff.data import report
from unidiff.data.report import Skip
from unidiff.data.shards import ShardSource
from unidiff.data.tar import read_shard
from unidiff.data.tar_index import MOST_BYTES

PAIR = (("jpg", "jpeg", "png", "webp", "gif", "bmp"), ("txt",))
PNG = png_bytes("L", 7)
PACKERS = {"plain": lambda data: data, "gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress}
PACKERS["lzma"] = lambda data: lzma.compress(data, format=lzma.FORMAT_ALONE)


@dataclass
class Entry:
    """A file of a tar: its bytes, or what it links to."""

    name: str
    data: bytes = b""
    kind: bytes = tarfile.REGTYPE
    target: str = ""


@dataclass
class Plan:
    """A tar to be: its entries, and the samples that can be read and that cannot, by key."""

    entries: list[Entry] = field(default_factory=list)
    good: dict[str, bytes] = field(default_factory=dict)  # caption by key
    bad: list[str] = field(default_factory=list)


def write(path, entries, style=tarfile.GNU_FORMAT, packer="plain", encoding="utf-8"):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=style, encoding=encoding, errors="surrogateescape") as tar:
        for entry in entries:
            info = tarfile.TarInfo(entry.name)
            info.type, info.linkname, info.size = entry.kind, entry.target, len(entry.data)
            tar.addfile(info, io.BytesIO(entry.data))
    path.write_bytes(PACKERS[packer](buffer.getvalue()))


NAMES = st.text("ab1.- é", min_size=1, max_size=6).filter(lambda t: t[0] not in ".- " and t[-1] != " ")
FOLDERS = st.sampled_from(["", "", "x/", "x.y/", "./", "/abs/", "../up/", "a b/"])
FATES = st.sampled_from(
    ["whole", "whole", "whole", "no txt", "no png", "hard", "soft", "soft to soft", "dangling", "outside", "circle", "device", "twice", "blank"]
)  # fmt: skip
EXTRAS = st.lists(st.sampled_from(["x/", "._a.png", "__MACOSX/._b.txt", ".DS_Store", "README", "pipe"]), max_size=3)


@st.composite
def plans(draw):
    keys = draw(
        st.lists(st.tuples(FOLDERS, NAMES).map("".join), min_size=1, max_size=7, unique_by=lambda k: k.lstrip("./"))
    )
    plan = Plan()
    for number, key in enumerate(keys):
        fate, words = draw(FATES), f"words {number}".encode()
        shown = key.removeprefix("./")
        png, txt = Entry(f"{key}.png", PNG), Entry(f"{key}.{draw(st.sampled_from(['txt', 'TXT']))}", words)
        made = [png, txt]
        if fate == "no txt":
            made = [png]
        elif fate == "no png":
            made = [txt]
        elif fate == "hard":
            made = [Entry(f"store/{number}", PNG), Entry(png.name, kind=tarfile.LNKTYPE, target=f"store/{number}"), txt]
        elif fate in ("soft", "soft to soft"):
            plan.entries.append(Entry(f"/store/{number}", PNG))
            target = f"/store/{number}"
            if fate == "soft to soft":
                plan.entries.append(Entry(f"/store/s{number}", kind=tarfile.SYMTYPE, target=f"{number}"))
                target = f"/store/s{number}"
            made = [Entry(png.name, kind=tarfile.SYMTYPE, target=target), txt]
        elif fate == "dangling":
            made = [png, Entry(txt.name, kind=tarfile.LNKTYPE, target="nowhere")]
        elif fate == "outside":
            made = [Entry(png.name, kind=tarfile.SYMTYPE, target="/etc/hostname"), txt]
        elif fate == "circle":
            made = [Entry(png.name, kind=tarfile.SYMTYPE, target=png.name.rsplit("/", 1)[-1]), txt]
        elif fate == "device":
            made = [png, Entry(txt.name, kind=tarfile.CHRTYPE)]
        elif fate == "twice":
            made = [png, txt, png, txt]
            plan.bad.append(shown)
        elif fate == "blank":
            made = [png, Entry(txt.name, b"\xef\xbb\xbf \n")]
        if fate in ("whole", "hard", "soft", "soft to soft"):
            plan.good[shown] = words
        else:
            plan.bad.append(shown)
        plan.entries += made
    for name in draw(EXTRAS):
        kind = tarfile.DIRTYPE if name.endswith("/") else tarfile.FIFOTYPE if name == "pipe" else tarfile.REGTYPE
        plan.entries.append(Entry(name.rstrip("/"), kind=kind))
    if draw(st.booleans()):
        plan.entries = draw(st.permutations(plan.entries))
    return plan


@settings(max_examples=120, deadline=None)
@given(
    plans(),
    st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    st.sampled_from(sorted(PACKERS)),
    st.integers(0, 3),
)
def test_read_and_counted_are_all(tmp_path_factory, plan, style, packer, workers):
    path = tmp_path_factory.mktemp("any") / "any.tar"
    write(path, plan.entries, style, packer)
    source = ShardSource(str(path), workers=workers, announce=False)
    found = {sample["__key__"]: sample["txt"].encode() for sample in source}
    assert found == plan.good
    if plan.good or plan.bad:
        skipped = [skip.key for skips in source.report.examples.values() for skip in skips]
        assert sorted(skipped) == sorted(plan.bad)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(NAMES, st.integers(0, 3), st.sampled_from(["whole", "no json"])),
        min_size=1,
        max_size=6,
        unique_by=lambda t: t[0],
    ),
    st.randoms(),
)
def test_pictures_join_their_document(tmp_path_factory, documents, random):
    entries, good, bad = [], {}, []
    names = {name for name, _, _ in documents}
    # a picture `1.1.png` beside `1.json` and `1.1.json` may belong to either; the document that misses it is counted
    documents = [one for one in documents if not any(one[0].startswith(f"{other}.") for other in names)]
    for name, count, fate in documents:
        own = [Entry(f"{name}.{n}.png", PNG) for n in range(count)]
        if fate == "no json" and (
            count == 0 or any(name.startswith(f"{other}.") for other in names) or name[-1].isdigit()
        ):
            continue  # such pictures would rightly be taken for another document's
        entries += own if fate == "no json" else [*own, Entry(f"{name}.json", b"{}")]
        if fate == "whole":
            good[name] = {f"{n}.png" for n in range(count)}
        else:
            bad.append(name)
    random.shuffle(entries)
    path = tmp_path_factory.mktemp("documents") / "d.tar"
    write(path, entries)
    found = {}
    for item in read_shard(str(path), (("json",),), documents=True):
        if isinstance(item, Skip):
            bad.remove(item.key)
        else:
            found[item["__key__"]] = {name for name in item if name.endswith(".png")}
    assert (found, bad) == (good, [])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 255), st.sampled_from(sorted(PACKERS)))
@example(124, 0x80, "plain")  # a negative size
def test_any_damaged_byte_ends_well(tmp_path_factory, place, value, packer):
    path = tmp_path_factory.mktemp("damage") / "a.tar"
    write(path, [Entry(f"{n}.{kind}", b"x" * 300) for n in range(4) for kind in ("png", "txt")], packer=packer)
    data = bytearray(path.read_bytes())
    data[place % len(data)] = value
    path.write_bytes(bytes(data))
    for item in read_shard(str(path), PAIR):
        assert isinstance(item, Skip) or set(item) >= {"png", "txt"}


def test_dotted_names_stay_apart(tmp_path):
    write(tmp_path / "a.tar", [Entry(f"img.v1.{n:04d}.{kind}", b"x") for n in range(5) for kind in ("png", "txt")])
    keys = [item["__key__"] for item in read_shard(str(tmp_path / "a.tar"), PAIR)]
    assert keys == [f"img.v1.{n:04d}" for n in range(5)]


def test_files_of_other_types_join_the_nearest_sample(tmp_path):
    names = ["a.png", "a.txt", "a.png.md5", "a.cls", "b.heic", "b.txt", "c.heic", "a.b.png", "a.b.txt", "a.b.x.y"]
    write(tmp_path / "a.tar", [Entry(name) for name in names])
    items = list(read_shard(str(tmp_path / "a.tar"), PAIR))
    assert [i.key if isinstance(i, Skip) else (i["__key__"], i["__ignored__"]) for i in items] == [
        ("a", ["md5", "cls"]), "b", "c", ("a.b", ["y"]),
    ]  # fmt: skip


def test_names_that_are_no_utf8_are_read(tmp_path):
    write(tmp_path / "a.tar", [Entry("caf\xe9.png", PNG), Entry("caf\xe9.txt", b"coffee")], encoding="latin-1")
    assert [sample["__key__"] for sample in ShardSource(str(tmp_path / "a.tar"))] == ["caf\\xe9"]
    folder = str(tmp_path / "na\udce9me.tar")
    (tmp_path / "a.tar").rename(folder)
    (sample,) = ShardSource(folder)
    assert sample["__url__"].endswith("na\\xe9me.tar")


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tgz", "a.TAR", "a.Tar.Bz2", "a.txz", "a.tar.xz", "a.tlz"])
@pytest.mark.parametrize("packer", sorted(PACKERS))
def test_compression_is_told_by_content(tmp_path, name, packer):
    write(tmp_path / name, [Entry("1.png", PNG), Entry("1.txt", b"one")], packer=packer)
    assert [sample["txt"] for sample in ShardSource(str(tmp_path))] == ["one"]


@pytest.mark.parametrize(
    ("magic", "words"),
    [(b"\x28\xb5\x2f\xfd", "zstd"), (b"PK\3\4", "zip"), (b"\x04\x22\x4d\x18", "lz4"), (b"\x1f\x9d\x90", "uncompress")],
)
def test_what_cannot_be_unpacked_is_said_at_once(tmp_path, magic, words):
    (tmp_path / "a.tar.zst").write_bytes(magic + bytes(5000))
    (skip,) = read_shard(str(tmp_path / "a.tar.zst"))
    assert skip.reason == report.UNREADABLE_SHARD and words in skip.detail
    with pytest.raises(ValueError, match=words):
        next(iter(ShardSource(str(tmp_path), repeat=True)))


def test_sparse_files_and_their_claims(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, real in (("a.txt", "8"), ("b.txt", str(MOST_BYTES + 1))):
            info = tarfile.TarInfo(name)
            body = b"1\n0\n3\n".ljust(512, b"\0") + b"abc"
            info.size = len(body)
            info.pax_headers = {
                "GNU.sparse.major": "1",
                "GNU.sparse.minor": "0",
                "GNU.sparse.realsize": real,
                "GNU.sparse.name": name,
            }
            tar.addfile(info, io.BytesIO(body))
    first, second = read_shard(str(path), (("txt",),))
    assert first["txt"] == b"abc" + bytes(5)
    assert second.reason == report.MISSING_MEMBER and "more than" in second.detail


def test_a_tar_without_samples_is_counted(tmp_path):
    write_tar(tmp_path / "a.tar", [("README", b"x"), ("._a.png", b"x")])
    (skip,) = read_shard(str(tmp_path / "a.tar"), PAIR)
    assert skip.reason == report.EMPTY_SHARD and "2 files" in skip.detail


def test_cut_in_the_middle_of_anything(tmp_path):
    """A shuffled tar, cut anywhere: whole samples are read, and at least one entry names the loss."""
    names = [f"{n}.{kind}" for kind in ("txt", "png") for n in range(4)]
    path = tmp_path / "a.tar"
    write(path, [Entry(name, b"x" * 600) for name in names])
    whole = path.read_bytes()
    for size in range(0, len(names) * 1536 + 512, 300):
        path.write_bytes(whole[:size])
        items = list(read_shard(str(path), PAIR))
        keys = {item["__key__"] for item in items if not isinstance(item, Skip)}
        assert keys == {str(n) for n in range(4) if size >= (4 + n) * 1536 + 512 + 600}, size
        assert any(isinstance(item, Skip) and item.reason.endswith("_shard") for item in items)
        named = {item.key for item in items if isinstance(item, Skip)} - {""}
        begun = {str(n) for n in range(4) if size >= n * 1536 + 512}
        assert begun <= keys | named, size
