"""Every published value of every released model: config map, vocabulary, parameter count, sampler defaults.

Tiny fixtures cannot tell an epsilon of 1e-5 from 1e-6, or one rotary base from another; these values can.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache

import pytest
import torch
from golden import golden_cases
from published_values import MUDDIT_TENSORS, PUBLISHED
from reference.llada_decoding import LladaSettings

from unidiff.decoding.cache import MaxLogitCache
from unidiff.families.checkpoint.verify import closest_release, differences
from unidiff.families.dynin.rows import DyninLayout
from unidiff.families.family import FAMILIES, Family, Release, named_vocabulary
from unidiff.families.layout import TaskInputs
from unidiff.families.llada.rows import llada_sampler
from unidiff.families.llada_v.rows import llada_v_sampler
from unidiff.families.lumina import lumina_image_sampler
from unidiff.families.mmada import MMaDALayout
from unidiff.families.muddit.denoiser import MudditConditions
from unidiff.families.muddit.rows import MeissonicLayout, MudditLayout, muddit_sampler
from unidiff.families.unidisc.rows import UniDiscLayout, unidisc_sampler
from unidiff.models import mmdit_blocks
from unidiff.models.dual_mmdit import DualMMDiT
from unidiff.models.mmdit import MMDiT
from unidiff.models.parts import Norm
from unidiff.models.transformer import MaskedTransformer
from unidiff.tokens import Vocabulary
from unidiff.tokens.image import conv
from unidiff.tokens.image.vq import VQImageTokenizer

RELEASES = {release.name: (family, release) for family in FAMILIES.values() for release in family.releases}
EACH = pytest.mark.parametrize("name", RELEASES)


def test_every_family_has_published_values_and_names_are_unique():
    stated_in_part = {"siglip_vq"}
    assert {family.name for family in FAMILIES.values() if not family.releases} <= stated_in_part
    assert set(PUBLISHED) == set(RELEASES) and len(RELEASES) == sum(len(f.releases) for f in FAMILIES.values())
    assert closest_release(replace(FAMILIES["mdlm"], releases=()), {}) is None


@cache
def empty(name: str) -> torch.nn.Module:
    """The network of a release without memory, made once; nothing changes it."""
    return empty_of(*RELEASES[name])


def empty_of(family: Family, release: Release) -> torch.nn.Module:
    with torch.device("meta"):
        return family.make(release.config)


def ids_of(name: str) -> Vocabulary | None:
    family, release = RELEASES[name]
    return family.vocabulary(release.config) if family.vocabulary is not None else None


def plain(value):
    return list(value) if isinstance(value, tuple) else value


@EACH
def test_every_published_setting_arrives(name: str):
    """Upstream's config through our map into our model, made without memory; then what the model says of itself."""
    model = empty(name)
    assert not differences(*RELEASES[name], dict(model.config), ids_of(name))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    for key, value in PUBLISHED[name].settings.items():
        assert plain(model.config[key]) == plain(value), key
        assert key not in RELEASES[name][0].unstated


@EACH
def test_parameter_counts_are_those_stated(name: str):
    release = RELEASES[name][1]
    count = sum(p.numel() for p in empty(name).parameters())
    if release.parameters is None:
        assert count > 1e6  # no number is stated
        return
    assert count == pytest.approx(release.parameters, rel=release.tolerance, abs=0)
    if not release.tolerance:
        assert count == release.parameters


def test_tensors_of_the_muddit_file():
    assert len(FAMILIES["muddit"].keymap(empty("muddit"), {}).names()) == MUDDIT_TENSORS == 868


@EACH
def test_a_changed_value_is_reported(name: str):
    """Each published setting is told apart from any other value."""
    family, release = RELEASES[name]
    settings, vocabulary = dict(empty(name).config), ids_of(name)
    for key in PUBLISHED[name].settings.keys() & family.settings(release.config).keys():
        found = differences(family, release, {**settings, key: "another"}, vocabulary)
        assert [d.name for d in found] == [key] and f"{key} is 'another', published " in str(found[0])
    if vocabulary is not None:
        moved = replace(vocabulary, mask_id=vocabulary.mask_id - 1)
        assert "vocabulary.mask_id" in [d.name for d in differences(family, release, settings, moved)]
        bare = replace(vocabulary, specials={})
        names = {d.name for d in differences(family, release, settings, bare)}
        assert names >= {f"vocabulary.{n}" for n in PUBLISHED[name].vocabulary.get("specials", {})}


