"""UniDisc: what its program does wrong and the default here does right, one test each; see `test_defects_index`."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from reference.batches import unidisc_batch
from tiny_families import UNIDISC_CONFIG, family, lively

import unidiff
from unidiff.decoding import Guidance, ModalityDecoding, Sampler, SamplerConfig
from unidiff.diffusion import get_schedule, joint_elbo, mask_tokens, masked_nll
from unidiff.diffusion.likelihood import mask_count_nelbo, model_scorer
from unidiff.families.unidisc import UNIDISC
from unidiff.models.transformer import MaskedTransformer
from unidiff.tokens import Modality, TokenBatch
from unidiff.tokens.text import TextTokenizer

NOTHING_GIVEN = torch.zeros(3, 17, dtype=torch.bool)


def rows() -> TokenBatch:
    return family("unidisc").batch


def decode(batch: TokenBatch, seeds: list[int], **config):
    tiny = family("unidisc")
    settings = SamplerConfig(**{"stop_at_eos": False, **config})
    return Sampler(tiny.model, tiny.vocabulary, settings)(batch, torch.tensor(seeds))


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_sampling_without_any_condition_gives_text_and_image(scale: float):
    """Upstream returns None."""
    vocabulary = family("unidisc").vocabulary
    batch = rows().replace(given=NOTHING_GIVEN).hide_targets(vocabulary)
    out = decode(batch, [1, 2, 3], guidance=Guidance(scale, hide="other"))
    for modality, (start, stop) in ((0, vocabulary.text), (1, vocabulary.image)):
        ids = out.batch.ids[batch.modality == modality]
        assert ids.min() >= start and ids.max() < stop and len(ids.unique()) > 1
    assert len({tuple(row) for row in out.batch.ids.tolist()}) == 3


@pytest.mark.parametrize("top_p", [0.3, 0.9])
def test_nucleus_sampling_works_row_by_row_in_a_batch(top_p: float):
    """Upstream fails for more than one row."""
    settings = ModalityDecoding(steps=6, top_p=top_p)
    batch = rows().replace(given=NOTHING_GIVEN).hide_targets(family("unidisc").vocabulary)
    together = decode(batch, [4, 5, 6], text=settings, image=settings)
    for row in range(3):
        alone = decode(batch.rows([row]), [4 + row], text=settings, image=settings)
        assert torch.equal(alone.batch.ids[0], together.batch.ids[row])
    every = replace(settings, top_p=None)
    assert not torch.equal(decode(batch, [4, 5, 6], text=every, image=every).batch.ids, together.batch.ids)


def test_pairs_are_scored_both_ways():
    """Upstream's Winoground scoring raises. Two texts, two images: scores of text given image and image given text."""
    tiny = family("unidisc")
    text = torch.randint(0, 20, (2, 8), generator=torch.Generator().manual_seed(1))
    image = torch.randint(*tiny.vocabulary.image, (2, 9), generator=torch.Generator().manual_seed(2))
    pairs = torch.stack([torch.cat((t, i)) for t in text for i in image])  # [4, 17]: rows (t0 i0), (t0 i1), ...
    batch = unidisc_batch(pairs, torch.tensor([[0] * 8 + [1] * 9] * 4))
    score, keys = model_scorer(tiny.model, tiny.vocabulary), torch.tensor([0, 1, 0, 1])
    is_image = batch.modality == Modality.IMAGE
    for hidden in (Modality.TEXT, Modality.IMAGE):
        given = is_image if hidden == Modality.TEXT else ~is_image
        found = mask_count_nelbo(score, batch.replace(given=given), tiny.vocabulary, keys, seed=0, samples=4).total
        assert found.shape == (4,) and bool(found.isfinite().all()) and len(found.unique()) == 4
        again = mask_count_nelbo(
            score, batch.replace(given=given).rows([2]), tiny.vocabulary, keys[2:3], seed=0, samples=4
        )
        torch.testing.assert_close(again.total, found[2:3])  # a pair's score does not depend on the others


