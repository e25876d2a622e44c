"""UniDisc's tasks on a tiny random model: what is given stays, what is hidden is filled, rows do not see each other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from decode_layout import decode, decode_request, request_of
from reference.batches import unidisc_batch

from unidiff.decoding.cache import DualCache, NoCache
from unidiff.families.unidisc import UNIDISC
from unidiff.families.unidisc.rows import PAD, UniDiscLayout, unidisc_sampler
from unidiff.models.transformer import MaskedTransformer

SIDE, TEXT, BOS, EOS = 3, 10, 1, 2
WORDS = {"a": 5, "red": 6, "green": 7, "fox": 8, "sat": 9, "system": 10}


def encode(text: str) -> list[int]:
    return [WORDS[word] for word in text.split()]


def make(interleaved: bool):
    model = dict(
        text_vocab_size=1001, image_vocab_size=12, hidden_size=16, n_blocks=2, n_heads=2, norm_type="rms", qk_norm=True
    )
    layout = dict(rope_2d=True, modality_embed=True, sandwich_normalization=True)
    config = {"model": {**model, **layout}, "data": {"require_sample_ids": interleaved}}
    torch.manual_seed(3)
    network = MaskedTransformer(**UNIDISC.settings(config)).eval()
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.3)
    vocabulary = UNIDISC.vocabulary(config)
    rows = UniDiscLayout(vocabulary, encode, SIDE, TEXT, interleaved, "system", unidisc_sampler(steps=4))
    return network, rows


@pytest.fixture(scope="module", params=[False, True], ids=["static", "interleaved"])
def made(request):
    return make(request.param)


CODES = torch.arange(18).reshape(2, 3, 3) % 12


def test_text_to_image(made):
    result = decode(*made, "text_to_image", texts=["a red fox", "a fox"])
    assert result.texts == [[5, 6, 8], [5, 8]]
    assert result.codes.shape == (2, 3, 3) and 0 <= int(result.codes.min()) <= int(result.codes.max()) < 12
    holes = torch.zeros(2, 3, 3, dtype=torch.bool)
    holes[:, 1] = True
    painted = decode(*made, "inpaint", texts=["a red fox", "a fox"], codes=CODES, holes=holes)
    assert torch.equal(painted.codes[:, [0, 2]], CODES[:, [0, 2]])


def test_caption_ends_at_end_of_text(made):
    mask = made[1].vocabulary.mask_id
    result = decode(*made, "caption", codes=CODES, longest=5)
    assert torch.equal(result.codes, CODES)
    for words in result.texts:
        assert len(words) <= 5 and not {BOS, EOS, PAD, mask} & set(words)
    assert max(max(words, default=0) for words in result.texts) < mask


def test_a_finished_static_caption_is_followed_by_padding():
    model, rows = make(False)
    model.output_bias.data[EOS] += 100.0  # the text ends at once
    config = replace(rows.config, text=replace(rows.config.text, block_length=1))  # from left to right
    result = decode(model, replace(rows, config=config), "caption", codes=CODES, longest=5)
    assert result.texts == [[], []]
    assert (result.output.batch.ids[:, :TEXT] == torch.tensor([BOS, EOS] + [PAD] * (TEXT - 2))).all()


def test_holes_in_text_and_image_are_filled_together(made):
    mask = made[1].vocabulary.mask_id
    holes = torch.zeros(2, 3, 3, dtype=torch.bool)
    holes[0, 0, 0], holes[1] = True, True
    given = dict(texts=["a <mask> fox <mask:2> sat", "<mask>red"], codes=CODES, holes=holes)
    result = decode(*made, "inpaint", **given)
    assert result.request.batch.targets.sum(1).tolist() == [3 + 1, 1 + 9]
    first, second = result.texts
    assert (first[0], first[2], first[5], len(first)) == (5, 8, 9, 6) and (second[1], len(second)) == (6, 2)
    assert not {EOS, BOS, PAD, mask} & set(first + second)
    assert torch.equal(result.codes[0].flatten()[1:], CODES[0].flatten()[1:])


def test_a_callers_settings_lose_nothing_that_a_task_needs(made):
    """Ids that only prompts have, end-of-text in holes of a fixed size, and what follows an end."""
    own = replace(made[1].config, text=replace(made[1].config.text, forbid=(7,)), stop_at_eos=False, fill=9)
    for task, given in (("inpaint", {"texts": ["a <mask>"], "codes": CODES[:1]}), ("caption", {"codes": CODES[:1]})):
        request = request_of(made[1], task, **given)
        kept = request.needs.keep_in(own)
        assert {7, BOS, PAD} <= set(kept.text.forbid) and (EOS in kept.text.forbid) == (task == "inpaint")
        assert kept.stop_at_eos == (task == "caption") and kept.fill == (9 if made[1].interleaved else PAD)


def test_pairs_from_nothing(made):
    result = decode(*made, "generate", count=2, longest=4)
    assert len(result.texts) == 2 and result.codes.shape == (2, 3, 3)
    assert not torch.equal(result.codes[0], result.codes[1])


def test_a_negative_prompt_has_rows_of_its_own(made):
    plain = decode(*made, "text_to_image", texts=["a fox", "red"])
    hidden = decode(*made, "text_to_image", texts=["a fox", "red"], negative=["", ""])
    away = decode(*made, "text_to_image", texts=["a fox", "red"], negative=["a green fox", ""])
    assert torch.equal(plain.codes[1], away.codes[1]) and torch.equal(plain.codes, hidden.codes)
    assert not torch.equal(away.output.confidence, plain.output.confidence)


@pytest.mark.parametrize("policy", [NoCache(), DualCache(interval=1)], ids=["none", "dual"])
def test_rows_of_a_batch_equal_the_row_alone(made, policy):
    """Captions of different lengths and different holes; in the interleaved layout with padding."""
    holes = torch.zeros(2, 3, 3, dtype=torch.bool)
    holes[0, 0], holes[1, 1:] = True, True
    texts = ["a <mask> green fox <mask:2>", "<mask>"]
    together = decode(*made, "inpaint", policy=policy, texts=texts, codes=CODES, holes=holes)
    for row, seed in enumerate((1, 2)):
        one = slice(row, row + 1)
        alone = decode(*made, "inpaint", [seed], policy, texts=texts[one], codes=CODES[one], holes=holes[one])
        assert alone.texts[0] == together.texts[row] and torch.equal(alone.codes[0], together.codes[row])


def test_rows_have_upstreams_layout():
    """Static rows are what `unidisc_batch` makes of the same ids; interleaved ones are the documented sequence."""
    _, rows = make(False)
    request = request_of(rows, "text_to_image", texts=["a red fox", "a"])
    ids = request.batch.ids
    assert ids[1, :TEXT].tolist() == [BOS, 5, EOS] + [PAD] * 7 and request.batch.attention_mask() is None
    same = unidisc_batch(ids, request.batch.modality)
    assert torch.equal(same.positions, request.batch.positions)
    _, rows = make(True)
    batch = request_of(rows, "text_to_image", texts=["a red fox", "a"]).batch
    image = [rows.vocabulary.mask_id] * 9
    assert batch.ids[0].tolist() == [BOS, 10, EOS, 5, 6, 8, 811, *image, EOS]
    assert batch.valid[1].sum() == batch.shape[1] - 2 and batch.attention_mask() is not None


@pytest.mark.parametrize(
    ("task", "given", "message"),
    [
        ("text_to_image", dict(texts=["a " * 11]), "has 11 tokens, but"),
        ("caption", dict(codes=CODES + 6), r"must lie in \[0, 12\)"),
        ("inpaint", dict(texts=["a"], codes=CODES[:1, :2]), "codes have shape"),
        (
            "inpaint",
            dict(texts=["a", "a"], codes=CODES, holes=torch.ones(2, 2, 2, dtype=torch.bool)),
            "holes have shape",
        ),
        ("answer", dict(texts=["a"]), "unidisc cannot do 'answer'; it does text_to_image, caption, inpaint, generate"),
    ],
)
def test_errors_are_one_clear_sentence(made, task, given, message):
    with pytest.raises(ValueError, match=message):
        request_of(made[1], task, **given)


def test_settings_of_the_layout_reach_the_sampler(made):
    request = request_of(made[1], "text_to_image", texts=["a"])
    few = replace(request.config, image=replace(request.config.image, steps=2))
    assert decode_request(*made, request, [1], config=few).output.steps == 2
