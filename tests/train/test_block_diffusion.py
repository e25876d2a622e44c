"""Block diffusion: one doubled pass is every block after its clean past; a converted model has an exact cache."""

from __future__ import annotations

import pytest
import torch
from train_fixtures import VOCABULARY, tiny_config, tiny_table

from unidiff.decoding import ModalityDecoding, Sampler, SamplerConfig
from unidiff.decoding.cache.block_causal import BlockCausalCache
from unidiff.diffusion.noise import mask_tokens
from unidiff.diffusion.objective import masked_nll
from unidiff.models.transformer import MaskedTransformer
from unidiff.tokens import Span, TokenBatch
from unidiff.train.config import ObjectiveConfig, TaskConfig, TasksConfig
from unidiff.train.data.tasks import TaskMixer
from unidiff.train.step import VALIDATION_SEED, TokenNLL, validate
from unidiff.train.trainer import Trainer

pytestmark = pytest.mark.training
BLOCK = 4
CAUSAL = f"model={{hidden_size: 32, num_layers: 2, num_heads: 2, qk_norm: head, attention: block_causal, block_length: {BLOCK}}}"


def mixer(tmp_path, *overrides):
    config = tiny_config(tmp_path, "tasks.generate={weight: 1, loss: elbo}", "data.crop_fill=0.5", *overrides)
    return TaskMixer(tiny_table(), config.tasks, config.objective, config.seed, config.data.crop_fill, BLOCK)


def test_blocks_have_rates_of_their_own_and_exact_counts(tmp_path):
    micro = mixer(tmp_path, "tasks.text_to_image={weight: 1, loss: elbo}").of(torch.arange(64))
    hidden = micro.batch.targets & (micro.noise < micro.rate)
    block = micro.batch.positions[..., 0] // BLOCK
    for number in range(int(block.max()) + 1):
        here = block == number
        total = (micro.batch.targets & here).sum(1)
        rate = micro.rate.masked_fill(~here, 0).amax(1)
        rows = total > 0
        count = (hidden & here).sum(1)
        assert torch.equal(count[rows], (rate * total).ceil().long()[rows])
        weights = micro.weight[hidden & here]
        expected = (total / count.clamp_min(1))[:, None].expand_as(here)[hidden & here]
        torch.testing.assert_close(weights, expected.float())
        assert len(rate[rows].unique()) == int(rows.sum())
    again = mixer(tmp_path, "tasks.text_to_image={weight: 1, loss: elbo}").of(torch.arange(16, 19))
    assert torch.equal(again.rate, micro.rate[16:19]) and torch.equal(again.noise, micro.noise[16:19])
    assert bool(micro.weight.isfinite().all())


def test_one_doubled_pass_equals_every_block_after_its_clean_past(tmp_path):
    torch.manual_seed(0)
    model = MaskedTransformer(VOCABULARY.size, 32, 2, 2, attention="block_causal", block_length=BLOCK).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    mixed = mixer(tmp_path)
    micro, double = mixed.of(torch.arange(6)), mixed.batch(0, 6)
    noisy = mask_tokens(double.batch, double.rate, VOCABULARY, double.noise)
    length = micro.batch.shape[1]
    assert not noisy.masked[:, :length].any() and torch.equal(noisy.batch.ids[:, :length], micro.batch.ids)
    with torch.no_grad():
        x = noisy.batch
        hidden = model.hidden(x.ids, x.modality, x.positions, double.visible.dense())
        got = masked_nll(hidden, model, noisy.masked, double.batch, VOCABULARY, 16)[:, length:]
        masked, block = noisy.masked[:, length:], micro.batch.positions[..., 0] // BLOCK
        single = mask_tokens(micro.batch, micro.rate, VOCABULARY, micro.noise).batch
        for number in range(int(block.max()) + 1):
            here = block == number
            ids = torch.where(block < number, micro.batch.ids, single.ids)  # later blocks cannot be seen anyway
            hidden = model.hidden(ids, x.modality[:, :length], x.positions[:, :length], micro.batch.attention_mask())
            expected = masked_nll(hidden, model, masked & here, micro.batch, VOCABULARY, 16)
            torch.testing.assert_close(got.masked_fill(~here, 0), expected, rtol=1e-9, atol=1e-9)
    assert masked.any() and float(got.abs().sum()) > 0


