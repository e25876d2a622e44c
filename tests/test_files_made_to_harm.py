"""Files made to harm: they hold themselves, lie about sizes, would fill the memory, or spoil the words of a message."""

from __future__ import annotations

import json
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from hostile_cases import limits, sentence_fault
from hostile_kinds import WEIGHTS
from released_parts import tiny_weights, write_tiny
from safetensors.torch import save_file

from unidiff.families.checkpoint.load import load_released
from unidiff.families.family import FAMILIES
from unidiff.models.transformer import MaskedTransformer


def _refused(folder: Path, words: str, error: type[Exception] = ValueError) -> None:
    with limits(), pytest.raises(error, match=words) as caught:
        load_released(folder)
    assert sentence_fault(caught.value, folder) is None, sentence_fault(caught.value, folder)


def _cyclic() -> object:
    content: dict = dict(tiny_weights("llada"))
    content["model"] = content
    return content


def _cyclic_list() -> object:
    inner: list = []
    inner.append(inner)
    return {**tiny_weights("llada"), "more": inner}


def _many_times_over(depth: int = 60) -> object:
    inner: list = [0]
    for _ in range(depth):
        inner = [inner, inner]
    return {**tiny_weights("llada"), "more": inner}


def _deep() -> object:
    inner: list = [0]
    for _ in range(400):
        inner = [inner]
    return {**tiny_weights("llada"), "more": inner}


def _changed(change) -> object:
    state = tiny_weights("llada")
    name = next(n for n, value in state.items() if value.ndim == 2)
    return {**state, name: change(state[name])}


TORCH = {
    "cyclic": (_cyclic, "holds itself"),
    "cyclic list": (_cyclic_list, "holds itself"),
    "deep": (_deep, "nested too deeply|damaged|1 left over"),
    "sparse": (lambda: _changed(lambda w: w.to_sparse()), "is sparse"),
    "sparse rows": (lambda: _changed(lambda w: w.to_sparse_csr()), "is sparse"),
    "no data": (lambda: _changed(lambda w: w.to("meta")), "on the meta device"),
    "quantised": (
        lambda: _changed(lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8)),
        "is quantised|damaged",
    ),
    "repeated": (lambda: _changed(lambda w: w[:1, :1].clone().expand(w.shape)), "larger than its data"),
    "numbers as names": (lambda: {n: v for n, v in enumerate(tiny_weights("llada").values())}, "expected names"),
    "text for a weight": (lambda: _changed(lambda w: "weights"), "1 misshaped"),
    "a list": (lambda: list(tiny_weights("llada").values()), "holds a list"),
    "a tensor": (lambda: torch.ones(3), "holds a Tensor"),
    "a number": (lambda: 3, "holds a int"),
    "nothing": (dict, "no named weights"),
    "complex": (lambda: _changed(lambda w: w.to(torch.complex64)), "stored as complex64"),
    "averages of another kind": (lambda: {"ema": {"shadow_params": 3}, "model": {}}, "no named weights"),
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", TORCH)
def test_torch_files_made_to_harm(name: str, zipped: bool, tmp_path: Path):
    make, words = TORCH[name]
    (tmp_path / "config.json").write_text(json.dumps(FAMILIES["llada"].tiny.config))
    torch.save(make(), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    _refused(tmp_path, words)


def test_a_list_that_occurs_many_times_over_costs_nothing(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(FAMILIES["llada"].tiny.config))
    torch.save({"model": tiny_weights("llada"), "more": _many_times_over()}, tmp_path / "pytorch_model.bin")
    with limits():
        assert load_released(tmp_path).family.name == "llada"


INDEXES = {
    "a list": ([], "where a mapping is expected"),
    "no map": ({"metadata": {}}, "weight_map"),
    "an empty map": ({"weight_map": {}}, "weight_map"),
    "numbers": ({"weight_map": {"a": 3}}, "weight_map"),
    "outside": ({"weight_map": {"a": "../../x.safetensors"}}, r"names '../../x.safetensors'"),
    "absolute": ({"weight_map": {"a": "/etc/passwd"}}, "names '/etc/passwd'"),
    "itself": ({"weight_map": {"a": "model.safetensors.index.json"}}, "names 'model.safetensors.index.json'"),
    "a NUL": ({"weight_map": {"a": "x\0.safetensors"}}, "names"),
    "a missing file": ({"weight_map": {"a": "gone.safetensors"}}, "gone.safetensors does not exist"),
    "another suffix": ({"weight_map": {"a": "config.json"}}, "names 'config.json'"),
}


@pytest.mark.parametrize("name", INDEXES)
def test_indexes_made_to_harm(name: str, tmp_path: Path):
    content, words = INDEXES[name]
    write_tiny(tmp_path, "llada")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(content))
    _refused(tmp_path, words, FileNotFoundError if "missing file" in name else ValueError)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path):
    state = write_tiny(tmp_path, "llada")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(state)
    parts = {"model-00001-of-00002.safetensors": names[:5], "model-00002-of-00002.safetensors": names[4:]}
    for file, held in parts.items():
        save_file({name: state[name] for name in held}, tmp_path / file)
    listed = {name: file for file, held in parts.items() for name in held}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    _refused(tmp_path, "does not hold what .* says: 0 missing .* 1 unexpected")


