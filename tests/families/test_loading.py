"""`load_released`: files of every kind, families recognised, and one clear sentence for everything that does not fit."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from released_parts import Payload, tiny_weights, write_tiny
from safetensors.torch import load_file, save_file

from unidiff.families.checkpoint.convert import convert, save_shards
from unidiff.families.checkpoint.load import load_released
from unidiff.families.family import FAMILIES, fitting, recognise

LLADA = FAMILIES["llada"].tiny.config


@pytest.fixture
def folder(tmp_path):
    """A released LLaDA folder with a config and no weights yet."""
    (tmp_path / "config.json").write_text(json.dumps(LLADA))
    return tmp_path


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return set(found) == set(expected) and all(torch.equal(found[n], v) for n, v in expected.items())


# ------------------------------------------------------------------------------------------------------- recognition


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_is_recognised_from_its_folder(family, tmp_path):
    state = write_tiny(tmp_path, family)
    loaded = load_released(tmp_path, torch.bfloat16, vocabulary=FAMILIES[family].tiny.vocabulary)
    assert loaded.family.name == family and not loaded.model.training
    assert {v.dtype for v in loaded.model.state_dict().values() if v.is_floating_point()} == {torch.bfloat16}
    assert (loaded.vocabulary is None) == (loaded.images is not None)
    assert same(loaded.state_dict(), {n: loaded.state_dict()[n] for n in state})
    names = [f.name for f in fitting(FAMILIES[family].tiny.config)]
    assert names == [family]  # no config is two families'


@pytest.mark.parametrize("family", ["unidisc", "mdlm", "dream", "llamagen", "magvit"])
def test_keys_alone_tell_where_they_can(family):
    assert recognise({}, list(tiny_weights(family))).name == family


def test_a_config_that_only_keys_or_only_a_person_can_place(folder):
    state = tiny_weights("llada")
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").unlink()
    with pytest.raises(
        ValueError, match=r"may be those of dynin or llada or lumina or mmada, which only a config\.json"
    ):
        load_released(folder)
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json, which llada needs"):
        load_released(folder, family="llada")
    assert load_released(folder, family="llada", config=LLADA).family.name == "llada"
    (folder / "config.json").write_text(json.dumps({"hidden": 3}))
    with pytest.raises(
        ValueError, match=r"those of dynin or llada or lumina or mmada, but its config has no marks .*\(hidden"
    ):
        load_released(folder)
    with pytest.raises(ValueError, match=r"family is 'gpt'; expected one of"):
        load_released(folder, family="gpt")
    save_file({"a.weight": torch.ones(2)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"no known family has weights named a\.weight"):
        load_released(folder)


def test_a_config_in_yaml(tmp_path):
    state = write_tiny(tmp_path, "unidisc", "unidisc.safetensors")
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.yaml").write_text(json.dumps(FAMILIES["unidisc"].tiny.config))  # JSON is YAML
    write_tiny(tmp_path / "vqvae", "vq_model")  # its tokenizer beside it is not meant
    assert same(load_released(tmp_path).state_dict(), state)


# ------------------------------------------------------------------------------------------------- kinds of files


@pytest.mark.parametrize("entry", ["ema", "model", "state_dict", None])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "_orig_module.", "module._orig_mod."])
def test_torch_files_with_entries_and_prefixes(folder, entry, prefix):
    state = tiny_weights("llada")
    named = {prefix + name: value for name, value in state.items()}
    torch.save(named if entry is None else {entry: named, "step": 7}, folder / "pytorch_model.bin")
    loaded = load_released(folder)
    assert same(loaded.state_dict(), state)
    assert all(not p.is_meta and p.requires_grad for p in loaded.model.parameters())


@pytest.mark.parametrize("zipped", [True, False])
def test_averaged_weights_win_and_the_others_can_be_asked_for(folder, zipped):
    ema, model = tiny_weights("llada", 1), tiny_weights("llada", 2)
    path = folder / "trained.pt"
    torch.save({"model": model, "ema": ema}, path, _use_new_zipfile_serialization=zipped)
    assert same(load_released(folder).state_dict(), ema)
    assert same(load_released(path, entry="model").state_dict(), model)
    with pytest.raises(ValueError, match=r"no entry 'teacher'; it has \['ema', 'model'\]"):
        load_released(path, entry="teacher")


def test_lightning_files_use_their_averaged_weights(tmp_path):
    state = write_tiny(tmp_path, "mdlm")
    rows = [n for n in state if n not in FAMILIES["mdlm"].constants]
    (tmp_path / "model.safetensors").unlink()
    content = {"state_dict": state, "ema": {"decay": 0.9, "shadow_params": [state[n] + 1 for n in rows]}}
    torch.save(content, tmp_path / "best.ckpt")
    found = load_released(tmp_path).state_dict()
    assert all(torch.equal(found[n], state[n] + 1) for n in rows)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards_and_what_can_be_wrong_with_them(folder, kind):
    state = tiny_weights("llada")
    stem = "model" if kind == "safetensors" else "pytorch_model"
    save_shards(state, folder, stem, "6KB")
    index = folder / f"{stem}.safetensors.index.json"
    listed = json.loads(index.read_text())
    if kind == "bin":
        listed["weight_map"] = {n: p.replace("safetensors", "bin") for n, p in listed["weight_map"].items()}
        for path in folder.glob("*-of-*.safetensors"):
            torch.save(load_file(path), path.with_suffix(".bin"))
            path.unlink()
        index.unlink()
        index = folder / "pytorch_model.bin.index.json"
        index.write_text(json.dumps(listed))
    assert same(load_released(folder).state_dict(), state)
    assert same(load_released(index).state_dict(), state)
    shards = sorted(set(listed["weight_map"].values()))
    assert len(shards) > 2
    name = next(n for n, p in listed["weight_map"].items() if p == shards[0])
    index.write_text(json.dumps({"weight_map": {**listed["weight_map"], name: shards[1]}}))
    with pytest.raises(ValueError, match=r"does not hold what .*index\.json says: 0 missing \(\), 1 unexpected"):
        load_released(folder)
    index.write_text(json.dumps({"weight_map": {**listed["weight_map"], "more": "../" + shards[1]}}))
    with pytest.raises(ValueError, match="expected plain file names"):
        load_released(folder)
    index.write_text("{}")
    with pytest.raises(ValueError, match=r"no index with a weight_map"):
        load_released(folder)
    index.write_text(json.dumps(listed))
    (folder / shards[1]).unlink()
    with pytest.raises(
        FileNotFoundError, match=rf"{shards[1]} does not exist; .* \(1 of {len(shards)} shards are missing"
    ):
        load_released(folder)


def test_diffusers_folders_and_subfolders(tmp_path):
    state = write_tiny(tmp_path / "all" / "512" / "transformer", "muddit", "diffusion_pytorch_model.safetensors")
    write_tiny(tmp_path / "all" / "1024" / "transformer", "muddit", "diffusion_pytorch_model.safetensors")
    assert same(load_released(tmp_path / "all" / "512").state_dict(), state)
    assert same(load_released(tmp_path / "all", subfolder="512").state_dict(), state)
    with pytest.raises(FileNotFoundError, match=r"holds several models; give subfolder='1024'"):
        load_released(tmp_path / "all")
    with pytest.raises(FileNotFoundError, match="256 does not exist"):
        load_released(tmp_path / "all", subfolder="256")


def test_the_hub_is_asked_for_torch_files_too(tmp_path, monkeypatch):
    asked = {}

    def download(name, allow_patterns, **options):
        asked.update(name=name, patterns=allow_patterns, **options)
        return str(tmp_path)

    write_tiny(tmp_path, "llada")
    monkeypatch.setattr("unidiff.hub.snapshot_download", download)
    assert load_released("someone/model", revision="v1").family.name == "llada"
    assert asked["name"] == "someone/model" and asked["revision"] == "v1" and "*.bin" in asked["patterns"]


# ----------------------------------------------------------------------------------------------------------- errors


def test_truncated_files(folder):
    save_file(tiny_weights("llada"), folder / "model.safetensors")
    whole = (folder / "model.safetensors").read_bytes()
    for size in (0, 4, 100, len(whole) - 1):
        (folder / "model.safetensors").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"cannot be read as safetensors .*download it again"):
            load_released(folder)
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    torch.save(tiny_weights("llada"), path)
    whole = path.read_bytes()
    for size in (10, len(whole) // 2, len(whole) - 20):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"pytorch_model\.bin is damaged; download it again"):
            load_released(folder)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_in_it_is_not_run(folder, zipped):
    marker = folder / "made"
    content = {**tiny_weights("llada"), "note": Payload(str(marker))}
    torch.save(content, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="could run code; convert it to safetensors"):
        load_released(folder)
    assert not marker.exists()


def test_a_wrong_family(tmp_path):
    write_tiny(tmp_path, "llada")
    (tmp_path / "config.json").write_text(json.dumps(FAMILIES["unidisc"].tiny.config))
    with pytest.raises(
        ValueError, match=r"config describes unidisc, but the weights are those of dynin or llada or lumina or mmada"
    ):
        load_released(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLADA))
    with pytest.raises(ValueError, match=r"as mdlm: .*; the weights may be those of dynin or llada or lumina or mmada"):
        load_released(tmp_path, family="mdlm")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layers": 3}, r"9 missing \(transformer\.blocks\.2\.attn_norm\.weight, .*fit: a config .*2 layers"),
        ({"n_layers": 1}, r"0 missing, 9 left over \(transformer\.blocks\.1\.attn_norm\.weight, "),
        (
            {"vocab_size": 41, "embedding_size": 41},
            r"2 misshaped \('transformer\.wte\.weight' gives shape \(40, 16\) and .*\(41, 16\)",
        ),
        ({"mlp_hidden_size": 25}, r"6 misshaped .*ff_proj.* gives shape \(24, 16\) and the config asks for \(25, 16\)"),
        ({"vocab_size": 41, "embedding_size": 41}, r"would fit: .*wte\.weight of shape \(40, 16\)"),
    ],
)
def test_a_mismatch_lists_the_first_names_and_what_would_fit(tmp_path, change, message):
    write_tiny(tmp_path, "llada", **change)
    with pytest.raises(ValueError, match=message):
        load_released(tmp_path)


def test_partial_and_broken_weights_are_refused(folder):
    state = tiny_weights("llada")
    lost = "model.transformer.blocks.1.v_proj.weight"
    save_file({n: v for n, v in state.items() if n != lost}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 missing \(transformer\.blocks\.1\.v_proj\.weight\), 0 left over"):
        load_released(folder)
    save_file({**state, lost: state[lost] * torch.nan}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"NaN or infinity \(blocks\.1\.attention\.qkv\.weight\)"):
        load_released(folder)
    save_file({**state, lost: state[lost].half()}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"belong together are stored as .*float16.*; give a dtype"):
        load_released(folder)
    assert load_released(folder, torch.float16).family.name == "llada"
    (folder / "config.json").write_text(json.dumps({k: v for k, v in LLADA.items() if k != "n_heads"}))
    with pytest.raises(ValueError, match=r"its config has no 'n_heads', which llada needs"):
        load_released(folder)


def test_configs_with_unknown_keys(tmp_path):
    write_tiny(tmp_path / "a", "llada")
    convert(tmp_path / "a", tmp_path / "b")
    for name, message in (
        ("config.json", r"MaskedTransformer config has unknown keys \['hiden_size'\]"),
        ("released.json", r"released\.json is damaged: it has unknown settings \['hiden_size'\]"),
    ):
        copy = tmp_path / name
        shutil.copytree(tmp_path / "b", copy)
        (copy / name).write_text(json.dumps({**json.loads((copy / name).read_text()), "hiden_size": 3}))
        with pytest.raises(ValueError, match=message):
            load_released(copy)
    for family in ("muddit", "vq_model", "magvit"):
        write_tiny(tmp_path / family, family, hiden_size=3)
        with pytest.raises(ValueError, match=r"unknown .*\['hiden_size'\]"):
            load_released(tmp_path / family)


def test_a_converted_folder_that_lost_weights(tmp_path):
    write_tiny(tmp_path / "a", "llada")
    convert(tmp_path / "a", tmp_path / "b")
    path = tmp_path / "b" / "diffusion_pytorch_model.safetensors"
    save_file({n: v for n, v in load_file(path).items() if n != "output_weight"}, path)
    with pytest.raises(ValueError, match=r"1 missing \(output_weight\)"):
        load_released(tmp_path / "b")
    (tmp_path / "b" / "config.json").write_text(json.dumps({"_class_name": "Other"}))
    with pytest.raises(ValueError, match="describes a 'Other'; expected one of"):
        load_released(tmp_path / "b")


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_released(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="holds none of"):
        load_released(tmp_path)
    write_tiny(tmp_path, "llada", "a.safetensors")
    shutil.copy(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    with pytest.raises(FileNotFoundError, match=r"holds 2 weight files \(a\.safetensors, \.\.\.\); name one"):
        load_released(tmp_path)