def test_a_converted_model_learns_and_decodes_with_an_exact_cache(tmp_path):
    full = Trainer(
        tiny_config(tmp_path / "full", "steps=60", "batch_size=32", "optimiser.lr=1e-2", "ema.decay=0.5"), tiny_table()
    )
    full.train()
    overrides = [CAUSAL, f"checkpoint.init_from={tmp_path / 'full' / 'model'}", "steps=80", "batch_size=32"]
    overrides += ["optimiser.lr=5e-3", "ema.decay=0.5", "checkpoint.export_dtype=float32", "logging.every=10"]
    trainer = Trainer(tiny_config(tmp_path / "causal", *overrides), tiny_table())
    losses = [trainer.step(1.0) for _ in range(60)]
    nats = [float(r.nll.sum() / r.hidden.sum()) for r in losses]
    assert sum(nats[-8:]) < 0.8 * sum(nats[:8])
    assert float(losses[0].rows.sum()) == 32
    model = trainer.averaged()
    words = torch.tensor([1, 9, 0, 0, 0, 0])
    batch = TokenBatch.from_spans([[Span.text(words, True), Span.masked_image((3, 3), VOCABULARY)] for _ in range(4)])
    settings = SamplerConfig(image=ModalityDecoding(steps=5))
    plain, cached = (
        Sampler(model, VOCABULARY, settings, policy)(batch, torch.arange(4)) for policy in (None, BlockCausalCache())
    )
    assert torch.equal(plain.batch.ids, cached.batch.ids)
    torch.testing.assert_close(plain.confidence, cached.confidence, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_validation_scores_blocks_given_clean_ones(tmp_path):
    """By hand: the sum over blocks of N / n times the nats of n hidden tokens, each block with its past as it is."""
    torch.manual_seed(0)
    model = MaskedTransformer(VOCABULARY.size, 32, 2, 2, attention="block_causal", block_length=BLOCK).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    source, rows = tiny_table(), 8
    report = validate(TokenNLL(model, VOCABULARY, 16), source, rows, 1, 3)
    assert not [name for name in report if name.startswith(("caption", "answer"))]
    even, off = TaskConfig(weight=1.0, loss="elbo"), TaskConfig()
    mix = TaskMixer(
        source, TasksConfig(even, even, off, off, even), ObjectiveConfig(), VALIDATION_SEED, block_length=BLOCK
    )
    for number, name in enumerate(("joint", "text_to_image")):
        micro = mix.of(torch.arange(rows), number)
        noisy, total = mask_tokens(micro.batch, micro.rate, VOCABULARY, micro.noise), 0.0
        block = micro.batch.positions[..., 0] // BLOCK
        for place in range(int(block.max()) + 1):
            ids = torch.where(block < place, micro.batch.ids, noisy.batch.ids)
            hidden = model.hidden(ids, micro.batch.modality, micro.batch.positions, micro.batch.attention_mask())
            here = noisy.masked & (block == place)
            nats = masked_nll(hidden, model, here, micro.batch, VOCABULARY, 16)
            total += float((nats * micro.weight).sum())
        assert report[f"{name}_nelbo"] == pytest.approx(total / rows, rel=1e-6)


def test_what_block_diffusion_cannot_do_is_refused(tmp_path):
    with pytest.raises(ValueError, match="sees no later block"):
        mixer(tmp_path, "tasks.caption.weight=1")
    with pytest.raises(ValueError, match="do not go together"):
        Trainer(tiny_config(tmp_path, CAUSAL, "data.pack=48"), tiny_table())
