"""MMaDA without golden data: published values, the upstream defects that the default mends, prompts, batches."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from golden import golden_folders
from reference.mmada_prompts import MMaDAPrompts, mmada_batch
from reference.mmada_sampling import generate_codes, generate_text, masked_after, step_temperature
from reference.mmada_training import answer_loss, image_loss, training_mask

from unidiff.decoding.cache import AdaptiveCache, DualCache, MaxLogitCache, PrefixCache, VicinityCache
from unidiff.decoding.draw import RowNoise
from unidiff.decoding.sampler import Sampler, SamplerOutput
from unidiff.families.family import named_vocabulary
from unidiff.families.llada.rows import llada_sampler
from unidiff.families.mmada import MMADA, RELEASED, SPECIALS, ImageSettings, image_config, mmada_vocabulary
from unidiff.models.transformer import MaskedTransformer
from unidiff.tokens import Modality

TINY_SPECIALS = {name: 20 + i for i, name in enumerate(SPECIALS)}
VOCABULARY = mmada_vocabulary(size=60, offset=41, codebook_size=16, mask_id=40, specials=TINY_SPECIALS)
FIELDS = {"d_model": 32, "n_heads": 4, "n_kv_heads": 4, "n_layers": 2, "mlp_hidden_size": 48, "new_vocab_size": 60}
PROMPTS = MMaDAPrompts(VOCABULARY, text_length=6)


@pytest.fixture(scope="module")
def model() -> MaskedTransformer:
    torch.manual_seed(0)
    model = MaskedTransformer(**MMADA.settings(FIELDS))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def image_rows(codes: torch.Tensor, texts=((1, 2), (3, 4, 5))):
    """Conditional and unconditional rows; code -1 is hidden."""
    ids = torch.where(codes < 0, VOCABULARY.image_mask, codes + VOCABULARY.image[0])
    batches = []
    for rows in (PROMPTS.text_to_image(texts, ids), PROMPTS.text_to_image([[]] * len(ids), ids)):
        batches.append(mmada_batch(rows.ids, VOCABULARY, rows.visible))
    return batches


def decode_image(model, codes, settings, seeds=(5, 6), texts=((1, 2), (3, 4, 5)), **more) -> SamplerOutput:
    batch, unconditional = image_rows(codes, texts)
    sampler = Sampler(model, VOCABULARY, image_config(settings), **more)
    seeds = torch.tensor(seeds[: len(codes)])
    return sampler(batch, seeds, record=True, unconditional=unconditional if settings.guidance else None)


def codes_of(ids: torch.Tensor) -> torch.Tensor:
    """`[..., L]` to the codes of the four image tokens; hidden ones are 16 or more."""
    return (ids[..., 8:12] - VOCABULARY.image[0]) % 60


def upstream_image(model, codes, settings, noise: float = 0.0) -> tuple[torch.Tensor, list]:
    """The reference's loop, without noise or with some on the ranking."""
    batch, unconditional = image_rows(codes)
    steps: list = []
    out = generate_codes(
        model,
        VOCABULARY,
        batch,
        unconditional if settings.guidance else None,
        settings,
        draw=lambda step, p: p.argmax(-1),
        choice=lambda step: noise * torch.randn(codes.shape, generator=torch.Generator().manual_seed(step)),
        observe=steps.append,
    )
    return out, steps


def question(texts, image=None):
    image = torch.arange(4).repeat(len(texts), 1) + VOCABULARY.image[0] if image is None else image
    return PROMPTS.question(image, texts, answer_length=4)


# ------------------------------------------------------------------------------------------------- published values


@pytest.mark.golden
@pytest.mark.parametrize("folder", golden_folders("mmada"), ids=lambda f: f.name)
def test_declared_vocabulary_is_the_published_one(folder):
    published = json.loads((folder / "config.json").read_text())["released_reference"]
    vocabulary = mmada_vocabulary()
    assert vocabulary.size == published["new_vocab_size"] == RELEASED["new_vocab_size"]
    assert vocabulary.image == (published["image_token_offset"], published["image_token_offset"] + 8192)
    assert vocabulary.text == (0, published["text_tokenizer_len"])
    assert vocabulary.mask_id == vocabulary.image_mask == published["mask"]
    plain = {name.strip("<|>[]").removesuffix("_id").lower(): value for name, value in published.items()}
    own = set(SPECIALS) - {"interleave", "t2it"}  # of MMaDA-Parallel
    assert {name: plain[name] for name in own} == {name: SPECIALS[name] for name in own}


