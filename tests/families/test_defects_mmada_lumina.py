"""MMaDA and Lumina-DiMOO: what their programs do wrong and the default here does right; see `test_defects_index`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from reference.batches import lumina_batch
from tiny_families import family, lumina_ids, lumina_rows, lumina_vocabulary

from unidiff.decoding import Guidance, NoCache, Sampler
from unidiff.decoding.cache import DualCache, MaxLogitCache

CACHE = MaxLogitCache(0.6, 0.2, 4)
SEEDS = torch.tensor([1, 2, 3])


def decode(policy=None, scale: float = 2.0, batch=None, other=None, seeds=SEEDS, **kwargs):
    tiny = family("lumina")
    config = replace(tiny.config, guidance=Guidance(scale))
    sampler = Sampler(tiny.model, tiny.vocabulary, config, policy)
    batch, other = (tiny.batch, tiny.unconditional) if batch is None else (batch, other)
    return sampler(batch, seeds, unconditional=other if scale != 1 else None, **kwargs)


def test_the_cache_works_without_guidance():
    """Upstream crashes with a cache and a guidance scale of 0, which means none."""
    out = decode(CACHE, scale=1.0)
    assert out.stats.partial_passes > 0
    assert not (out.batch.ids == lumina_vocabulary().mask_id).any()


@pytest.mark.parametrize("policy", [NoCache(), CACHE, DualCache()], ids=lambda p: type(p).__name__)
def test_several_prompts_of_any_length_in_a_batch(policy):
    """Upstream: one row per call."""
    vocabulary, g = lumina_vocabulary(), torch.Generator().manual_seed(4)
    prompts = [torch.randint(24, (n,), generator=g) for n in (2, 6, 4)]
    batch, other = lumina_rows(prompts, vocabulary, (3, 2)), lumina_rows(prompts[:1] * 3, vocabulary, (3, 2))
    length = batch.shape[1]
    other = lumina_batch(
        torch.nn.functional.pad(other.ids, (length - other.shape[1], 0)),
        vocabulary,
        (torch.arange(length) >= length - other.shape[1]).expand(3, length),
    )
    together = decode(policy, 2.0, batch, other)
    for row in range(3):
        alone = decode(policy, 2.0, batch.rows([row]), other.rows([row]), SEEDS[row : row + 1])
        assert torch.equal(alone.batch.ids[0], together.batch.ids[row])
        bare = lumina_rows(prompts[row : row + 1], vocabulary, (3, 2))  # without any padding, unguided
        plain = decode(policy, 1.0, batch.rows([row]), None, SEEDS[row : row + 1])
        unpadded = decode(policy, 1.0, bare, None, SEEDS[row : row + 1])
        assert torch.equal(plain.batch.ids[0, -bare.shape[1] :], unpadded.batch.ids[0])


def test_stopping_early_fills_what_is_left():
    """Upstream raises NameError."""
    out = decode(CACHE, callback=lambda step, state: step < 1)
    assert out.steps == 3  # two, and the last one
    assert not (out.batch.ids == lumina_vocabulary().mask_id).any()


def test_inputs_are_not_changed():
    """Upstream writes into its arguments."""
    tiny = family("lumina")
    held = [(b, n) for b in (tiny.batch, tiny.unconditional) for n in vars(b) if getattr(b, n) is not None]
    before = [getattr(b, n).clone() for b, n in held]
    state = {name: value.clone() for name, value in tiny.model.state_dict().items()}
    decode(CACHE)
    after = [getattr(b, n) for b, n in held]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(torch.equal(value, tiny.model.state_dict()[name]) for name, value in state.items())


@pytest.mark.parametrize("grid", [(2, 2), (3, 5), (1, 4)])
def test_every_code_of_a_given_image_is_seen(grid: tuple[int, int]):
    """Upstream's understanding script drops codes: here each is an image token, in order, and reaches the network."""
    tiny, vocabulary = family("lumina"), lumina_vocabulary()
    codes = torch.randint(*vocabulary.image, (1, *grid), generator=torch.Generator().manual_seed(1))
    prompt = torch.tensor([[1, 2, 3]])
    batch = lumina_batch(lumina_ids(prompt, grid, codes), vocabulary)
    image = batch.modality[0] == 1
    assert torch.equal(batch.ids[0, image], codes.flatten()) and bool(batch.given.all())
    with torch.no_grad():
        logits = tiny.model(batch)
        for place in image.nonzero()[:, 0].tolist():
            ids = batch.ids.clone()
            ids[0, place] = vocabulary.image[0] + (ids[0, place] - vocabulary.image[0] + 1) % vocabulary.image_size
            assert not torch.allclose(tiny.model(batch.replace(ids=ids))[0, 0], logits[0, 0])


def test_mmada_guidance_and_padding_go_together():
    """Upstream ignores the mask with guidance: rows with padding equal the rows without, guided."""
    tiny = family("mmada")
    sampler = Sampler(tiny.model, tiny.vocabulary, tiny.config)
    together = sampler(tiny.batch, SEEDS, unconditional=tiny.unconditional)
    padded = int((~tiny.batch.valid).sum())
    assert padded > 0
    for row in range(3):
        keep = tiny.batch.valid[row] | tiny.unconditional.valid[row]
        short, other = (
            b.rows([row]).replace(**{n: x[:, keep] for n, x in vars(b.rows([row])).items() if x is not None})
            for b in (tiny.batch, tiny.unconditional)
        )
        alone = sampler(short, SEEDS[row : row + 1], unconditional=other)
        assert torch.equal(alone.batch.ids[0], together.batch.ids[row, keep])
