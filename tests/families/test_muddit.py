"""The Muddit family without golden data: published values, refusals, and the defects that the default mode fixes."""

from __future__ import annotations

import math

import pytest
import torch
from muddit_parts import released_config, tiny_clip, tiny_model

from unidiff.diffusion.schedules import get_schedule
from unidiff.families.family import named_vocabulary
from unidiff.families.muddit import MUDDIT, PUBLISHED
from unidiff.families.muddit.denoiser import MudditConditions
from unidiff.families.muddit.rows import MaskGit, muddit_sampler
from unidiff.models.mmdit import MMDiT
from unidiff.models.mmdit_blocks import NORM_EPS


def test_published_values():
    """Sizes, constants and the published count of parameters and tensors."""
    for name, config in PUBLISHED.items():
        kwargs = MUDDIT.settings(config)
        with torch.device("meta"):
            model = MMDiT(**kwargs)
        names = MUDDIT.keymap(model, {}).names()
        text = kwargs["text_vocab_size"]
        assert (name == "muddit") == (text is not None)
        assert sum(p.numel() for p in model.parameters()) == 1_057_540_096 - (0 if text else 49408 * 1024)
        assert len(names) == len(set(names)) == (868 if text else 867)
        assert MUDDIT.vocabulary(config) == named_vocabulary("muddit")
        assert model.config.rope_theta == 1e4 and tuple(model.config.rope_axes) == (16, 56, 56)
        assert (model.config.num_layers, model.config.num_single_layers, model.config.downsample) == (14, 28, True)
        assert (model.config.num_heads, model.config.head_dim) == (8, 128)
        assert (model.config.text_dim, model.config.pooled_dim) == (1024, 1024)
        norms = {m.eps for m in model.modules() if hasattr(m, "eps")}
        assert norms == {1e-6} == {NORM_EPS}
    config, told = muddit_sampler(), MudditConditions()
    assert (config.image.steps, config.image.schedule, config.image.choice_temperature) == (48, "cosine", 2.0)
    assert config.guidance.scale == 9.0 and config.text == config.image
    assert told == MudditConditions("fraction", 6.0, (0.0, 0.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(windows=3), r"config keys \['windows'\]"),
        (dict(guidance_embeds=True), "guidance_embeds = True; only False"),
        (dict(upsample=False), "downsample and upsample differ"),
        (dict(_class_name="FluxTransformer2DModel"), "describes a FluxTransformer2DModel"),
    ],
)
def test_other_configurations_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        MUDDIT.settings({**PUBLISHED["muddit"], **change})


def test_wrong_weights_are_refused_and_names_round_trip():
    model = tiny_model()
    config = released_config(model)
    state = MUDDIT.export(model)
    back, vocabulary = MUDDIT.load({"model": {f"module.{k}": v for k, v in state.items()}}, config, torch.float64)
    assert {p.dtype for p in back.parameters()} == {torch.float64} and not back.training
    assert vocabulary.image_size == 16 and vocabulary.mask_id == 48 and vocabulary.image_mask == 49 + 19
    for change, message in (
        (lambda s: s.pop("context_embedder.bias"), r"1 missing \(context_embedder.bias\)"),
        (lambda s: s.update(extra=torch.zeros(1)), r"1 left over \(extra\)"),
        (lambda s: s.update({"project_to_hidden.weight": torch.zeros(3, 3)}), r"gives shape \(3, 3\)"),
        (lambda s: s["context_embedder.bias"].fill_(torch.nan), "NaN or infinity"),
    ):
        broken = {k: v.clone() for k, v in state.items()}
        change(broken)
        with pytest.raises(ValueError, match=message):
            MUDDIT.load(broken, config)


# The commit rule of a decode that begins in the middle