def test_network_of_the_released_checkpoints():
    kwargs = MMADA.settings({})
    assert (kwargs["hidden_size"], kwargs["num_layers"], kwargs["num_heads"]) == (4096, 32, 32)
    assert (kwargs["ffn_size"], kwargs["vocab_size"]) == (12288, 134656)
    assert (kwargs["norm_eps"], kwargs["rope_theta"], kwargs["rope"]) == (1e-5, 500000.0, "1d")
    assert not kwargs["tie_head"] and not kwargs["linear_bias"] and not kwargs["modality_embedding"]
    layout = named_vocabulary("mmada")
    assert (layout.size, layout.text, layout.image) == (134656, (0, 126349), (126349, 134541))
    ids = {"bos": 126080, "eos": 126081, "soi": 126084, "eoi": 126085, "t2i": 126088, "mmu": 126089, "eot": 126348}
    assert ids.items() <= layout.specials.items() and layout.mask_id == 126336


def test_names_and_refusals(model):
    state = MMADA.export(model)
    assert state["model.transformer.ff_out.weight"].shape == (60, 32)
    again, _ = MMADA.load({f"module.{k}": v for k, v in state.items()}, FIELDS, vocabulary=VOCABULARY)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))
    with pytest.raises(ValueError, match="134656 ids"):
        MMADA.load(state, FIELDS)
    with pytest.raises(ValueError, match="missing"):
        MMADA.load({k: v for k, v in state.items() if "wte" not in k}, FIELDS, vocabulary=VOCABULARY)
    with pytest.raises(ValueError, match="gives shape"):
        MMADA.load(state, {**FIELDS, "mlp_hidden_size": 64}, vocabulary=VOCABULARY)
    with pytest.raises(ValueError, match="alibi"):
        MMADA.load(state, {**FIELDS, "alibi": True}, vocabulary=VOCABULARY)


# ---------------------------------------------------------------------------------------------- defects, one by one


def test_temperature_falls_once_and_not_again_and_again(model, monkeypatch):
    settings, seen = ImageSettings(steps=5, temperature=1.0, schedule="linear", guidance=0.0), []
    upstream = [step_temperature(settings, s) for s in range(5)]
    assert upstream == pytest.approx([0.8, 0.48, 0.192, 0.0384, 0.0])
    one = torch.tensor(-1.0, dtype=torch.float64).exp().neg().exp()  # a Gumbel number of 1
    drawn = RowNoise.__call__
    monkeypatch.setattr(RowNoise, "__call__", lambda *about: one.expand(drawn(*about).shape))

    def rule(confidence, score, is_real, count, index):
        seen.append(float((score - confidence.log())[is_real].mean()))
        return torch.zeros_like(is_real)  # one token per pass

    decode_image(model, torch.full((1, 4), -1), settings, texts=((1, 2),), rules={Modality.IMAGE: rule})
    assert seen == pytest.approx([1.0, 0.75, 0.5, 0.25])  # as many passes as tokens


def test_inpainting_spreads_the_unknown_positions_over_all_steps(model):
    unknown = torch.tensor([[True] * 4 + [False] * 12])
    kept = []
    for step in range(4):
        kept.append(int(masked_after(unknown, ImageSettings(steps=4, schedule="linear"), step)))
        unknown = (torch.arange(16) < kept[-1])[None]
    assert kept == [3, 2, 1, 1]
    start = torch.tensor([[True] * 4 + [False] * 12])  # reveals one, then all others at once
    assert int(masked_after(start, ImageSettings(steps=2, schedule="linear"), 0)) == 3
    codes = torch.tensor([[-1, -1, 7, 9]])
    for steps, expected in ((2, [2, 1, 0]), (1, [2, 0])):
        settings = ImageSettings(steps=steps, schedule="linear", guidance=0.0)
        out = decode_image(model, codes, settings, texts=((1, 2),))
        assert [int((codes_of(ids) >= 16).sum()) for ids in out.trajectory] == expected


def test_known_rows_and_known_codes_stay(model):
    codes = torch.tensor([[1, 2, 3, 4], [-1, 7, -1, 9]])
    settings = ImageSettings(steps=3, guidance=1.5)
    out = decode_image(model, codes, settings)
    final = codes_of(out.batch.ids)
    assert torch.equal(final[0], codes[0]) and torch.equal(final[1, [1, 3]], codes[1, [1, 3]])
    assert not any((codes_of(ids)[0] >= 16).any() for ids in out.trajectory)
    _, steps = upstream_image(model, codes, settings, 1.0)
    assert all(step.masked[0].sum() == 1 for step in steps)  # upstream forgets a known code in every step
    untouched = decode_image(model, codes[:1], settings, texts=((1, 2),))
    assert torch.equal(codes_of(untouched.batch.ids), codes[:1]) and untouched.nfe == 0


