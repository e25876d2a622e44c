"""The Muddit family without golden data: published values, refusals, and the defects that the default mode fixes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from muddit_parts import released_config, tiny_clip, tiny_model
from torch import Tensor

from unidiff.families.muddit import MUDDIT
from unidiff.families.muddit.scheduler import GeneratorDraws, MaskGitSchedule, RowDraws, starting_ratio
from unidiff.families.muddit.tasks import (
    MudditSettings,
    StepReport,
    generate_image,
    hide_codes,
    micro_conditions,
    network_time,
    write_text,
)
from unidiff.families.muddit.text import TextFeatures, question_rows, upstream_wording
from unidiff.families.muddit.weights import PUBLISHED
from unidiff.families.registry import named_vocabulary
from unidiff.models.mmdit import MMDiT
from unidiff.models.mmdit_blocks import NORM_EPS

MASK = 9  # of the scheduler tests


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
    assert MudditSettings() == MudditSettings(48, 9.0, (2.0, 0.0), "cosine", "fraction", 6.0, (0.0, 0.0), None)


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


# The commit rule


def run(schedule: MaskGitSchedule, logits: Tensor, tokens: Tensor, draws, start: Tensor | float = 1.0) -> Tensor:
    """The states after every step, `[N, B, L]`, with the same logits throughout."""
    states = []
    for k in range(schedule.steps):
        tokens = schedule.step(logits, tokens, MASK, k, draws, start).tokens
        states.append(tokens)
    return torch.stack(states)


def some_rows(length: int = 12, classes: int = 9) -> tuple[Tensor, Tensor]:
    """Logits and tokens: row 0 known, row 1 one hidden, row 2 all hidden, row 3 half hidden."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(4, length, classes, generator=g)
    tokens = torch.randint(classes, (4, length), generator=g)
    tokens[1, 3], tokens[2], tokens[3, ::2] = MASK, MASK, MASK
    return logits, tokens


def test_known_tokens_stay_and_a_fully_known_row_keeps_all():
    logits, tokens = some_rows()
    known = tokens != MASK
    states = run(MaskGitSchedule(8, (9.0, 3.0)), logits, tokens, RowDraws(torch.arange(4), 12))
    assert bool((states == tokens)[:, known].all())
    assert not (states[-1] == MASK).any()
    compat = run(
        MaskGitSchedule(8, (9.0, 3.0), compat=True), logits, tokens, GeneratorDraws(torch.Generator().manual_seed(0))
    )
    assert bool((compat[:-1, 0] == MASK).any()), "the reference takes a known token of row 0"


def test_given_tokens_survive_in_half_precision():
    """log(65504) is 11: at fp16 the reference's noise outweighs a known token; ours are out of reach."""
    logits, tokens = some_rows(200)
    tokens = torch.where(torch.arange(200) < 100, tokens, MASK).clone()
    known = tokens != MASK
    for dtype in (torch.float16, torch.bfloat16):
        states = run(MaskGitSchedule(6, (20.0, 20.0)), logits.to(dtype), tokens, RowDraws(torch.arange(4), 200))
        assert bool((states == tokens)[:, known].all())
    draws = GeneratorDraws(torch.Generator().manual_seed(0))
    compat = run(MaskGitSchedule(6, (20.0, 20.0), compat=True), logits.half(), tokens, draws)
    assert bool((compat == MASK)[:, known].any())


@pytest.mark.parametrize("masking", ["cosine", "linear"])
def test_counts_follow_the_schedule_exactly(masking):
    logits, tokens = some_rows(40)
    tokens[:] = MASK
    logits = logits * 1e4  # saturated: all confidences tie at log 1
    schedule = MaskGitSchedule(5, 0.0, masking)
    states = run(schedule, logits, tokens, RowDraws(torch.arange(4), 40))
    expected = schedule.planned(40)[:-1].clamp_min(1)
    assert torch.equal((states == MASK).sum(-1)[:-1], expected[:, None].expand(-1, 4).long())
    compat = run(replace(schedule, compat=True), logits, tokens, RowDraws(torch.arange(4), 40))
    assert not (compat[0] == MASK).any(), "the reference hides nothing where all tie"


def test_starting_ratios_are_per_row():
    logits, tokens = some_rows(40)
    tokens[3, ::4] = MASK
    hidden = tokens == MASK
    ratio = starting_ratio(hidden)
    torch.testing.assert_close(ratio, hidden.float().mean(1))
    assert torch.equal(starting_ratio(hidden, compat=True), ratio.mean().expand(4))
    schedule, seeds = MaskGitSchedule(6), torch.tensor([3, 4, 5, 6])
    together = run(schedule, logits, tokens, RowDraws(seeds, 40), ratio)
    for row in range(4):
        at = slice(row, row + 1)
        alone = run(schedule, logits[at], tokens[at], RowDraws(seeds[at], 40), starting_ratio(hidden[at]))
        assert torch.equal(alone[:, 0], together[:, row])
    planned = (40 * ratio[3] * schedule.ratios()[2]).floor()
    assert (together[2, 3] == MASK).sum() == planned


