"""Packed rows: little padding, nothing seen across samples, the loss and gradients of the batch they were made from."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from train_fixtures import MIXED, tiny_config, tiny_table

from unidiff.diffusion.noise import mask_tokens
from unidiff.diffusion.objective import head_parts, joint_elbo, parts_loss
from unidiff.models.transformer import MaskedTransformer
from unidiff.tokens import Span, TokenBatch, Vocabulary
from unidiff.train.data.tasks import TaskBatch, pack_lengths, pack_tasks
from unidiff.train.trainer import Trainer

VOCABULARY = Vocabulary.unified(20, 12, {"eos": 0})


def samples(seed: int, count: int = 7) -> TokenBatch:
    """Text alone, a pair, and text with two pictures, of many lengths, unpacked and padded."""
    generator = torch.Generator().manual_seed(seed)

    def text():
        length = int(torch.randint(1, 9, (), generator=generator))
        return Span.text(torch.randint(0, 20, (length,), generator=generator), given=torch.arange(length) == 0)

    def picture():
        side = int(torch.randint(1, 4, (), generator=generator))
        return Span.image(21 + torch.randint(0, 12, (side, side), generator=generator))

    makers = (lambda: [text()], lambda: [text(), picture()], lambda: [text(), picture(), text(), picture()])
    return TokenBatch.from_spans([makers[n % 3]() for n in range(count)])


def task_batch(batch: TokenBatch, seed: int) -> TaskBatch:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(batch.shape, generator=generator, dtype=torch.float64)
    rate = torch.rand(batch.shape[0], generator=generator, dtype=torch.float64)
    weight = torch.rand(batch.shape, generator=generator)
    return TaskBatch(batch, torch.arange(len(rate)) % 5, rate, noise, weight)


def network(**settings) -> MaskedTransformer:
    torch.manual_seed(0)
    model = MaskedTransformer(VOCABULARY.size, hidden_size=16, num_layers=2, num_heads=2, **settings).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(50, 120))
@settings(max_examples=60, deadline=None)
def test_every_sample_lands_once_and_rows_are_not_overfull(lengths, capacity):
    rows = pack_lengths(lengths, capacity)
    assert sorted(n for row in rows for n in row) == list(range(len(lengths)))
    assert all(sum(lengths[n] for n in row) <= capacity for row in rows)
    assert sum(sum(lengths[n] for n in row) * 2 <= capacity for row in rows) <= 1  # two half-empty rows would be one


def test_at_most_three_percent_padding_on_a_realistic_mix():
    """Web captions with 16 x 16 pictures, text alone, and interleaved documents with one to four pictures, in 1,536 tokens."""
    generator = torch.Generator().manual_seed(0)

    def draw(low, high, count):
        return torch.randint(low, high, (count,), generator=generator)

    caption = (draw(8, 129, 256) + 256).tolist()
    text = draw(16, 513, 64).tolist()
    documents = (draw(20, 400, 64) + 258 * draw(1, 5, 64)).clamp_max(1536).tolist()
    mix = [*caption, *text, *documents]
    rows = pack_lengths(mix, 1536)
    assert 1 - sum(mix) / (len(rows) * 1536) <= 0.03
    assert 1 - sum(mix) / (len(mix) * max(mix)) > 0.5  # one sample per row wastes more than half


def test_a_sample_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="sample 1 has 9 tokens; rows hold 1 to 8"):
        pack_lengths([3, 9], 8)


@pytest.mark.parametrize("attention", [{}, {"attention": "block_causal", "block_length": 4}])
def test_loss_and_gradients_equal_the_unpacked_batch(attention):
    model, batch = network(**attention), samples(1)
    grads, losses = [], []
    whole = task_batch(batch, 2)
    for micro in (whole, pack_tasks(whole, 40)):
        model.zero_grad()
        noisy = mask_tokens(micro.batch, micro.rate, VOCABULARY, micro.noise)
        x = noisy.batch
        hidden = model.hidden(x.ids, x.modality, x.positions, x.attention_mask())
        parts = head_parts(noisy.masked, micro.batch, VOCABULARY, 16)
        total, nll = parts_loss(hidden, model, parts, micro.weight.double() / micro.batch.targets.sum())
        torch.testing.assert_close(total, joint_elbo(nll, micro.weight, micro.batch).total, rtol=1e-12, atol=0)
        total.backward()
        losses.append(total.detach())
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=0)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_no_sample_feels_another():
    model, packed = network(), pack_tasks(task_batch(samples(3), 0), 40).batch
    seen = {}

    def keep(module, args):
        seen["x"] = args[0]
        args[0].retain_grad()

    model.blocks[0].register_forward_pre_hook(keep)
    hidden = model.hidden(packed.ids, packed.modality, packed.positions, packed.attention_mask())
    shared = 0
    for row in range(len(packed.ids)):
        for sample in packed.sample_ids[row].unique().tolist():
            where = packed.sample_ids[row] == sample
            if sample < 0:
                continue
            seen["x"].grad = None
            hidden[row, where].square().sum().backward(retain_graph=True)
            felt = seen["x"].grad.abs().sum(-1) > 0
            assert bool(felt[row, where].all()) and int(felt.sum()) == int(where.sum())
            shared += int(where.sum() < packed.valid[row].sum())
    assert shared > 3  # rows did hold several samples


def test_packing_twice_keeps_samples_apart():
    batch = samples(5, 9)
    once = pack_tasks(task_batch(batch, 0), 30)
    twice = pack_tasks(once, 64).batch
    assert int(twice.valid.sum()) == int(batch.valid.sum())
    pieces = [
        twice.ids[r][twice.sample_ids[r] == s].tolist()
        for r in range(len(twice.ids))
        for s in twice.sample_ids[r].unique()
        if s >= 0
    ]
    assert sorted(pieces) == sorted(ids[valid].tolist() for ids, valid in zip(batch.ids, batch.valid, strict=True))


@pytest.mark.training
def test_a_packed_run_takes_the_steps_of_an_unpacked_one(tmp_path):
    settings = [*MIXED, "steps=4", "precision=fp32", "data.crop_fill=1.0", "optimiser.eps=1e-3"]
    runs = [
        Trainer(tiny_config(tmp_path / name, *settings, pack), tiny_table())
        for name, pack in (("a", "data.pack=0"), ("b", "data.pack=48"))
    ]
    for _ in range(4):
        one, other = (run.step(1.0) for run in runs)
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
        for name in ("nll", "hidden", "rows", "by_time"):
            torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-4, atol=1e-4)
    for (name, a), b in zip(runs[0].model.named_parameters(), runs[1].model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=name)
    with pytest.raises(ValueError, match="without time_conditioning"):
        timed = "model={hidden_size: 32, num_layers: 1, num_heads: 2, time_conditioning: true}"
        Trainer(tiny_config(tmp_path / "c", "data.pack=48", timed), tiny_table())


def test_flex_attention_is_refused_where_it_has_no_backward(tmp_path):
    config = tiny_config(tmp_path, *MIXED, "data.pack=60", "attention_kernel=flex", "device=cpu")
    with pytest.raises(ValueError, match="attention_kernel = 'flex' on cpu"):
        Trainer(config, tiny_table())
