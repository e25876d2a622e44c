"""`unidiff info`, `convert` and `verify` as a person meets them."""

from __future__ import annotations

import json

import pytest
import torch
from released_parts import tiny_weights, write_tiny
from safetensors.torch import load_file
from tiny_pipeline import tiny_pipeline


@pytest.fixture
def llada(tmp_path):
    write_tiny(tmp_path / "llada", "llada")
    return tmp_path / "llada"


def table(text: str) -> dict[str, str]:
    return {key.strip(): value.strip() for key, value in (line.split(":", 1) for line in text.splitlines())}


def test_info_of_a_released_checkpoint_and_of_its_file(run, llada):
    for path in (llada, llada / "model.safetensors"):
        status, out, _ = run("info", path)
        lines = table(out)
        assert status == 0 and lines["family"] == "llada" and lines["dtype"] == "float32"
        assert lines["parameters"] == f"{sum(v.numel() for v in tiny_weights('llada').values()):,}"
        assert lines["vocabulary"] == "40 ids: text 0-39, no images, [MASK] 30"
        assert "of weights + about" in lines["memory"] and "torch" in lines["unidiff"]


def test_info_of_our_own_folder_either_way(run, tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "model")
    first = run("info", tmp_path / "model")
    assert first == run("info", "--model", tmp_path / "model")
    lines = table(first[1])
    assert lines["family"] == "unidiff" and "24 x 16 pixels" in lines["picture"] and "float32" in lines["memory"]


def test_convert_there_and_back(run, llada, tmp_path):
    status, out, _ = run("convert", llada, tmp_path / "ours")
    assert status == 0 and out == f"{tmp_path / 'ours'}: llada in unidiff's layout\n"
    assert table(run("info", tmp_path / "ours")[1])["family"] == "llada"
    status, out, _ = run("convert", tmp_path / "ours", tmp_path / "back", "--dtype", "bfloat16")
    assert status == 0 and "in the released layout" in out
    back, state = load_file(tmp_path / "back" / "model.safetensors"), load_file(llada / "model.safetensors")
    assert set(back) == set(state) and all(torch.equal(back[n], v.bfloat16()) for n, v in state.items())
    status, _, error = run("convert", llada, tmp_path / "ours")
    assert status == 1 and error == f"unidiff: {tmp_path / 'ours'} is not an empty folder; name a new one\n"


def test_verify_says_what_differs_and_fails(run, llada):
    status, out, _ = run("verify", llada, "--device", "cpu")
    assert status == 1 and "closest to llada" in out and "FAIL published settings" in out
    assert "ok   known answer" in out and "ok   a pass of this checkpoint" in out


def test_mistakes_are_one_sentence(run, llada, tmp_path):
    (llada / "config.json").write_text(json.dumps({"hidden": 1}))
    for command in ("info", "verify"):
        status, _, error = run(command, llada)
        assert status == 1 and error.startswith("unidiff: ") and error.count("\n") == 1 and "name the family" in error
    status, _, error = run("info", tmp_path / "none")
    assert status == 1 and "does not exist" in error
    status, _, error = run("convert", llada, tmp_path / "x", "--dtype", "int3")
    assert status == 1 and "dtype is 'int3'" in error