def test_a_single_position_and_a_single_step():
    logits = torch.zeros(1, 1, 9)
    for steps in (1, 3):
        states = run(MaskGitSchedule(steps), logits, torch.tensor([[MASK]]), RowDraws(torch.tensor([1]), 1))
        assert (states[:-1] == MASK).all() and states[-1] < MASK


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(steps=0), "steps = 0"),
        (dict(steps=2, masking="square"), "masking = 'square'"),
        (dict(steps=2, temperature=(1.0, -1.0)), "temperature"),
        (dict(steps=2, temperature=(1.0, 1.0, 1.0)), "temperature"),
    ],
)
def test_bad_schedules_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MaskGitSchedule(**settings)
    with pytest.raises(ValueError, match="step 2 is not one of 2"):
        MaskGitSchedule(2).step(torch.zeros(1, 1, 2), torch.zeros(1, 1).long(), 2, 2, GeneratorDraws())


def test_time_conventions():
    hidden = torch.tensor([[True, True, True, True], [True, False, False, False]])
    assert [network_time("fraction", k, 4, hidden).item() for k in range(4)] == [0.75, 0.5, 0.25, 0.0]
    assert [network_time("index", k, 4, hidden).item() for k in range(4)] == [3, 2, 1, 0]
    assert network_time("training", 0, 4, hidden).tolist() == [1000, 250]
    assert micro_conditions(64, 32, MudditSettings(crop=(1, 2))).tolist() == [[32, 64, 1, 2, 6]]
    with pytest.raises(ValueError, match="time = 'percent'"):
        MudditSettings(time="percent")
    with pytest.raises(ValueError, match="compat = 'old'"):
        MudditSettings(compat="old")


# Tasks


def some_text(rows: int) -> TextFeatures:
    g = torch.Generator().manual_seed(1)
    return TextFeatures(torch.randn(rows, 5, 16, generator=g), torch.randn(rows, 12, generator=g))


@pytest.mark.parametrize("time", ["fraction", "index", "training"])
def test_images_row_by_row_equal_the_batch_and_keep_known_codes(time):
    model, text, empty = tiny_model(), some_text(3), TextFeatures(torch.zeros(1, 5, 16), torch.zeros(1, 12))
    settings = MudditSettings(steps=5, guidance_scale=3.0, time=time)
    tokens = torch.full((3, 4, 6), 19)
    tokens[1, :2], tokens[2] = 7, 3  # row 2 is fully known
    seeds = torch.tensor([11, 12, 13])
    together = generate_image(model, text, tokens, settings, RowDraws(seeds, 24), negative=empty)
    assert torch.equal(together[1, :2], tokens[1, :2]) and torch.equal(together[2], tokens[2])
    assert together.max() < 16
    for row in range(3):
        at = slice(row, row + 1)
        features = TextFeatures(*(part[at] for part in text))
        alone = generate_image(model, features, tokens[at], settings, RowDraws(seeds[at], 24), negative=empty)
        assert torch.equal(alone[0], together[row])
    with pytest.raises(ValueError, match="needs features of a negative prompt"):
        generate_image(model, text, tokens, settings, RowDraws(seeds, 24))


def test_redrawing_starts_in_the_middle_and_touches_only_the_region():
    settings, seeds = MudditSettings(steps=8), torch.arange(4)
    codes = torch.randint(16, (4, 20, 20), generator=torch.Generator().manual_seed(0))
    tokens, first = hide_codes(codes, 19, settings, 0.5, seeds)
    hidden = tokens == 19
    assert first == 4 and torch.equal(tokens[~hidden], codes[~hidden])
    assert hidden.float().mean().item() == pytest.approx(settings.schedule().ratios()[3].item(), abs=0.04)
    assert torch.equal(hide_codes(codes[2:3], 19, settings, 0.5, seeds[2:3])[0][0], tokens[2])
    region = torch.zeros(4, 20, 20, dtype=torch.bool)
    region[:, :10] = True
    inside, first = hide_codes(codes, 19, settings, 1.0, seeds, region)
    assert first == 0 and torch.equal(inside == 19, region)
    for strength in (0.0, 0.1, 1.5):
        with pytest.raises(ValueError, match="expected a number in"):
            hide_codes(codes, 19, settings, strength, seeds)
    # the loop goes on from there: as many passes as steps are left, counts as if from the beginning
    seen: list[StepReport] = []
    settings, text = replace(settings, guidance_scale=1.0), some_text(4)
    tokens, first = hide_codes(codes, 19, settings, 0.5, seeds)
    generate_image(tiny_model(), text, tokens, settings, RowDraws(seeds, 400), callback=seen.append, first_step=first)
    assert [report.step for report in seen] == [4, 5, 6, 7]
    for report in seen:
        assert torch.equal(report.tokens[~hidden], codes[~hidden])
    start = hidden.flatten(1).float().mean(1, keepdim=True) / settings.schedule().ratios()[3]
    planned = settings.schedule().planned(400, start)[:, 4:7].T.long()
    left = torch.stack([(report.tokens == 19).flatten(1).sum(1) for report in seen])
    assert torch.equal(left[:3], planned) and not left[3].any()


