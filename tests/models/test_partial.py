"""The partial forward: any set of query positions against stored features, compared with the whole forward."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from unidiff.models.block import HeadProjection
from unidiff.models.denoiser import CachePlan
from unidiff.models.parts import query_index
from unidiff.models.store import StoreOptions
from unidiff.models.transformer import MaskedTransformer
from unidiff.tokens import Span, TokenBatch, Vocabulary

VOCABULARY = Vocabulary.unified(11, 7)
VARIANTS = {
    "plain": {},
    "grouped": dict(num_kv_heads=2, qk_norm="head", rope="1d"),
    "sandwich": dict(sandwich_norm=True, qk_norm="width", linear_bias=True, activation="gelu"),
    "timed": dict(time_conditioning=True, time_tokens="image", sandwich_norm=True, attention_gate=False),
    "timed_all": dict(time_conditioning=True, num_kv_heads=1, tie_head=True),
    "causal": dict(attention="block_causal", block_length=3),
    "experts": dict(
        num_experts=6,
        experts_per_token=2,
        expert_size=8,
        shared_expert_size=4,
        dense_layers=(0,),
        router="sigmoid",
        router_bias="selection",
        router_groups=3,
        router_top_groups=2,
        rope="1d",
        rope_share=0.5,
        head_size=8,
    ),
}
OPTIONS = [StoreOptions(), StoreOptions(rotated=False), StoreOptions(outputs=True), StoreOptions(False, True)]


def make_model(**kwargs) -> MaskedTransformer:
    torch.manual_seed(5)
    model = MaskedTransformer(VOCABULARY.size, hidden_size=16, num_layers=3, num_heads=4, **kwargs).eval().double()
    for p in model.parameters():
        p.data.add_(torch.randn_like(p) * 0.3)
    return model


def make_batch() -> TokenBatch:
    """Rows of 11, 8 and 9 tokens, the last with two packed samples."""
    text = Span.text([1, 2, 3], True)
    image = Span.masked_image((2, 2), VOCABULARY)
    return TokenBatch.from_packed(
        [
            [[text, Span.masked_text(4, VOCABULARY), image]],
            [[Span.masked_text(4, VOCABULARY), image]],
            [[text, Span.masked_text(1, VOCABULARY)], [text, Span.masked_text(2, VOCABULARY)]],
        ]
    )


def whole(model: MaskedTransformer, ids: Tensor, batch: TokenBatch, time: Tensor) -> Tensor:
    return model.hidden(ids, batch.modality, batch.positions, batch.attention_mask(), time)


@pytest.fixture(params=VARIANTS.items(), ids=VARIANTS.keys())
def model(request) -> MaskedTransformer:
    return make_model(**request.param[1])


TIME = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@torch.no_grad()
def test_full_passes_equal_the_whole_forward(model, options):
    batch = make_batch()
    store = model.make_store(batch, options)
    expected = whole(model, batch.ids, batch, TIME)
    everything = torch.ones_like(batch.valid)
    for plan in (CachePlan(), CachePlan(full=False), CachePlan(everything, full=False)):
        out = model.partial(batch.ids, plan, store, TIME)
        torch.testing.assert_close(out.hidden[batch.valid], expected[batch.valid])
        torch.testing.assert_close(store.hidden[:, :-1][batch.valid], expected[batch.valid])


def some_positions(batch: TokenBatch, share: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return batch.valid & (torch.rand(batch.shape, generator=generator) < share)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@torch.no_grad()
def test_unchanged_tokens_give_unchanged_features(model, options):
    """Whatever is recomputed, layer by layer or not: with the same tokens everything stays what it was."""
    batch = make_batch()
    expected = whole(model, batch.ids, batch, TIME)
    store = model.make_store(batch, options)
    model.partial(batch.ids, CachePlan(), store, TIME)
    for share in (0.0, 0.3, 0.7):
        query = some_positions(batch, share)
        plans = [CachePlan(query, full=False), CachePlan(query, full=False, width=batch.shape[1])]
        if options.outputs:
            plans += [
                CachePlan(query, full=False, full_layers=(1,)),
                CachePlan(query, full=False, verify=some_positions(batch, 0.6, 1)),
                CachePlan(torch.zeros_like(query), full=False, verify=batch.valid, full_layers=(0,)),
            ]
        for plan in plans:
            compared = []

            def select(layer: int, similarity: Tensor, plan=plan, compared=compared) -> Tensor:
                compared.append(similarity)
                return some_positions(batch, 0.5, layer)

            store.hidden.zero_()
            out = model.partial(batch.ids, plan, store, TIME, select)
            rows = plan.working_rows()  # of the others, hidden states are those of an earlier pass
            computed = query
            if options.outputs:
                computed = batch.valid if rows is None else batch.valid & rows[:, None]
            torch.testing.assert_close(store.hidden[:, :-1][computed], expected[computed])
            assert out.index.shape[1] == len(out.index[0]) and len(out.work) == 3
            for similarity in compared:
                seen = plan.verify & ~plan.query
                assert torch.equal(similarity.isnan(), ~seen)
                torch.testing.assert_close(similarity[seen], torch.ones_like(similarity[seen]))
            assert len(compared) == (0 if plan.verify is None else 3 - len(plan.full_layers))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@torch.no_grad()
def test_a_row_in_a_padded_batch_equals_the_row_alone(model, options):
    """Other tokens in every pass, other numbers of queries per row."""
    batch = make_batch().pad_to(14)
    lengths = batch.valid.sum(1).tolist()

    def passes(rows: list[int], length: int) -> Tensor:
        part = batch.rows(rows)
        part = part.each(lambda x: x[:, :length])
        store = model.make_store(part, options)
        for step in range(4):
            changed = some_positions(batch, 0.4, 10 + step)[rows, :length]
            ids = torch.where(changed, step, part.ids)
            query = some_positions(batch, 0.5, step)[rows, :length]
            verify = some_positions(batch, 0.8, 20 + step)[rows, :length] if options.outputs and step % 2 else None
            plan = CachePlan() if step == 0 else CachePlan(query, full=False, verify=verify)
            model.partial(ids, plan, store, TIME[rows], lambda _, s: s < s.nanmean(1, keepdim=True) - 1e-6)
        return store.hidden[:, :-1]

    together = passes([0, 1, 2], 14)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(together[row : row + 1, :length], passes([row], length))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@torch.no_grad()
def test_the_last_layer_computes_what_is_wanted_and_keeps_all_keys_and_values(model, options):
    """The same passes in two stores, one of which is asked for the features of some positions only."""
    batch = make_batch()
    wanted = torch.tensor([[1, 3, 5], [0, 2, 11], [8, 11, 11]])  # 11 is padding
    asked = torch.zeros(3, 12, dtype=torch.bool).scatter(1, wanted, True)[:, :-1]
    alone = model.hidden(batch.ids, batch.modality, batch.positions, batch.attention_mask(), TIME, wanted)
    assert alone.shape == (3, 3, 16)
    real, everything = wanted < 11, whole(model, batch.ids, batch, TIME)
    torch.testing.assert_close(
        alone[real], everything.gather(1, wanted[..., None].clamp_max(10).expand(-1, -1, 16))[real]
    )
    stores = [model.make_store(batch, options) for _ in range(2)]
    plans = [
        CachePlan(),
        *(CachePlan(some_positions(batch, 0.6, n), full=False) for n in range(3)),
        CachePlan(full=False),
    ]
    if options.outputs:
        plans += [
            CachePlan(
                some_positions(batch, 0.3, 7), full=False, verify=some_positions(batch, 0.6, 8), full_layers=(2,)
            ),
            CachePlan(some_positions(batch, 0.7, 7), full=False, verify=some_positions(batch, 0.6, 8)),
        ]
    computed = torch.zeros_like(batch.valid)
    for step, plan in enumerate(plans):
        ids = torch.where(some_positions(batch, 0.4, 10 + step), step, batch.ids)
        choose = lambda layer, similarity: some_positions(batch, 0.5, 20 + layer)  # noqa: E731
        every, some = (
            model.partial(ids, replace(plan, wanted=w), store, TIME, choose)
            for w, store in zip((None, wanted), stores, strict=True)
        )
        assert [w.k for w in some.work] == [w.k for w in every.work]
        assert [w.out for w in some.work] == [*(w.out for w in every.work[:-1]), min(3, every.work[-1].out)]
        computed = computed | (batch.valid if plan.query is None else plan.query)
        for name in ("key", "value"):
            first, second = (getattr(store, name)[..., :-1, :].transpose(2, 3)[:, computed] for store in stores)
            torch.testing.assert_close(first, second)
        first, second = (store.hidden[:, :-1][asked & batch.valid] for store in stores)
        torch.testing.assert_close(first, second)


@pytest.mark.parametrize("rotated", [True, False])
@torch.no_grad()
def test_stale_keys_are_those_of_earlier_passes(model, rotated, monkeypatch):
    """Against whole forwards whose attention is handed the keys and values that a position had when it was computed."""
    batch = make_batch()
    store = model.make_store(batch, StoreOptions(rotated=rotated))
    kept: dict[int, tuple[Tensor, Tensor]] = {}
    query, project = batch.valid, HeadProjection.forward

    def stale(self, x: Tensor, rotary, asked=None, turns=None):
        q, k, v = project(self, x, rotary, asked=asked, turns=turns)
        if id(self) in kept:
            k, v = (torch.where(query[..., None, None], *pair) for pair in zip((k, v), kept[id(self)], strict=True))
        kept[id(self)] = k, v
        return q, k, v

    for step in range(5):
        ids = torch.where(some_positions(batch, 0.3, step), step, batch.ids)
        query = batch.valid if step == 0 else some_positions(batch, 0.4, 30 + step)
        with monkeypatch.context() as patch:
            patch.setattr(HeadProjection, "forward", stale)
            expected = whole(model, ids, batch, TIME)
        model.partial(ids, CachePlan() if step == 0 else CachePlan(query, full=False), store, TIME)
        torch.testing.assert_close(store.hidden[:, :-1][query], expected[query])


@torch.no_grad()
def test_stored_features_are_really_used():
    """Two hand-checked facts of a stale key: it hides a change, and it goes when its position is recomputed."""
    model, batch = make_model(), make_batch().rows([0])
    store = model.make_store(batch)
    before = model.partial(batch.ids, CachePlan(), store).hidden
    ids = batch.ids.clone()
    ids[0, 0] = 7
    last = torch.zeros_like(batch.valid)
    last[0, -1] = True
    stale = model.partial(ids, CachePlan(last, full=False), store).hidden
    torch.testing.assert_close(stale[0, 0], before[0, -1])
    first = last.clone()
    first[0, 0] = True
    fresh = model.partial(ids, CachePlan(first, full=False), store).hidden
    assert not torch.allclose(fresh[0, -1], before[0, -1])
    assert age(store)[0].tolist() == [0, *[2] * 9, 0]


@torch.no_grad()
def test_block_causal_prefix_is_exact_from_the_first_block_on():
    """Blocks appended one by one, never a full pass: the same as one whole forward."""
    model, batch = make_model(**VARIANTS["causal"]), make_batch()
    expected = whole(model, batch.ids, batch, TIME)
    store = model.make_store(batch)
    block = batch.positions[..., 0] // 3
    for b in range(int(block.max()) + 1):
        model.partial(batch.ids, CachePlan(batch.valid & (block == b), full=False), store)
    torch.testing.assert_close(store.hidden[:, :-1][batch.valid], expected[batch.valid])


@torch.no_grad()
def test_positions_never_computed_are_seen_by_nobody():
    model, batch = make_model(), make_batch().rows([0])
    store = model.make_store(batch)
    front = torch.arange(11)[None] < 5
    out = model.partial(batch.ids, CachePlan(front, full=False), store)
    short = batch.each(lambda x: x[:, :5])
    torch.testing.assert_close(out.hidden, whole(model, short.ids, short, TIME[:1]))


@torch.no_grad()
def age(store) -> torch.Tensor:
    """int64 `[B, L]`: passes since each position was computed."""
    return store.passes[:, None] - store.computed[:, :-1]


def test_narrow_stores_share_memory_and_nothing_else():
    model, batch = make_model(), make_batch()
    pair = model.make_store(TokenBatch.cat([batch, batch]))
    other = torch.where(batch.given, VOCABULARY.mask_id, batch.ids)
    a, b = pair.narrow(0, 3), pair.narrow(3, 6)
    model.partial(batch.ids, CachePlan(), a)
    assert not bool(pair.complete.all()) and not bool(b.computed.any())
    model.partial(other, CachePlan(), b)
    assert pair.passes.tolist() == [1] * 6
    query = some_positions(batch, 0.5)
    both = model.partial(torch.cat((other, other)), CachePlan(query.repeat(2, 1), full=False), pair).hidden
    apart = model.make_store(batch)
    model.partial(batch.ids, CachePlan(), apart)
    alone = model.partial(other, CachePlan(query, full=False), apart)
    real = alone.index < 11
    torch.testing.assert_close(both[:3][real], alone.hidden[real])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@torch.no_grad()
def test_rows_that_refresh_go_apart(model, options):
    """One row recomputes everything, one some positions, one nothing: each as if it were alone."""
    batch = make_batch()
    ids = torch.where(batch.given, 6, batch.ids)
    query = some_positions(batch, 0.5)
    query[2] = False
    stores = [model.make_store(batch, options) for _ in range(2)]
    for store in stores:
        model.partial(batch.ids, CachePlan(), store, TIME)
    fresh = torch.tensor([True, False, False])
    out = model.partial(ids, CachePlan(query, full=False, fresh=fresh), stores[0], TIME)
    model.partial(ids, CachePlan(torch.where(fresh[:, None], batch.valid, query), full=False), stores[1], TIME)
    assert out.fresh == 1 and out.work[0].out <= 11
    valid = batch.valid & (query | fresh[:, None])
    torch.testing.assert_close(stores[0].hidden[:, :-1][valid], stores[1].hidden[:, :-1][valid])
    kept, other = (store.key[..., :-1, :].transpose(2, 3) for store in stores)  # [layers, B, L, KV, d]
    torch.testing.assert_close(kept[:, valid], other[:, valid])
    torch.testing.assert_close(age(stores[0])[valid], age(stores[1])[valid])


def test_index_is_ascending_and_padded_with_the_spare_position():
    query = torch.tensor([[False, True, True], [True, False, False]])
    assert query_index(query).tolist() == [[1, 2], [0, 3]]
    assert query_index(query, 3).tolist() == [[1, 2, 3], [0, 3, 3]]


def test_bad_requests_say_what_to_do():
    model, batch = make_model(), make_batch()
    store = model.make_store(batch)
    with pytest.raises(ValueError, match="expected \\(3, 11\\)"):
        model.partial(batch.ids[:, :4], CachePlan(), store)
    with pytest.raises(ValueError, match="outputs=True"):
        model.partial(batch.ids, CachePlan(batch.valid, full=False, verify=batch.valid), store)
    with pytest.raises(ValueError, match="needs `select`"):
        plan = CachePlan(batch.valid, full=False, verify=batch.valid)
        model.partial(batch.ids, plan, model.make_store(batch, StoreOptions(outputs=True)))
    with pytest.raises(ValueError, match="full=False"):
        CachePlan(verify=batch.valid)
    with pytest.raises(ValueError, match="goes with query"):
        CachePlan(full=False, fresh=batch.valid[:, 0])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@torch.no_grad()
def test_bfloat16_weights(options):
    model, batch = make_model(num_kv_heads=2, qk_norm="head").bfloat16(), make_batch()
    store = model.make_store(batch, options)
    expected = model.partial(batch.ids, CachePlan(), store).hidden
    assert expected.dtype == store.key.dtype == torch.bfloat16
    whole_pass = whole(model, batch.ids, batch, TIME)
    torch.testing.assert_close(expected[batch.valid], whole_pass[batch.valid], atol=0.05, rtol=0.02)
    query = some_positions(batch, 0.5)
    model.partial(batch.ids, CachePlan(query, full=False), store)
    kept = store.hidden[:, :-1]
    torch.testing.assert_close(kept[batch.valid], expected[batch.valid], atol=0.05, rtol=0.02)


def test_a_store_says_how_large_it_is():
    model, batch = make_model(num_kv_heads=2), make_batch()  # 3 rows of 11 positions and a spare one, float64
    assert model.make_store(batch).nbytes == 3 * 12 * 8 * (3 * 2 * 8 + 16)
    assert model.make_store(batch, StoreOptions(outputs=True)).nbytes == 3 * 12 * 8 * (3 * (2 * 8 + 2 * 16) + 16)


@torch.no_grad()
def test_queries_and_keys_rotate_together_as_they_do_apart():
    torch.manual_seed(3)
    batch = make_batch()
    model = make_model(num_kv_heads=2, rope="1d")
    store, attention = model.make_store(batch), model.blocks[0].attention
    x = torch.randn(*batch.shape, 16, dtype=torch.float64)
    rotary = store.rotary(store.everywhere)
    with torch.enable_grad():
        apart = attention(x, rotary)
    for a, b in zip(attention(x, rotary), apart, strict=True):
        assert torch.equal(a, b)