@pytest.mark.parametrize(
    ("name", "theirs", "value", "ours"),
    [
        ("llada-8b-base", "rms_norm_eps", 1e-6, "norm_eps"),
        ("llada-8b-instruct", "rope_theta", 1e4, "rope_theta"),
        ("llada-1.5", "n_kv_heads", 8, "num_kv_heads"),
        ("mmada-8b", "rms_norm_eps", 1e-6, "norm_eps"),
        ("mmada-8b", "rope_theta", 1e4, "rope_theta"),
        ("lumina-dimoo", "mlp_hidden_size", 11008, "ffn_size"),
        ("muddit", "axes_dims_rope", [32, 48, 48], "rope_axes"),
        ("llamagen-vq-16", "codebook_embed_dim", 256, "code_dim"),
    ],
)
def test_upstreams_value_is_honoured_not_assumed(name: str, theirs: str, value, ours: str):
    family, release = RELEASES[name]
    changed = replace(release, config={**release.config, theirs: value})
    assert ours in [d.name for d in differences(family, release, dict(empty_of(family, changed).config))]


def test_unidisc_rotary_factor_and_norms_are_honoured():
    family, release = RELEASES["unidisc-1.4b"]
    model = dict(release.config["model"])
    for change, ours in (
        ({"linear_factor": 3}, ["rope_linear_factor"]),
        ({"norm_type": "layernorm"}, ["norm", "norm_eps"]),
        ({"sandwich_normalization": False}, ["attention_gate", "sandwich_norm"]),
        ({"qk_norm": False}, ["qk_norm"]),
    ):
        changed = replace(release, config={**release.config, "model": {**model, **change}})
        assert [d.name for d in differences(family, release, dict(empty_of(family, changed).config))] == ours


def epsilons(model: torch.nn.Module) -> set[float]:
    return {module.eps for module in model.modules() if isinstance(module, Norm) and module.kind == "rms"}


@pytest.mark.parametrize(
    ("name", "eps"),
    [
        ("unidisc-1.4b", 1e-6),
        ("unidisc-1.4b-interleaved", 1e-6),
        ("unidisc-small", 1e-6),
        ("llada-8b-base", 1e-5),
        ("mmada-8b", 1e-5),
        ("lumina-dimoo", 1e-5),
        ("muddit", 1e-6),
        ("meissonic", 1e-6),
    ],
)
def test_every_rms_norm_of_the_network_has_the_published_epsilon(name: str, eps: float):
    """Not only the config: the modules that compute."""
    model = empty(name)
    assert epsilons(model) == {eps}
    if isinstance(model, MMDiT):
        assert eps == mmdit_blocks.NORM_EPS


@pytest.mark.parametrize("name", [name for name, published in PUBLISHED.items() if published.vocabulary])
def test_the_named_vocabulary_is_the_published_one(name: str):
    """`named_vocabulary` and the family's own map agree with the published ids, and every named id is inside."""
    family, published = RELEASES[name][0].name, PUBLISHED[name].vocabulary
    names = {"unidisc": "unidisc-magvit", "meissonic": "muddit"}
    other = "unidisc-vq16" if published["size"] == 48385 else names.get(family, family)
    named = [] if family == "dream" else [named_vocabulary(other)]
    for vocabulary in (*named, ids_of(name)):
        for key, value in published.items():
            if key == "specials":
                known = {n: i for n, i in value.items() if n in vocabulary.specials}
                assert known and all(vocabulary.specials[n] == i for n, i in known.items())
            else:
                assert getattr(vocabulary, key) == value, key
        assert vocabulary.size == rows_of(empty(name))


def rows_of(model: torch.nn.Module) -> int:
    """Rows of the embedding table(s): one for both modalities, or CLIP's with [MASK] and the codes' apart."""
    if isinstance(model, MaskedTransformer):
        return model.embed_tokens.num_embeddings
    if isinstance(model, DualMMDiT):
        return model.config.vocab_size
    return 49408 + 1 + model.config.vocab_size


def test_codebooks_fit_the_vocabularies():
    codes = {name: empty(name).codebook_size for name in ("llamagen-vq-16", "magvitv2")}
    assert named_vocabulary("unidisc-vq16").image_size == codes["llamagen-vq-16"] == 16384
    for name in ("unidisc-magvit", "mmada", "dynin"):
        assert named_vocabulary(name).image_size == codes["magvitv2"] == 8192
    assert [empty(n).factor for n in ("llamagen-vq-16", "llamagen-vq-8", "magvitv2")] == [16, 8, 16]


