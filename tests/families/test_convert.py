"""Every family goes to unidiff's folder and back with the same bytes; what comes between runs the same."""

from __future__ import annotations

import json

import pytest
import torch
from golden import golden_folders
from released_parts import golden_checkpoints, tiny_weights, write_tiny
from safetensors.torch import load_file, save_file

from unidiff.families.checkpoint.convert import convert, save_shards
from unidiff.families.checkpoint.load import load_released
from unidiff.families.family import FAMILIES

GOLDEN = golden_checkpoints()
FAMILIES_OF_SETS = {
    "unidisc": {"unidisc"},
    "mdlm": {"mdlm"},
    "llada": {"llada"},
    "dllm_cache": {"llada"},
    "llada_v": {"llada-v"},
    "llada_moe": {"llada-moe"},
    "llada2_mini": {"llada2"},
    "llada2_uni": {"llada2-uni"},
    "mmada": {"mmada"},
    "dynin": {"dynin"},
    "ml_cache": {"lumina"},
    "mmada_parallel": {"lumina", "mmada"},
    "muddit": {"muddit", "meissonic", "vq_model"},
    "llamagen_vq": {"llamagen"},
    "magvitv2": {"magvit"},
}


def read_all(folder) -> dict[str, torch.Tensor]:
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def assert_same_bytes(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape, name
        assert found[name].reshape(-1).view(torch.uint8).equal(value.reshape(-1).view(torch.uint8)), name


@pytest.mark.golden
@pytest.mark.skipif(not GOLDEN, reason="no golden set is there")
@pytest.mark.parametrize("checkpoint", GOLDEN, ids=[f"{c.path.parent.name}/{c.path.stem}" for c in GOLDEN])
def test_golden_round_trip(checkpoint, tmp_path):
    state = checkpoint.write(tmp_path / "released")
    convert(tmp_path / "released", tmp_path / "ours", vocabulary=checkpoint.vocabulary)
    convert(tmp_path / "ours", tmp_path / "back")
    assert_same_bytes(read_all(tmp_path / "back"), state)
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads(json.dumps(checkpoint.config))
    one = load_released(tmp_path / "released", vocabulary=checkpoint.vocabulary)
    for folder in ("ours", "back"):
        again = load_released(tmp_path / folder, vocabulary=None if folder == "ours" else checkpoint.vocabulary)
        assert again.family is one.family and again.vocabulary == one.vocabulary
        assert_same_bytes(again.model.state_dict(), one.model.state_dict())


@pytest.mark.golden
@pytest.mark.skipif(not GOLDEN, reason="no golden set is there")
def test_golden_sets_cover_the_families():
    """So that the round trip above cannot pass by finding nothing: every set that is there brings its families."""
    names = {load_family(checkpoint) for checkpoint in GOLDEN}
    present = {name for name in FAMILIES_OF_SETS if golden_folders(name)}
    assert names == set().union(*(FAMILIES_OF_SETS[name] for name in present))
    if absent := sorted(set(FAMILIES_OF_SETS) - present):
        pytest.skip(f"golden sets {', '.join(absent)} are not there")


def load_family(checkpoint) -> str:
    from unidiff.families.family import recognise

    return recognise(checkpoint.config, load_file(checkpoint.path)).name


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tiny_round_trip(family, dtype, tmp_path):
    write_tiny(tmp_path / "a", family)
    state = tiny_weights(family, dtype=dtype)
    save_file(state, tmp_path / "a" / "model.safetensors")
    convert(tmp_path / "a", tmp_path / "b", vocabulary=FAMILIES[family].tiny.vocabulary)
    assert load_released(tmp_path / "b").family.name == family
    convert(tmp_path / "b", tmp_path / "c")
    assert_same_bytes(read_all(tmp_path / "c"), state)


def test_spellings_of_llada_come_back(tmp_path):
    """Grouped blocks and fused projections, in bfloat16, as torch files with a prefix."""
    state = tiny_weights("llada", dtype=torch.bfloat16)
    fused = {
        n.replace("blocks.", "block_groups.0."): v
        for n, v in state.items()
        if "_proj" not in n or "ff_" in n or "up_" in n
    }
    for layer in range(2):
        parts = [state[f"model.transformer.blocks.{layer}.{x}_proj.weight"] for x in "qkv"]
        fused[f"model.transformer.block_groups.0.{layer}.att_proj.weight"] = torch.cat(parts)
    folder = tmp_path / "a"
    write_tiny(folder, "llada", block_group_size=2)
    (folder / "model.safetensors").unlink()
    torch.save({"state_dict": {f"module.{n}": v for n, v in fused.items()}}, folder / "pytorch_model.bin")
    convert(folder, tmp_path / "b")
    convert(tmp_path / "b", tmp_path / "c")
    assert_same_bytes(read_all(tmp_path / "c"), fused)


def test_constants_come_back_as_they_were_stored_or_not_at_all(tmp_path):
    name = "backbone.rotary_emb.inv_freq"
    state = write_tiny(tmp_path / "a", "mdlm")
    state[name] = state[name].half()
    save_file(state, tmp_path / "a" / "model.safetensors")
    convert(tmp_path / "a", tmp_path / "b")
    convert(tmp_path / "b", tmp_path / "c")
    assert read_all(tmp_path / "c")[name].dtype == torch.float16
    save_file({n: v for n, v in state.items() if n != name}, tmp_path / "a" / "model.safetensors")
    convert(tmp_path / "a", tmp_path / "d")
    convert(tmp_path / "d", tmp_path / "e")
    assert name not in read_all(tmp_path / "e")


def test_shards(tmp_path):
    state = tiny_weights("llada")
    save_shards(state, tmp_path, "model", "8KB")
    (tmp_path / "config.json").write_text(json.dumps(FAMILIES["llada"].tiny.config))
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert_same_bytes(load_released(tmp_path).state_dict(), state)


def test_targets_with_something_in_them_are_refused(tmp_path):
    write_tiny(tmp_path / "a", "llada")
    with pytest.raises(ValueError, match="is not an empty folder"):
        convert(tmp_path / "a", tmp_path / "a")
    with pytest.raises(ValueError, match="is not an empty folder"):
        convert(tmp_path / "a", tmp_path / "a" / "config.json")
    damaged = tmp_path / "b"
    write_tiny(damaged, "llada", n_layers=3)
    with pytest.raises(ValueError, match="missing"):
        convert(damaged, tmp_path / "c")
    assert not (tmp_path / "c").exists()