def test_answers_row_by_row_equal_the_batch_and_end_at_the_end_token():
    model, encoder = tiny_model(), tiny_clip()
    codes = torch.randint(16, (3, 4, 6), generator=torch.Generator().manual_seed(2))
    rows = question_rows([[46, 5, 6], [], [46, 1]], encoder.length, encoder.mask_id)
    settings, seeds = MudditSettings(steps=4), torch.tensor([1, 2, 3])
    with torch.no_grad():
        model.text_out.weight[47] += 0.4  # make the end token likely
    seen: list[StepReport] = []
    result = write_text(model, encoder, codes, rows, settings, RowDraws(seeds, 10), callback=seen.append)
    assert [r.step for r in seen] == [0, 1, 2, 3] and not (result.tokens == encoder.mask_id).any()
    assert torch.equal(result.tokens[0, :3], rows[0, :3]) and torch.equal(result.tokens[2, :2], rows[2, :2])
    for row, length in enumerate((3, 0, 2)):
        answer = result.tokens[row, length:].tolist()
        assert result.answers[row] == (answer[: answer.index(47)] if 47 in answer else answer)
        at = slice(row, row + 1)
        alone = write_text(model, encoder, codes[at], rows[at], settings, RowDraws(seeds[at], 10))
        assert torch.equal(alone.tokens[0], result.tokens[row])


def test_text_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="10 tokens and leaves no room for an answer in 10; shorten it to 9"):
        question_rows([[46], list(range(10))], 10, 48)
    with pytest.raises(ValueError, match="no questions given"):
        question_rows([], 10, 48)
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


def test_upstream_wording():
    assert upstream_wording("a cat cat sits such as there. And then") == "a cat sits there."
    assert upstream_wording("no stop at all all") == "no stop at all"
    assert upstream_wording("") == ""


@pytest.mark.parametrize("value", ["x", None, [], math.nan, math.inf, 1e300, 2**70, True, 1j], ids=str)
def test_settings_of_another_kind_are_refused(value):
    for name in ("steps", "guidance_scale", "temperature", "aesthetic_score", "masking", "time", "crop"):
        if (name, value) == ("temperature", True):
            continue
        with pytest.raises(ValueError, match=name):
            MudditSettings(**{name: value})


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_callback_gets_copies(scale):
    model, text, tokens = tiny_model(), some_text(2), torch.full((2, 4, 6), 19)

    def scribble(report: StepReport) -> None:
        for tensor in (report.tokens, report.logits, report.time):
            tensor.zero_()

    plain, scribbled = (
        generate_image(
            model,
            text,
            tokens,
            MudditSettings(steps=4, guidance_scale=scale),
            RowDraws(torch.arange(2), 24),
            negative=some_text(1),
            callback=callback,
        )
        for callback in (None, scribble)
    )
    assert torch.equal(plain, scribbled) and plain.any()


def test_unusable_logits_are_refused_and_guidance_is_named_where_it_makes_them():
    model, text, tokens = tiny_model(), some_text(2), torch.full((2, 4, 6), 19)
    ask = lambda scale: generate_image(  # noqa: E731
        model,
        text,
        tokens,
        MudditSettings(steps=2, guidance_scale=scale),
        RowDraws(torch.arange(2), 24),
        negative=some_text(1),
    )
    head = model.image_head
    model.image_head = lambda features: head(features) * 1e35
    with pytest.raises(ValueError, match=r"guidance_scale = 1e\+06 takes logits beyond what float32 holds"):
        ask(1e6)
    model.image_head = lambda features: head(features) * torch.nan
    with pytest.raises(ValueError, match="NaN or infinite logits; check the weights"):
        ask(1e6)
