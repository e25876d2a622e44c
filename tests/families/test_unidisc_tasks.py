"""UniDisc's tasks on a tiny random model: what is given stays, what is hidden is filled, rows do not see each other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from reference.batches import unidisc_batch

from unidiff.decoding.cache import DualCache, NoCache
from unidiff.families.tasks import run_task
from unidiff.families.unidisc import UNIDISC
from unidiff.families.unidisc.rows import PAD, UniDiscRows, unidisc_sampler
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
    rows = UniDiscRows(
        vocabulary,
        encode,
        side=SIDE,
        text_length=TEXT,
        interleaved=interleaved,
        system="system",
        config=unidisc_sampler(steps=4),
    )
    return network, vocabulary, rows


@pytest.fixture(scope="module", params=[False, True], ids=["static", "interleaved"])
def made(request):
    return make(request.param)


CODES = torch.arange(18).reshape(2, 3, 3) % 12


def run(made, request, seeds=(1, 2), policy=None):
    model, vocabulary, _ = made
    return run_task(model, vocabulary, request, seeds, policy)


def test_text_to_image(made):
    rows = made[2]
    result = run(made, rows.text_to_image(["a red fox", "a fox"]))
    assert result.texts == [[5, 6, 8], [5, 8]]
    assert [code.shape for (code,) in result.codes] == [(3, 3)] * 2
    assert all(int(code.min()) >= 0 and int(code.max()) < 12 for (code,) in result.codes)
    holes = torch.zeros(2, 3, 3, dtype=torch.bool)
    holes[:, 1] = True
    painted = run(made, rows.text_to_image(["a red fox", "a fox"], CODES, holes))
    for (code,), given in zip(painted.codes, CODES, strict=True):
        assert torch.equal(code[[0, 2]], given[[0, 2]])


def test_caption_ends_at_end_of_text(made):
    _, vocabulary, rows = made
    result = run(made, rows.caption(CODES, max_text_tokens=5))
    assert torch.equal(torch.stack([code for (code,) in result.codes]), CODES)
    for words in result.texts:
        assert len(words) <= 6 and not {BOS, EOS, PAD, vocabulary.mask_id} & set(words)
    assert max(max(words, default=0) for words in result.texts) < vocabulary.mask_id


def test_a_finished_static_caption_is_followed_by_padding():
    model, vocabulary, rows = make(False)
    model.output_bias.data[EOS] += 100.0  # the text ends at once
    config = replace(rows.config, text=replace(rows.config.text, block_length=1))  # from left to right
    request = replace(rows, config=config).caption(CODES, max_text_tokens=5)
    result = run_task(model, vocabulary, request, [1, 2])
    assert result.texts == [[], []]
    assert (result.output.batch.ids[:, :TEXT] == torch.tensor([BOS, EOS] + [PAD] * (TEXT - 2))).all()


def test_holes_in_text_and_image_are_filled_together(made):
    vocabulary, rows = made[1], made[2]
    holes = torch.zeros(2, 3, 3, dtype=torch.bool)
    holes[0, 0, 0], holes[1] = True, True
    request = rows.inpaint(["a <m> fox <m2> sat", "<m>red"], CODES, holes)
    assert request.batch.targets.sum(1).tolist() == [3 + 1, 1 + 9]
    result = run(made, request)
    first, second = result.texts
    assert (first[0], first[2], first[5], len(first)) == (5, 8, 9, 6) and (second[1], len(second)) == (6, 2)
    assert not {EOS, BOS, PAD, vocabulary.mask_id} & set(first + second)
    assert torch.equal(result.codes[0][0].flatten()[1:], CODES[0].flatten()[1:])
    as_ids = rows.inpaint([[5, vocabulary.mask_id, 8]], CODES[:1])
    assert as_ids.batch.targets.sum() == 1


def test_pairs_from_nothing(made):
    result = run(made, made[2].generate(2, max_text_tokens=4))
    assert len(result.texts) == 2 and all(code.shape == (3, 3) for (code,) in result.codes)
    assert not torch.equal(result.codes[0][0], result.codes[1][0])


@pytest.mark.parametrize("policy", [NoCache(), DualCache(interval=1)], ids=["none", "dual"])
def test_rows_of_a_batch_equal_the_row_alone(made, policy):
    """Captions of different lengths and different holes; in the interleaved layout with padding."""
    rows = made[2]
    holes = torch.zeros(2, 3, 3, dtype=torch.bool)
    holes[0, 0], holes[1, 1:] = True, True
    prompts = ["a <m> green fox <m2>", "<m>"]
    together = run(made, rows.inpaint(prompts, CODES, holes), policy=policy)
    for row, seed in enumerate((1, 2)):
        one = slice(row, row + 1)
        alone = run(made, rows.inpaint(prompts[one], CODES[one], holes[one]), [seed], policy)
        assert alone.texts[0] == together.texts[row] and torch.equal(alone.codes[0][0], together.codes[row][0])


def test_rows_have_upstreams_layout():
    """Static rows are what `unidisc_batch` makes of the same ids; interleaved ones are the documented sequence."""
    _, vocabulary, rows = make(False)
    request = rows.text_to_image(["a red fox", "a"])
    ids = request.batch.ids
    assert ids[1, :TEXT].tolist() == [BOS, 5, EOS] + [PAD] * 7 and request.batch.attention_mask() is None
    same = unidisc_batch(ids, request.batch.modality)
    assert torch.equal(same.positions, request.batch.positions)
    _, _, rows = make(True)
    batch = rows.text_to_image(["a red fox", "a"]).batch
    image = [vocabulary.mask_id] * 9
    assert batch.ids[0].tolist() == [BOS, 10, EOS, 5, 6, 8, 811, *image, EOS]
    assert batch.valid[1].sum() == batch.shape[1] - 2 and batch.attention_mask() is not None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r: r.text_to_image([" "]), "prompt is empty"),
        (lambda r: r.text_to_image(["a " * 11]), "has 11 tokens, but"),
        (lambda r: r.text_to_image(["a <m>"]), "use inpaint"),
        (lambda r: r.text_to_image(["a"], CODES[:1]), "nothing to paint"),
        (lambda r: r.caption(CODES, 99), "max_text_tokens is 99"),
        (lambda r: r.caption(CODES + 6, 3), r"must lie in \[0, 12\)"),
        (lambda r: r.inpaint(["a"], CODES), "codes have shape"),
        (lambda r: r.inpaint(["a", "a"], CODES, torch.ones(2, 2, 2, dtype=torch.bool)), "holes have shape"),
        (lambda r: r.inpaint(["a"], None, torch.ones(1, 3, 3, dtype=torch.bool)), "holes are given without codes"),
    ],
)
def test_errors_are_one_clear_sentence(made, call, message):
    with pytest.raises(ValueError, match=message):
        call(made[2])


def test_nothing_to_decode_and_missing_parts(made):
    model, vocabulary, rows = made
    with pytest.raises(ValueError, match="nothing to decode"):
        run_task(model, vocabulary, rows.inpaint(["a red fox", "a"], CODES), [1, 2])
    with pytest.raises(ValueError, match="got 1 seeds for 2 rows"):
        run_task(model, vocabulary, rows.caption(CODES, 3), [1])
    with pytest.raises(ValueError, match="have no tokenizer"):
        UniDiscRows(vocabulary, side=3, text_length=TEXT).text_to_image(["a"])
