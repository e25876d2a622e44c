"""Muddit behind the sampler's interface: same numbers as the network, given tokens kept, any part hidden."""

from __future__ import annotations

import pytest
import torch
from muddit_parts import tiny_clip, tiny_model

from unidiff.decoding import Guidance, ModalityDecoding, Sampler, SamplerConfig
from unidiff.families.muddit.denoiser import MudditConditions, MudditDenoiser
from unidiff.models.denoiser import CachePlan
from unidiff.models.parts import query_index
from unidiff.models.store import StoreOptions
from unidiff.tokens import Modality, Span, TokenBatch, Vocabulary

VOCABULARY = Vocabulary(49 + 20, (0, 48), (49, 49 + 16), 48, 49 + 19, {"bos": 46, "eos": 47})
EMPTY = torch.tensor([46, 47, *[0] * 8])
STEPS = 4


def denoiser(downsample: bool = True, **changes) -> MudditDenoiser:
    values = dict(steps=STEPS, empty_prompt=EMPTY) | changes
    return MudditDenoiser(tiny_model(downsample=downsample), tiny_clip(), VOCABULARY, **values)


def batch(rows: int = 3, image_first: bool = False) -> TokenBatch:
    """Rows whose text is half known and whose first image row is known."""
    g = torch.Generator().manual_seed(3)
    out = []
    for _ in range(rows):
        words = torch.randint(48, (10,), generator=g)
        codes = torch.randint(16, (4, 6), generator=g) + VOCABULARY.image[0]
        known = torch.zeros(4, 6, dtype=torch.bool)
        known[0] = True
        spans = [Span.text(words, torch.arange(10) < 5), Span.image(codes, known)]
        out.append(spans[::-1] if image_first else spans)
    return TokenBatch.from_spans(out).hide_targets(VOCABULARY)


@torch.no_grad()
@pytest.mark.parametrize("image_first", [False, True])
def test_features_and_heads_are_the_networks(image_first):
    wrapped, rows = denoiser(), batch(image_first=image_first)
    time = torch.tensor([1.0, 0.5, 0.25])
    hidden = wrapped.hidden(rows.ids, rows.modality, rows.positions, rows.attention_mask(), time)
    words = rows.ids[rows.modality == Modality.TEXT].view(3, 10)
    codes = rows.ids[rows.modality == Modality.IMAGE].view(3, 4, 6) - VOCABULARY.image[0]
    text, pooled = wrapped.encoder(words)
    micro = wrapped.told.micro(64, 96)
    output = wrapped.model(codes, text, pooled, micro, torch.tensor([0.75, 0.25, 0.0]))
    for modality, logits in ((Modality.TEXT, output.text), (Modality.IMAGE, output.image.flatten(1, 2))):
        ours = wrapped.head(hidden[rows.modality == modality].unflatten(0, (3, -1)), *VOCABULARY.range_of(modality))
        torch.testing.assert_close(ours, logits)
    torch.testing.assert_close(wrapped.head(hidden, 51, 55), wrapped.head(hidden, 49, 65)[..., 2:6])
    with pytest.raises(ValueError, match="span two heads"):
        wrapped.head(hidden)


@torch.no_grad()
@pytest.mark.parametrize(
    ("convention", "passes", "told"),
    [("fraction", None, [0.75, 0.5, 0]), ("index", None, [3, 2, 0]), ("fraction", 2, [0.25, 0.125, 0])],
)
def test_time_conventions_follow_the_samplers_clock(convention, passes, told, monkeypatch):
    """(N - 1 - k) / N or N - 1 - k; of a decode that makes the last passes only, those of the last steps."""
    rows, wrapped, seen = batch(), denoiser(told=MudditConditions(convention), passes=passes), []
    features = wrapped.model.features
    monkeypatch.setattr(wrapped.model, "features", lambda *inputs: seen.append(inputs[-1]) or features(*inputs))
    wrapped.hidden(rows.ids, rows.modality, rows.positions, None, torch.tensor([1.0, 0.75, 0.25]))
    assert seen[0].tolist() == told
    with pytest.raises(ValueError, match="needs the diffusion time"):
        wrapped.hidden(rows.ids, rows.modality, rows.positions)


@torch.no_grad()
def test_the_training_convention_is_a_thousand_times_the_hidden_share(monkeypatch):
    rows, wrapped, seen = batch(), denoiser(told=MudditConditions("training")), []
    features = wrapped.model.features
    monkeypatch.setattr(wrapped.model, "features", lambda *inputs: seen.append(inputs[-1]) or features(*inputs))
    wrapped.hidden(rows.ids, rows.modality, rows.positions)
    assert seen[0].tolist() == [750] * 3