def test_the_loss_has_gradients_in_float32():
    """Upstream: an in-place write stops the backward pass of an eager float32 model."""
    model, vocabulary = UNIDISC.load(
        UNIDISC.export(lively(UNIDISC.settings(UNIDISC_CONFIG))), UNIDISC_CONFIG, torch.float32
    )
    batch = rows()
    drawn = torch.randint(12, batch.ids.shape, generator=torch.Generator().manual_seed(1))
    batch = unidisc_batch(drawn + vocabulary.image[0] * batch.modality, batch.modality)
    t, noise = torch.tensor([0.3, 0.6, 0.9]), torch.rand(3, 17, generator=torch.Generator().manual_seed(0))
    noisy = mask_tokens(batch, t, vocabulary, noise)
    model.train()
    hidden = model.hidden(noisy.batch.ids, batch.modality, batch.positions, batch.attention_mask())
    nll = masked_nll(hidden, model.head, noisy.masked, batch, vocabulary, count=17)
    joint_elbo(nll, get_schedule("linear").weight(t), batch).total.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("change", ["missing", "left over", "misshaped"])
def test_a_checkpoint_that_does_not_fit_is_refused(change: str):
    """Upstream loads what fits and says nothing."""
    state = UNIDISC.export(family("unidisc").model)
    name = "blocks.1.mlp.0.weight"
    if change == "missing":
        del state[name]
    elif change == "left over":
        state["blocks.2.mlp.0.weight"] = state[name]
    else:
        state[name] = state[name][:-1]
    with pytest.raises(ValueError, match=r"blocks\.[12]\.mlp\.0\.weight"):
        UNIDISC.load(state, UNIDISC_CONFIG)


@pytest.mark.parametrize("start", [0, 4, 8])
def test_images_may_stand_anywhere(start: int):
    """Upstream gives NaN unless the image is last. The rotary place of a code is its row and column, wherever it stands."""
    tiny = family("unidisc")
    assert isinstance(tiny.model, MaskedTransformer)
    text, image = torch.arange(8) % 20, torch.arange(9) % 12 + tiny.vocabulary.image[0]
    ids = torch.cat((text[:start], image, text[start:]))[None]
    modality = torch.cat((torch.zeros(start), torch.ones(9), torch.zeros(8 - start))).long()[None]
    batch = unidisc_batch(ids, modality)
    with torch.no_grad():
        logits = tiny.model(batch)
    assert bool(logits.isfinite().all())
    last = unidisc_batch(torch.cat((text, image))[None], torch.tensor([[0] * 8 + [1] * 9]))
    where = modality[0] == 1
    assert torch.equal(batch.positions[0, where, 1:], last.positions[0, 8:, 1:])


def test_text_keeps_digits_and_punctuation():
    """Upstream's demo drops them."""
    texts = TextTokenizer.train(["a dog on a red background", "two cats"] * 3, 320)
    sentence = "3.50% of 12 cats -- isn't it? (yes!)"
    assert texts.decode(texts.encode(sentence)) == sentence


def test_the_library_has_no_breakpoints_no_open_servers_and_no_fixed_device():
    """Upstream: stray breakpoints, CUDA assumed, a server on 0.0.0.0 for every origin."""
    found = []
    for path in Path(unidiff.__file__).parent.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        pattern = r"\bbreakpoint\(|\bset_trace\(|import i?pdb|0\.0\.0\.0|\.cuda\(\)|allow_origins"
        found += [f"{path.name}: {hit}" for hit in re.findall(pattern, text)]
    assert not found


def test_known_rows_cost_nothing_and_stay():
    """A row without targets in a batch with others, and a batch of nothing but known rows."""
    batch = rows()
    known = batch.given.clone()
    known[1] = True
    mixed = batch.replace(given=known)
    out = decode(mixed, [1, 2, 3])
    assert torch.equal(out.batch.ids[1], batch.ids[1])
    assert not (out.batch.ids[mixed.targets] == family("unidisc").vocabulary.mask_id).any()
    done = decode(batch.replace(given=torch.ones_like(known)), [1, 2, 3])
    assert done.nfe == 0 and torch.equal(done.batch.ids, batch.ids)


def test_the_unconditional_stream_of_a_drawing_hides_its_words():
    """Upstream trains 'text dropped' with a clean image, which is captioning; here it is the image's own stream."""
    tiny = family("unidisc")
    seen = []

    class Spy:
        def hidden(self, ids, *args):
            seen.append(ids.clone())
            return tiny.model.hidden(ids, *args)

        def head(self, *args):
            return tiny.model.head(*args)

    config = SamplerConfig(image=ModalityDecoding(steps=2), guidance=Guidance(2.0, hide="given"))
    Sampler(Spy(), tiny.vocabulary, config)(rows().rows([0]), torch.tensor([0]))
    conditional, blind = torch.cat(seen)[:2]
    assert not (conditional[:8] == tiny.vocabulary.mask_id).any() and (blind[:8] == tiny.vocabulary.mask_id).all()
    assert torch.equal(conditional[8:], blind[8:])