def test_the_vq_model_of_muddit_meissonic_and_lumina():
    tokenizer = VQImageTokenizer(empty("muddit-vq"))
    assert (tokenizer.factor, tokenizer.codebook_size) == (16, 8192)
    assert tokenizer.codebook_size == named_vocabulary("muddit").image_size == named_vocabulary("lumina").image_size
    assert tuple(tokenizer.model.quantize.embedding.weight.shape) == (8192, 64)
    assert tokenizer.model.config.force_upcast


def test_sampler_defaults_are_the_published_ones():
    muddit, drawn, told = PUBLISHED["muddit"].sampling, muddit_sampler(), MudditConditions()
    assert {name: getattr(told, name) for name in ("aesthetic_score", "crop")} == {
        name: muddit[name] for name in ("aesthetic_score", "crop")
    }
    assert (drawn.image.choice_temperature, 0.0) == muddit["temperature"]  # falls to 0 with the time
    assert drawn.guidance.scale == muddit["guidance_scale"] and 48 <= drawn.image.steps <= 64
    llada, text = PUBLISHED["llada-8b-base"].sampling, LladaSettings()
    assert {n: getattr(text, n) for n in ("steps", "gen_length", "block_length", "cfg_scale")} == {
        n: llada[n] for n in ("steps", "gen_length", "block_length", "cfg_scale")
    }
    assert llada["temperature"] == 0 and not text.random_order  # greedy, by confidence
    lumina, cache = PUBLISHED["lumina-dimoo"].sampling, MaxLogitCache()
    assert (cache.ratio, cache.warmup, cache.interval) == tuple(
        lumina[n] for n in ("cache_ratio", "warmup_ratio", "refresh_interval")
    )


def test_defaults_of_the_tasks_are_the_published_ones():
    unidisc, ours = PUBLISHED["unidisc-1.4b"].sampling, unidisc_sampler()
    assert unidisc["predictor"] == "maskgit" and ours.image.rule == ours.text.rule == "quota"
    assert ours.image.steps == ours.text.steps == unidisc["steps"]
    assert ours.guidance.scale == 1 + unidisc["cfg"] and ours.guidance.mode == "ramp"
    assert ours.image.choice_temperature == unidisc["r_temp"]
    rows = UniDiscLayout(ids_of("unidisc-1.4b"), str.split)
    assert (rows.text_length, rows.side**2) == (128, 256)
    dynin, omni = PUBLISHED["dynin-omni"].sampling, DyninLayout(ids_of("dynin-omni"), lambda text: [5])
    pictures = omni.request("text_to_image", TaskInputs(1, ["a fox"])).config
    edits = omni.request("edit", TaskInputs(1, ["a fox"], codes=torch.zeros(1, 2, 2, dtype=torch.long))).config
    assert omni.text_length == dynin["max_text_len"] and (omni.side**2, omni.seen**2) == (1024, 441)
    for ours, steps in ((pictures, dynin["timesteps"]), (edits, dynin["edit_timesteps"])):
        assert ours.image.steps == steps and ours.guidance.scale == 1 + dynin["guidance_scale"]
        assert ours.image.choice_temperature == dynin["temperature"]
    lumina, picture = PUBLISHED["lumina-dimoo"].sampling, lumina_image_sampler()
    assert picture.image.steps == lumina["timesteps"] and picture.guidance.scale == 1 + lumina["cfg_scale"]
    words, chat = PUBLISHED["llada-8b-instruct"].sampling, llada_sampler(ids_of("llada-8b-instruct"))
    assert chat.text.steps == words["steps"] and chat.text.temperature == words["temperature"]
    assert chat.guidance.scale == 1 + words["cfg_scale"]
    seen, talk = PUBLISHED["llada-v"].sampling, llada_v_sampler(ids_of("llada-v"))
    assert (talk.text.steps, talk.text.block_length) == (seen["steps"], seen["block_length"]) == (128, 128)
    assert talk.text.temperature == seen["temperature"] and talk.guidance.scale == 1 + seen["cfg_scale"]