def test_text_guidance_sees_no_padding(model):
    """Upstream drops the attention mask as soon as guidance is on."""
    long, short = question([[1, 2, 3]]), question([[4, 5]])
    both = question([[1, 2, 3], [4, 5]])
    config = llada_sampler(VOCABULARY, steps=4, block_length=2, guidance=1.5)
    sampler = Sampler(model, VOCABULARY, config)
    alone = [sampler(row, torch.tensor([7])) for row in (long, short)]
    together = sampler(both, torch.tensor([7, 7]))
    for row, single in enumerate(alone):
        width = single.batch.shape[1]
        assert torch.equal(together.batch.ids[row, :width], single.batch.ids[0])
        torch.testing.assert_close(together.confidence[row, :width], single.confidence[0], atol=1e-5, rtol=0)
    seen = generate_text(model, VOCABULARY, both, torch.tensor([7, 7]), config, any_id=False)
    torch.testing.assert_close(seen.confidence[0], together.confidence[0], atol=1e-5, rtol=0)
    assert (seen.confidence[1] - together.confidence[1]).abs().max() > 1e-4


def test_answers_hold_text_ids_only(model):
    batch = question([[1, 2], [3, 4]])
    loud = MaskedTransformer(**MMADA.settings(FIELDS))
    loud.load_state_dict(model.state_dict())
    config = llada_sampler(VOCABULARY, steps=4, block_length=4)
    with torch.no_grad():  # an image code and a prompt mark that win everywhere
        direction = loud.hidden(batch.ids, batch.modality, batch.positions).mean((0, 1))
        loud.output_weight[VOCABULARY.image[0] + 3] = 50 * direction
        loud.output_weight[VOCABULARY.specials["soi"]] = 60 * direction
    wild = generate_text(loud, VOCABULARY, batch, torch.tensor([1, 2]), config)
    tame = Sampler(loud, VOCABULARY, config)(batch, torch.tensor([1, 2]))
    answers = batch.targets
    assert bool((wild.batch.ids[answers] == VOCABULARY.specials["soi"]).any())
    marks = set(TINY_SPECIALS.values()) - {TINY_SPECIALS["eos"], TINY_SPECIALS["eot"]}
    answer = set(tame.batch.ids[answers].tolist())
    assert max(answer) < VOCABULARY.mask_id and not answer & marks


def test_training_mask_hides_padding_unless_the_bias_is_asked_for(model):
    rows = PROMPTS.text_to_image([[1]], torch.full((1, 4), VOCABULARY.image_mask))
    batch = mmada_batch(rows.ids, VOCABULARY, rows.visible)
    other = mmada_batch(rows.ids.masked_fill(~rows.visible, 3), VOCABULARY, rows.visible)

    def logits(rows, mask):
        return model.head(model.hidden(rows.ids, rows.modality, rows.positions, mask))[0, rows.valid[0]]

    with torch.no_grad():
        mask = training_mask(rows.visible)
        own = batch.attention_mask().expand_as(mask)  # of padding, which sees nothing in `mask`, it says nothing
        assert torch.equal(mask[rows.visible[:, None]], own[rows.visible[:, None]])
        assert torch.equal(logits(batch, mask), logits(other, mask))
        bias = training_mask(rows.visible, float_bias=True)
        assert (logits(batch, bias) - logits(other, bias)).abs().max() > 1e-3


def test_image_loss_leaves_the_marks_out():
    logits = torch.randn(1, 7, 9, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[1, 2, 3, 4, -100, 5, 6]])  # text text soi code known code eoi
    nll = torch.nn.functional.cross_entropy(logits[0], labels[0], reduction="none")
    torch.testing.assert_close(image_loss(logits, labels, first=2), nll[[3, 5]].mean())
    torch.testing.assert_close(image_loss(logits, labels, first=2, markers=True), nll[[2, 3, 5, 6]].mean())


def test_a_masked_prompt_position_is_an_error():
    labels = torch.tensor([[-100, 1, 2]])
    masked = torch.tensor([[True, True, False]])
    with pytest.raises(ValueError, match="no label"):
        answer_loss(torch.zeros(1, 3, 4), labels, masked, torch.ones(1))


def test_questions_and_texts_too_long_are_refused_not_cut():
    with pytest.raises(ValueError, match="question has 7 tokens; at most 6 fit"):
        question([[1] * 7])
    image = torch.full((1, 4), VOCABULARY.image_mask)
    with pytest.raises(ValueError, match="needs 8 tokens and 6 fit"):
        PROMPTS.text_to_image([[1] * 6], image)
    cut = MMaDAPrompts(VOCABULARY, text_length=6, overflow="cut").text_to_image([[1] * 6], image)
    s = VOCABULARY.specials
    assert cut.ids[0, :8].tolist() == [s["t2i"], s["bos"], 1, 1, 1, 1, s["eos"], s["soi"]]
    with pytest.raises(ValueError, match="expected 'error' or 'cut'"):
        MMaDAPrompts(VOCABULARY, 6, overflow="trim")
    with pytest.raises(ValueError, match="2 texts for 1 images"):
        PROMPTS.text_to_image([[1], [2]], image)
    with pytest.raises(ValueError, match="no square grid"):
        question([[1]], torch.full((1, 5), VOCABULARY.image[0]))