@torch.no_grad()
@pytest.mark.parametrize("image_first", [False, True])
@pytest.mark.parametrize("downsample", [True, False])
def test_features_that_are_asked_for_are_those_of_the_whole_pass(downsample, image_first):
    """Codes alone, in any number, and with words among them."""
    wrapped, rows = denoiser(downsample), batch(image_first=image_first)
    given = rows.ids, rows.modality, rows.positions, None, TIME
    whole = wrapped.hidden(*given)
    for share in (0.05, 0.4, 1.0):
        for among in (rows.modality == Modality.IMAGE, torch.ones_like(rows.given)):
            wanted = query_index(some(rows, share) & among)
            found, real = wrapped.hidden(*given, wanted), wanted < rows.shape[1]
            expected = whole.gather(1, wanted.clamp_max(rows.shape[1] - 1)[..., None].expand(-1, -1, whole.shape[2]))
            torch.testing.assert_close(found[real], expected[real], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_texts_that_are_known_beforehand_are_encoded_once():
    rows, read = batch(), []
    texts = rows.ids[:, :10]
    wrapped, plain = denoiser(prompts=torch.cat((EMPTY[None], texts.flip(0)))), denoiser()
    encoder = wrapped.encoder
    wrapped.encoder = lambda ids: read.append(ids) or encoder(ids)
    for some_rows in ([0, 1, 2], [2, 0]):
        part = rows.rows(some_rows)
        given = part.ids, part.modality, part.positions, None, TIME[some_rows]
        torch.testing.assert_close(wrapped.hidden(*given), plain.hidden(*given), atol=1e-5, rtol=1e-5)
    assert len(read) == 1


@torch.no_grad()
def test_a_text_is_encoded_when_it_changes(monkeypatch):
    rows, wrapped, read = batch(), denoiser(), []
    encoder = wrapped.encoder
    wrapped.encoder = lambda ids: read.append(ids) or encoder(ids)
    ids = rows.ids.clone()
    for change, count in ((20, 1), (21, 1), (3, 2), (22, 2)):
        ids[0, change] = rows.ids[0, change - 1]
        wrapped.hidden(ids, rows.modality, rows.positions, None, torch.ones(3))
        assert len(read) == count


# A forward over some positions

TIME = torch.tensor([1.0, 0.5, 0.25])


def some(rows: TokenBatch, share: float, seed: int = 0) -> torch.Tensor:
    return torch.rand(rows.shape, generator=torch.Generator().manual_seed(seed)) < share


@pytest.mark.parametrize("image_first", [False, True])
@pytest.mark.parametrize("downsample", [True, False])
@pytest.mark.parametrize("options", [StoreOptions(), StoreOptions(outputs=True)], ids=["keys", "outputs"])
@torch.no_grad()
def test_partial_passes_with_unchanged_tokens_change_nothing(options, downsample, image_first):
    """Whatever is recomputed, whole rows or layer by layer, every feature stays that of the whole forward."""
    wrapped, rows = denoiser(downsample), batch(image_first=image_first)
    expected = wrapped.hidden(rows.ids, rows.modality, rows.positions, None, TIME)
    store, everything = wrapped.make_store(rows, options), torch.ones_like(rows.given)
    plans = [CachePlan(), CachePlan(full=False), CachePlan(everything, full=False)]
    for share in (0.0, 0.3, 0.7):
        query, fresh = some(rows, share), torch.tensor([False, True, False])
        plans += [CachePlan(query, full=False), CachePlan(query, full=False, fresh=fresh)]
        if options.outputs:
            plans += [
                CachePlan(query, full=False, full_layers=(1,)),
                CachePlan(query, full=False, full_layers=(0,), full_rows=fresh[None]),
                CachePlan(query, full=False, verify=some(rows, 0.6, 1)),
            ]
    for plan in plans:
        seen: list[torch.Tensor] = []

        def select(layer: int, similarity: torch.Tensor, seen=seen) -> torch.Tensor:
            seen.append(similarity)
            return some(rows, 0.5, layer)

        out = wrapped.partial(rows.ids, plan, store, TIME, select)
        hidden = wrapped.shifted(store.hidden[:, :-1], rows.positions)
        torch.testing.assert_close(hidden, expected, atol=1e-5, rtol=1e-5)
        tokens, most = 10 + (6 if downsample else 24), 2
        assert len(out.work) == most and all(w.out <= tokens for w in out.work)
        assert len(seen) == (0 if plan.verify is None else most)
        for similarity in seen:
            assert bool((similarity.isnan() | ((similarity - 1).abs() < 1e-5)).all())


@pytest.mark.parametrize("options", [StoreOptions(), StoreOptions(outputs=True)], ids=["keys", "outputs"])
@torch.no_grad()
def test_a_row_in_a_partial_batch_equals_the_row_alone_and_is_an_approximation(options):
    rows = batch()

    def passes(of: list[int]) -> torch.Tensor:
        wrapped, part = denoiser(), rows.rows(of)
        store = wrapped.make_store(part, options)
        for step in range(4):
            ids = torch.where(some(rows, 0.4, 10 + step)[of] & part.targets, part.ids - 1 - step, part.ids)
            plan = CachePlan() if step == 0 else CachePlan(some(rows, 0.5, step)[of], full=False)
            wrapped.partial(ids, plan, store, TIME[of] / (step + 1))
        whole = wrapped.hidden(ids, part.modality, part.positions, None, TIME[of] / 4)
        assert not torch.allclose(wrapped.shifted(store.hidden[:, :-1], part.positions), whole, atol=1e-3)
        return store.hidden[:, :-1]

    together = passes([0, 1, 2])
    for row in range(3):
        torch.testing.assert_close(together[row : row + 1], passes([row]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("guided", [False, True])
def test_the_sampler_fills_text_and_image_together(guided):
    """Joint inpainting: known tokens stay, a row does not depend on its neighbours."""
    config = SamplerConfig(
        ModalityDecoding(steps=STEPS, rule="quota", choice_temperature=1.0),
        ModalityDecoding(steps=STEPS, rule="quota", choice_temperature=2.0),
        Guidance(scale=2.0 if guided else 1.0),
        stop_at_eos=False,
    )
    rows, seeds = batch(), torch.tensor([5, 6, 7])
    sampler = Sampler(denoiser(), VOCABULARY, config)
    out = sampler(rows, seeds)
    ids = out.batch.ids
    assert torch.equal(ids[rows.given], rows.ids[rows.given]) and out.nfe == STEPS * (2 if guided else 1)
    assert ids[:, :10].max() < 48 and ids[:, 10:].min() >= 49 and ids[:, 10:].max() < 65
    for row in range(3):
        alone = sampler(rows.rows([row]), seeds[row : row + 1])
        assert torch.equal(alone.batch.ids[0], ids[row])


@torch.no_grad()
def test_a_wholly_hidden_text_stands_for_the_empty_prompt_only_while_drawing():
    rows = batch()
    ids = rows.ids.clone()
    ids[:, :10] = VOCABULARY.mask_id
    ids[2, 10:] = 50  # a whole image: its hidden text is to be written
    empty = ids.clone()
    empty[:2, :10] = EMPTY
    time = torch.ones(3)
    actual, expected = (denoiser().hidden(x, rows.modality, rows.positions, None, time) for x in (ids, empty))
    torch.testing.assert_close(actual, expected)
    literal = denoiser(empty_prompt=None).hidden(ids, rows.modality, rows.positions, None, time)
    torch.testing.assert_close(literal[2], actual[2])
    assert not torch.allclose(literal[0], actual[0])


def test_rows_that_the_network_cannot_take_are_refused():
    wrapped, rows = denoiser(), batch()
    padded = rows.pad_to(40)
    time = torch.ones(3)
    with pytest.raises(ValueError, match="one layout without padding"):
        wrapped.hidden(padded.ids, padded.modality, padded.positions, padded.attention_mask(), time)
    mixed = TokenBatch.cat([batch(1), batch(1, image_first=True)])
    with pytest.raises(ValueError, match="one layout without padding"):
        wrapped.hidden(mixed.ids, mixed.modality, mixed.positions, None, time[:2])
    cut = [x[:, :-1] for x in (rows.ids, rows.modality, rows.positions)]
    with pytest.raises(ValueError, match="23 codes on a grid of 4x6"):
        wrapped.hidden(*cut, None, time)
    with pytest.raises(ValueError, match="0 codes on a grid of 0x0"):
        wrapped.hidden(rows.ids[:, :10], rows.modality[:, :10], rows.positions[:, :10], None, time)
