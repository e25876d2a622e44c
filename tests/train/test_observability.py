"""What a run says about itself: losses by mask rate, speed, and the guard that skips a step and names its samples."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from train_fixtures import MIXED, tiny_config, tiny_table

from unidiff.models.transformer import MaskedTransformer
from unidiff.train.cost.plan import TrainingRow, model_size, row_flops
from unidiff.train.meters import SpeedMeter, TaskMeter
from unidiff.train.step import TIME_BUCKETS, StepReport, train_step
from unidiff.train.trainer import Trainer, TrainingAborted

pytestmark = pytest.mark.training


def lines(folder, kind):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == kind]


def test_loss_by_mask_rate_adds_up_to_all_hidden_tokens(tmp_path):
    trainer = Trainer(tiny_config(tmp_path, *MIXED, "batch_size=32", "precision=fp32"), tiny_table())
    report = trainer.step(1.0)
    assert report.by_time.shape == (TIME_BUCKETS, 2)
    torch.testing.assert_close(report.by_time.sum(0), torch.stack([report.nll.sum(), report.hidden.sum()]))
    batch = trainer.mixer.batch(0, 32)
    expected = torch.zeros(TIME_BUCKETS)
    hidden = (batch.batch.targets & (batch.noise < batch.rate[:, None])).sum(1)
    for rate, count in zip(batch.rate.tolist(), hidden.tolist(), strict=True):
        expected[min(int(rate * TIME_BUCKETS), TIME_BUCKETS - 1)] += count
    assert torch.equal(report.by_time[:, 1], expected)
    meter = TaskMeter()
    meter.add(report)
    values = meter.take()
    keys = [k for k in values if k.startswith("nll_at/")]
    assert keys == [f"nll_at/{n / 5:.1f}-{(n + 1) / 5:.1f}" for n in range(5) if expected[n] > 0]


EXPERTS = "model={hidden_size: 32, num_layers: 3, num_heads: 2, num_experts: 4, experts_per_token: 2, expert_size: 16, dense_layers: [0]}"


def test_experts_are_watched_and_kept_equally_busy(tmp_path):
    """The loss has the balance loss in it, shared out over micro-batches as their targets are; counts are those of real tokens."""
    settings = ["precision=fp32", "steps=1", "accumulate=2", "batch_size=4", EXPERTS]
    found = {}
    for weight in (0.0, 0.5):
        config = tiny_config(tmp_path / str(weight), *MIXED, *settings, f"objective.balance_weight={weight}")
        trainer = Trainer(config, tiny_table())
        batches = [trainer.mixer.batch(first, 4) for first in (0, 4)]
        report = train_step(trainer.state, batches, 1.0)
        found[weight] = report
        assert report.loads.shape == (2 * 4,)
        assert float(report.loads.sum()) == 2 * 2 * sum(int(b.batch.valid.sum()) for b in batches)
        assert 0.9 < float(report.balance) < 4
    assert found[0.5].loss == pytest.approx(found[0.0].loss + 0.5 * float(found[0.0].balance), rel=1e-5)
    assert found[0.5].grad_norm != found[0.0].grad_norm
    meter = TaskMeter(4)
    meter.add(report)
    meter.add(report)
    values, loads = meter.take(), report.loads.view(2, 4)
    assert values["router/balance"] == pytest.approx(float(report.balance))
    assert values["router/busiest"] == pytest.approx(float((4 * loads / loads.sum(1, keepdim=True)).max()))
    assert values["router/idle"] == float((loads == 0).double().mean())


@pytest.mark.parametrize("more", [["activation_checkpointing=full"], ["lora.rank=2"], ["optimiser.name=muon"]])
def test_a_model_with_experts_trains_and_is_exported(tmp_path, more):
    if "lora.rank=2" in more:
        pytest.importorskip("peft")
    config = tiny_config(tmp_path, *MIXED, "steps=3", "checkpoint.export_dtype=float32", EXPERTS, *more)
    trainer = Trainer(config, tiny_table())
    trainer.train()
    assert all(line["router/busiest"] >= 1 for line in lines(tmp_path, "train"))
    loaded = MaskedTransformer.from_pretrained(tmp_path / "model")
    assert loaded.blocks[1].feed_forward.experts.up.shape == (4, 32, 32)


def test_speed_counts_useful_work():
    config = tiny_config("unused", "logging.peak_tflops=2", "batch_size=4", "accumulate=2")
    source = tiny_table()  # 6 text and 9 image tokens per row
    meter = SpeedMeter(config, source, processes=2)
    hidden = torch.zeros(5, 2)
    hidden[0] = torch.tensor([10.0, 20.0])
    sums = torch.stack([torch.zeros(5, 2), hidden, torch.zeros(5, 2)]).flatten()
    loss, norm, finite, spike = ([value] for value in (1.0, 1.0, 1.0, 0.0))
    report = StepReport(torch.tensor([*loss, *sums, *[0.0] * TIME_BUCKETS * 2, *norm, *finite, *spike]).double())
    meter.add(report, seconds=1.5, waited=0.2)
    meter.add(report, seconds=0.5, waited=0.0)
    values = meter.take()
    assert values["tokens_per_second"] == 2 * 8 * 15 / 2
    assert values["data_wait"] == pytest.approx(0.1)
    size = model_size(config.model, source.vocabulary.size)
    body = row_flops(size, TrainingRow(6, 9, 32, 16, 0.0)).total
    work = 2 * 8 * body + 2 * 6 * 32 * (10 * 32 + 20 * 16)  # 6 D per hidden token and column of its slice
    assert values["tflops"] == pytest.approx(work / 2 / 1e12)
    assert values["mfu"] == pytest.approx(work / 2 / (2 * 2e12))
    assert meter.take() == {}


def test_a_loss_spike_is_skipped_and_its_samples_are_recorded(tmp_path):
    trainer = Trainer(tiny_config(tmp_path, *MIXED, "steps=8", "logging.every=1", "spike_factor=4"), tiny_table())
    honest = trainer.mixer.batch
    held = {}

    def batch(first, count):
        made = honest(first, count)
        if first != 5 * 8:
            return made
        held.update({n: p.detach().clone() for n, p in trainer.model.named_parameters()})
        held["level"] = trainer.state.level
        return replace(made, weight=made.weight * 100)

    trainer.mixer.batch = batch
    taken = {}
    step = trainer.step

    def watched(factor):
        report = step(factor)
        if trainer.state.step == 6:
            taken.update({n: p.detach().clone() for n, p in trainer.model.named_parameters()})
            assert report.spike and report.finite and not report.taken
            assert report.loss > 4 * held["level"] == 4 * trainer.state.level
        return report

    trainer.step = watched
    trainer.train()
    assert all(torch.equal(taken[n], held[n]) for n in taken) and taken
    assert trainer.state.skipped == 1 and trainer.state.bad_steps == 0
    skipped = lines(tmp_path, "skipped")
    assert [(s["step"], s["first_sample"], s["sample_count"], s["spike"]) for s in skipped] == [(6, 40, 8, 1)]
    resumed = Trainer(tiny_config(tmp_path, *MIXED, "steps=8", "spike_factor=4"), tiny_table())
    assert resumed.state.level == trainer.state.level > 0


def test_spikes_without_an_end_abort_the_run(tmp_path):
    settings = ["steps=20", "spike_factor=1.5", "max_bad_steps=3", "logging.every=1"]
    trainer = Trainer(tiny_config(tmp_path, *MIXED, *settings), tiny_table())
    trainer.step(1.0)
    trainer.state.level.fill_(1e-3)
    with pytest.raises(TrainingAborted, match="3 steps in a row"):
        trainer.train()
    assert [s["step"] for s in lines(tmp_path, "skipped")] == [2, 3, 4]


@pytest.mark.parametrize(
    ("override", "message"),
    [("spike_factor=0.5", "spike_factor = 0.5"), ("logging.peak_tflops=-1", "peak_tflops is -1.0")],
)
def test_bad_guard_settings_are_refused(tmp_path, override, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(tmp_path, override)