# ------------------------------------------------------------------------------------------------------- behaviour


def test_layout_of_a_batch():
    batch, unconditional = image_rows(torch.tensor([[-1, 2, -1, 3], [-1, -1, -1, -1]]))
    image = batch.modality == Modality.IMAGE
    assert image.sum(1).tolist() == [4, 4] and torch.equal(image, unconditional.modality == Modality.IMAGE)
    assert batch.positions[0, image[0]].tolist() == [[8, 0, 0], [9, 0, 1], [10, 1, 0], [11, 1, 1]]
    assert batch.targets.sum(1).tolist() == [2, 4] and batch.targets.sum() == (batch.targets & image).sum()
    assert batch.valid.sum(1).tolist() == [11, 12] and unconditional.valid.sum(1).tolist() == [9, 9]
    asked = question([[1, 2, 3], [4]])
    assert asked.targets.sum(1).tolist() == [4, 4] and asked.valid.sum(1).tolist() == [14, 12]


def test_a_row_alone_equals_the_row_in_a_batch(model):
    codes = torch.full((2, 4), -1)
    settings = ImageSettings(steps=3, guidance=2.0, temperature=0.7)
    both = codes_of(decode_image(model, codes, settings).batch.ids)
    texts = ((1, 2), (3, 4, 5))
    for row in range(2):
        alone = decode_image(model, codes[:1], settings, seeds=(5 + row,), texts=texts[row : row + 1])
        assert torch.equal(codes_of(alone.batch.ids)[0], both[row])
    again = codes_of(decode_image(model, codes, settings, seeds=(7, 8)).batch.ids)
    assert not torch.equal(again, both)
    assert both.min() >= 0 and both.max() < 16


@pytest.mark.parametrize("guidance", [0.0, 2.0])
def test_the_sampler_decodes_the_same_image(model, guidance):
    """Of new images and without noise, the reference's loop and the sampler are the same decoder.

    By a linear schedule: of the cosine the reference rounds 4 cos(pi / 3) to 1.
    """
    settings = ImageSettings(steps=3, guidance=guidance, temperature=0.0, schedule="linear")
    codes = torch.full((2, 4), -1)
    expected, _ = upstream_image(model, codes, settings)
    batch, unconditional = image_rows(codes)
    config = image_config(settings)
    config = replace(config, image=replace(config.image, temperature=0.0))
    out = Sampler(model, VOCABULARY, config)(
        batch, torch.tensor([5, 6]), unconditional=unconditional if guidance else None
    )
    assert torch.equal(codes_of(out.batch.ids), expected)


CACHES = [
    PrefixCache(interval=1),
    DualCache(interval=1),
    VicinityCache(interval=1),
    AdaptiveCache(prompt_interval=1, response_interval=1),
    MaxLogitCache(interval=1),
]


@pytest.mark.parametrize("policy", CACHES, ids=lambda p: type(p).__name__)
def test_every_cache_that_refreshes_in_every_pass_changes_nothing(model, policy):
    batch, unconditional = image_rows(torch.tensor([[-1, 2, -1, -1], [-1, -1, -1, -1]]))
    asked, seeds = question([[1, 2, 3], [4]]), torch.tensor([5, 6])
    images = image_config(ImageSettings(steps=3, guidance=2.0))
    answers = llada_sampler(VOCABULARY, steps=4, block_length=2, guidance=1.5)
    for request, config, other in ((batch, images, unconditional), (asked, answers, None)):
        plain = Sampler(model, VOCABULARY, config)(request, seeds, unconditional=other)
        cached = Sampler(model, VOCABULARY, config, policy)(request, seeds, unconditional=other)
        assert torch.equal(plain.batch.ids, cached.batch.ids)
        torch.testing.assert_close(plain.confidence, cached.confidence, atol=1e-5, rtol=0)


def test_bad_requests_are_refused():
    with pytest.raises(ValueError, match="image steps is 0; expected a whole number from 1"):
        ImageSettings(steps=0)


@pytest.mark.parametrize("value", ["x", None, [], float("nan"), float("inf"), 1e300, -1, 2**70, True, 1j], ids=str)
def test_image_settings_of_another_kind_are_refused(value):
    for name in ("steps", "guidance", "temperature", "schedule"):
        with pytest.raises(ValueError, match=f"{name}"):
            ImageSettings(**{name: value})