def passes(rule: MaskGit, hidden: list[int], length: int = 12) -> list[list[int]]:
    """How many positions of each row are left after each pass, with random scores."""
    g, left, found = torch.Generator().manual_seed(0), torch.tensor(hidden), []
    while bool((left > 0).any()):
        score = torch.rand(len(hidden), length, generator=g, dtype=torch.float64)
        real = torch.arange(length) < left[:, None]
        pick = rule(score, score.log(), real, left, torch.arange(length).expand(real.shape))
        assert not (pick & ~real).any()
        worst = torch.where(real & ~pick, score, -1.0).amax(1)
        assert bool((torch.where(pick, score, 2.0).amin(1) >= worst).all()), "the surest are filled"
        left = left - pick.sum(1)
        found.append(left.tolist())
    return found


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_decode_from_the_middle_goes_on_by_the_schedule(schedule):
    """12 hidden of 6 steps' last 3: as many stay as if the first 3 had been made."""
    share = get_schedule(schedule).masked_share
    done = torch.arange(3, 7, dtype=torch.float64) / 6
    expected = (12 * share(done[1:]) / share(done[0]) + 1e-9).floor().long().tolist()
    assert passes(MaskGit(6, 3, schedule), [12]) == [[n] for n in expected] and expected[-1] == 0
    together = passes(MaskGit(6, 3, schedule), [12, 5, 8])
    for row, count in enumerate((12, 5, 8)):  # rows do not depend on each other
        alone = [left for (left,) in passes(MaskGit(6, 3, schedule), [count])]
        assert [left[row] for left in together][: len(alone)] == alone


def test_the_references_counts_are_averaged_over_the_batch():
    """With `upstream`, what a row keeps depends on its neighbours; without, and in the sampler's quota, it does not."""
    alone = passes(MaskGit(4, upstream=48), [12], 48)
    together = passes(MaskGit(4, upstream=48), [12, 48], 48)
    assert [row[0] for row in together][: len(alone)] != [row[0] for row in alone]
    planned = [int(12 * share) for share in torch.cos(torch.arange(1, 4) / 4 * math.pi / 2)]
    assert [left for (left,) in alone] == [*planned, 0]


def test_conditions_of_another_kind_are_refused():
    assert MudditConditions(crop=(1, 2)).micro(64, 32).tolist() == [[32, 64, 1, 2, 6]]
    with pytest.raises(ValueError, match="time = 'percent'"):
        MudditConditions(time="percent")
    for value in ("x", None, [], math.nan, math.inf, 1e300, 2**70, 1j):
        for name in ("time", "aesthetic_score", "crop"):
            with pytest.raises(ValueError, match=name):
                MudditConditions(**{name: value})


# Text


def test_text_that_does_not_fit_is_refused():
    encoder = tiny_clip()
    with pytest.raises(ValueError, match="T at most 10"):
        encoder(torch.zeros(1, 11, dtype=torch.long))
    with pytest.raises(ValueError, match="text id 49 is unknown"):
        encoder(torch.tensor([[49]]))
    with pytest.raises(ValueError, match="no mask embedding was given"):
        tiny_clip(mask_embedding=False)(torch.tensor([[46, 48]]))
    with pytest.raises(ValueError, match="expected 16 finite numbers"):
        type(encoder)(tiny_clip(mask_embedding=False).encoder, torch.zeros(3))


def test_the_mask_row_is_used_and_old_end_tokens_are_understood():
    a, b = tiny_clip(), tiny_clip()
    b.encoder.get_input_embeddings().weight.data[48] += 1
    ids = torch.tensor([[46, 3, 48, 48]])
    assert not torch.allclose(a(ids).sequence, b(ids).sequence)
    plain = torch.tensor([[46, 3, 47, 0]])
    torch.testing.assert_close(a(plain).sequence, tiny_clip(mask_embedding=False)(plain).sequence)
    assert a.end_id == 47
    a.encoder.config.eos_token_id = 2  # what older CLIP configurations say
    assert type(a)(tiny_clip(mask_embedding=False).encoder).end_id == 47