def test_group_norms_of_the_image_tokenizers_have_32_groups_and_epsilon_1e_6():
    """LlamaGen and MAGVIT-v2 share them. On an input of variance 1e-6 the epsilon halves the variance that is left."""
    norm = conv.ImageNorm(64)
    x = 1e-3 * torch.randn(1, 64, 64, 64, generator=torch.Generator().manual_seed(0))
    out = norm(x)
    assert conv.NORM_GROUPS == 32
    grouped = x.view(1, 32, -1)
    expected = (grouped - grouped.mean(-1, keepdim=True)) / (
        grouped.var(-1, unbiased=False, keepdim=True) + 1e-6
    ).sqrt()
    torch.testing.assert_close(out, expected.view_as(x), atol=1e-4, rtol=1e-4)


def test_time_conventions_of_the_mm_dits():
    """Muddit tells (N - 1 - k) / N, Meissonic N - 1 - k; see `test_muddit_denoiser`."""
    assert (MudditLayout.time, MeissonicLayout.time) == ("fraction", "index")


def test_the_closest_release_is_found():
    model = empty("unidisc-small")
    release, found = closest_release(FAMILIES["unidisc"], dict(model.config), ids_of("unidisc-small"))
    assert release.name == "unidisc-small" and not found
    changed = {**model.config, "norm_eps": 1e-5}
    release, found = closest_release(FAMILIES["unidisc"], changed)
    assert release.name == "unidisc-small" and [str(d) for d in found] == ["norm_eps is 1e-05, published 1e-06"]


@pytest.mark.golden
@pytest.mark.parametrize("folder", golden_cases("dynin"), ids=lambda f: getattr(f, "name", "absent"))
def test_ids_of_dynin_are_those_that_the_set_records(folder):
    stored = json.loads((folder / "config.json").read_text())["released_reference"]
    vocabulary, sampling = PUBLISHED["dynin-omni"].vocabulary, PUBLISHED["dynin-omni"].sampling
    codes = (stored["image_token_offset"], stored["image_token_offset"] + stored["codebook_size"])
    speech = (stored["speech_token_offset"], stored["speech_token_offset"] + stored["speech_codebook_size"])
    assert vocabulary["size"] == stored["new_vocab_size"] and vocabulary["image"] == codes
    assert vocabulary["mask_id"] == stored["mask"] and vocabulary["text"] == (0, stored["text_tokenizer_len"])
    assert vocabulary["others"] == {"speech": speech}
    marks = {"start_header": 126346, "end_header": 126347, "eot": 126348, "bos": stored["bos"], "eos": stored["eos"]}
    assert set(stored["reserved"].values()) | set(marks.values()) == set(vocabulary["specials"].values())
    drawn, layout = stored["t2i"], DyninLayout(ids_of("dynin-omni"), str.split)
    assert {name: drawn[name] for name in ("guidance_scale", "timesteps", "temperature")} == {
        name: sampling[name] for name in ("guidance_scale", "timesteps", "temperature")
    }
    assert layout.side**2 == drawn["num_vq_tokens"] and layout.seen**2 == stored["i2i"]["num_vq_tokens"]
    assert layout.cuts == (drawn["prefix_cut"], stored["i2i"]["prefix_cut"])
    assert sampling["edit_timesteps"] == stored["i2i"]["timesteps_actually_used"]


@pytest.mark.golden
@pytest.mark.parametrize(
    "folder",
    golden_cases("mmada"),
    ids=lambda f: getattr(f, "name", "absent"),
)
def test_ids_of_mmada_are_those_that_the_set_records(folder):
    stored = json.loads((folder / "config.json").read_text())["released_reference"]
    vocabulary = PUBLISHED["mmada-8b"].vocabulary
    codes = (stored["image_token_offset"], stored["image_token_offset"] + stored["codebook_size"])
    assert vocabulary["size"] == stored["new_vocab_size"] and vocabulary["image"] == codes
    assert vocabulary["mask_id"] == stored["mask"] and vocabulary["text"] == (0, stored["text_tokenizer_len"])
    assert MMaDALayout(ids_of("mmada-8b"), str.split).side ** 2 == stored["num_vq_tokens"]
    ids = {v for k, v in stored.items() if isinstance(v, int) and 126080 <= v < 126349 and k != "mask"}
    parallel = {"interleave", "t2it"}  # of MMaDA-Parallel, whose set records them
    assert ids == {i for name, i in vocabulary["specials"].items() if name not in parallel}