def _safe(header: bytes, data: bytes = b"\0" * 64, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def _entry(start: int, stop: int, shape: list[int], dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


HEADERS = {
    "a length of 2^63": _safe(b"{}", length=2**63),
    "a length beyond the file": _safe(b"{}", length=500),
    "no JSON": _safe(b"{broken!"),
    "a list": _safe(b"[]      "),
    "deep": _safe(b"[" * 5000),
    "overlapping": _safe(json.dumps({"a": _entry(0, 32, [8]), "b": _entry(16, 48, [8])}).encode()),
    "a hole": _safe(json.dumps({"a": _entry(0, 16, [4]), "b": _entry(32, 64, [8])}).encode()),
    "lies about the size": _safe(json.dumps({"a": _entry(0, 64, [10**9])}).encode()),
    "a huge shape": _safe(json.dumps({"a": _entry(0, 64, [2**62, 2**62])}).encode()),
    "a negative shape": _safe(json.dumps({"a": _entry(0, 64, [-4, -4])}).encode()),
    "no numbers in it": _safe(json.dumps({"a": _entry(0, 0, [0])}).encode(), b""),
    "an unknown type": _safe(json.dumps({"a": _entry(0, 64, [16], "F31")}).encode()),
    "the same name twice": _safe(b'{"a":%s,"a":%s}' % ((json.dumps(_entry(0, 64, [16])).encode(),) * 2)),
    "nothing": _safe(b"{}", b""),
}


@pytest.mark.parametrize("name", HEADERS)
def test_safetensors_made_to_harm(name: str, tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(FAMILIES["llada"].tiny.config))
    (tmp_path / "model.safetensors").write_bytes(HEADERS[name])
    _refused(tmp_path, "model.safetensors")
    MaskedTransformer(12, 16, 1, 2).save_pretrained(tmp_path / "own")
    (tmp_path / "own" / WEIGHTS).write_bytes(HEADERS[name])
    with limits(), pytest.raises((ValueError, OSError)) as caught:
        MaskedTransformer.from_pretrained(tmp_path / "own")
    assert sentence_fault(caught.value, tmp_path) is None, sentence_fault(caught.value, tmp_path)


@pytest.mark.parametrize(
    "text",
    ["a: &a [*a]", "a: " + "[" * 2000, "? [1, 2]\n: 3", "- 1", "a: ${oc.env:HOME}", "\t", "!!python/object:os.x {}"],
)
def test_yaml_made_to_harm(text: str, tmp_path: Path):
    write_tiny(tmp_path, "unidisc")
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.yaml").write_text(text)
    _refused(tmp_path, "config.yaml|weights")


def test_yaml_aliases_do_not_multiply_without_end(tmp_path: Path):
    write_tiny(tmp_path, "unidisc")
    (tmp_path / "config.json").unlink()
    lines = ["a0: &a0 [1, 1]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60))]
    (tmp_path / "config.yaml").write_text("\n".join(lines))
    _refused(tmp_path, "more than 1000000 values")


# ------------------------------------------------------------------------------------------------- sizes that are none

SIZES = [0, -1, 10**6, 10**9, 10**12, 2**62, 10**30]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_sizes_are_refused_before_memory_is_asked_for(family: str, tmp_path: Path):
    write_tiny(tmp_path, family)
    path = tmp_path / "config.json"
    good = path.read_text()

    def numbers(section: dict) -> list[str]:
        return [key for key, value in section.items() if isinstance(value, int) and not isinstance(value, bool)]

    whole = json.loads(good)
    for section in (None, "model", "encoder"):
        for key in numbers(whole if section is None else whole.get(section) or {}):
            for size in SIZES:
                changed = json.loads(good)
                (changed if section is None else changed[section])[key] = size
                path.write_text(json.dumps(changed))
                try:
                    with limits():
                        load_released(tmp_path, vocabulary=FAMILIES[family].tiny.vocabulary)
                except (ValueError, OSError) as error:
                    assert sentence_fault(error, tmp_path) is None, (key, size, sentence_fault(error, tmp_path))


# ---------------------------------------------------------------------------------------------- words of the messages


@pytest.mark.parametrize("name", ["two\nlines", "x" * 5000, "\ud800", "\0", "a\x1b[31mb"])
def test_names_from_files_cannot_spoil_a_message(name: str, tmp_path: Path):
    for file in ("model.safetensors", "pytorch_model.bin"):
        if name == "\ud800" and file.endswith("safetensors"):
            continue  # cannot be written
        write_tiny(tmp_path, "llada")
        (tmp_path / "model.safetensors").unlink()
        state = {**tiny_weights("llada"), name: torch.ones(2)}
        save_file(state, tmp_path / file) if file.endswith("safetensors") else torch.save(state, tmp_path / file)
        _refused(tmp_path, "1 left over")
        (tmp_path / file).unlink()
    MaskedTransformer(12, 16, 1, 2).save_pretrained(tmp_path / "own")
    path = tmp_path / "own" / "config.json"
    good = json.loads(path.read_text())
    for values in ({name: 1}, {"_class_name": name}, {"hidden_size": name}):
        path.write_text(json.dumps({**good, **values}))
        with pytest.raises(ValueError, match="config") as caught:
            MaskedTransformer.from_pretrained(tmp_path / "own")
        assert sentence_fault(caught.value, tmp_path) is None, sentence_fault(caught.value, tmp_path)


def test_files_that_would_fill_the_memory_are_not_read(tmp_path: Path):
    write_tiny(tmp_path, "unidisc")
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(2**33)  # holes take no room on the disk
    _refused(tmp_path, "too many for a JSON config")
    (tmp_path / "config.json").unlink()
    with (tmp_path / "config.yaml").open("wb") as file:
        file.truncate(2**33)
    _refused(tmp_path, "too many for a config")


def test_a_compressed_torch_file_is_refused(tmp_path: Path):
    write_tiny(tmp_path, "llada")
    (tmp_path / "model.safetensors").unlink()
    torch.save(tiny_weights("llada"), tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as small,
    ):
        for item in plain.namelist():
            small.writestr(item, plain.read(item))
    (tmp_path / "plain.pt").unlink()
    _refused(tmp_path, "it is compressed")


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.bool, torch.int64, torch.float8_e4m3fn])
def test_weights_are_not_cast_to_what_cannot_hold_them(dtype: torch.dtype, tmp_path: Path):
    write_tiny(tmp_path, "llada")
    with pytest.raises(ValueError, match=r"dtype is \w+; weights can be loaded as"):
        load_released(tmp_path, dtype)
    MaskedTransformer(12, 16, 1, 2).save_pretrained(tmp_path / "own")
    for name in ("torch_dtype", "dtype"):
        with pytest.raises(ValueError, match=r"dtype is \w+; weights can be loaded as"):
            MaskedTransformer.from_pretrained(tmp_path / "own", **{name: dtype})
