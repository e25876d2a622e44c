"""The task mixture: proportions, what is given, keyed draws, and weights that make the loss the NELBO."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from train_fixtures import MIXED, VOCABULARY, tiny_config, tiny_table

from unidiff.diffusion.noise import mask_tokens
from unidiff.diffusion.schedules import SCHEDULES
from unidiff.models.trained_on import TASKS
from unidiff.tokens import Modality
from unidiff.train.config import ObjectiveConfig, TaskConfig, TasksConfig
from unidiff.train.data.tasks import TaskBatch, TaskMixer, keep_fill

JOINT, T2I, CAPTION, VQA, TEXT = range(5)


def mixer(tmp_path, *overrides: str, seed: int = 0) -> TaskMixer:
    config = tiny_config(tmp_path, *MIXED, *overrides)
    return TaskMixer(tiny_table(), config.tasks, config.objective, seed, config.data.crop_fill)


def flat(batch: TaskBatch) -> dict[str, torch.Tensor]:
    out = {f.name: getattr(batch, f.name) for f in fields(batch) if f.name not in ("batch", "visible")}
    return out | batch.batch.columns()


def test_tasks_come_in_their_proportions(tmp_path):
    task = mixer(tmp_path).batch(0, 6000).task
    shares = torch.bincount(task, minlength=len(TASKS)) / 6000
    expected = torch.tensor([1, 2, 1, 1, 1]) / 6
    assert (shares - expected).abs().max() < 0.02  # 4 standard errors


@pytest.mark.parametrize("overrides", [(), ("data.crop_fill=0.5",)])
def test_draws_do_not_depend_on_the_batch(tmp_path, overrides):
    source = mixer(tmp_path, *overrides)
    whole = flat(source.batch(0, 96))
    for size in (1, 5, 32):
        parts = [flat(source.batch(first, size)) for first in range(0, 96 - 96 % size, size)]
        for name, value in whole.items():
            joined = torch.cat([p[name] for p in parts])
            assert torch.equal(joined, value[: len(joined)]), name
    other = flat(mixer(tmp_path, *overrides, seed=1).batch(0, 96))
    assert not torch.equal(other["task"], whole["task"]) and not torch.equal(other["rate"], whole["rate"])


def test_given_and_targets_of_every_task(tmp_path):
    made = mixer(tmp_path).batch(0, 600)
    targets, text = made.batch.targets, made.batch.modality == Modality.TEXT
    text_targets, image_targets = (targets & text).sum(1), (targets & ~text).sum(1)
    expected = {JOINT: (5, 9), T2I: (0, 9), CAPTION: (5, 0), VQA: (3, 0), TEXT: (5, 0)}
    for task, (words, codes) in expected.items():
        rows = made.task == task
        assert rows.any()
        assert (text_targets[rows] == words).all() and (image_targets[rows] == codes).all(), TASKS[task]
    assert made.batch.given[:, 0].all()
    assert (made.batch.ids[made.task == VQA][:, 0] == 2).all() and (made.batch.ids[made.task != VQA][:, 0] == 1).all()


def test_dropout_hides_the_whole_condition_and_nothing_else(tmp_path):
    made = mixer(tmp_path).batch(0, 2000)
    ids, task = made.batch.ids, made.task
    hidden = (ids == VOCABULARY.mask_id).sum(1)
    assert (hidden[task == JOINT] == 0).all()
    assert set(hidden[task == T2I].tolist()) == {0, 5}  # all words, never the task token
    assert set(hidden[task == CAPTION].tolist()) == {0, 9}
    assert (hidden[task == VQA] == 0).all() and (hidden[task == TEXT] == 9).all()
    assert abs((hidden[task == T2I] > 0).float().mean() - 0.25) < 0.07
    assert abs((hidden[task == CAPTION] > 0).float().mean() - 0.5) < 0.12
    assert (made.batch.given[ids == VOCABULARY.mask_id]).all()  # given: no loss there


def test_hidden_count_is_the_ceiling_of_rate_times_targets(tmp_path):
    made = mixer(tmp_path).batch(0, 500)
    noisy = mask_tokens(made.batch, made.rate, VOCABULARY, made.noise)
    total = made.batch.targets.sum(1)
    assert torch.equal(noisy.masked.sum(1), (made.rate * total).ceil().long())
    assert (noisy.masked.sum(1) >= 1).all()


@pytest.mark.parametrize("rate", ["uniform", "cosine", "beta"])
def test_elbo_weight_is_unbiased_for_every_rate(rate):
    """E[weight * sum over hidden of f_i] = sum over n of (1/n) E[sum of f_i | n hidden] = sum of f_i * H, H_9 here."""
    settings = TaskConfig(weight=1.0, rate=rate, loss="elbo")
    source = TaskMixer(tiny_table(), TasksConfig(generate=TaskConfig(), text_to_image=settings), ObjectiveConfig(), 3)
    made = source.batch(0, 40_000)
    noisy = mask_tokens(made.batch, made.rate, VOCABULARY, made.noise)
    n = noisy.masked.sum(1)
    value = torch.where(noisy.masked, made.weight, 0).sum(1).double() / n  # weight of one token = 1 / (n P(n))
    mean, error = value.mean(), value.std() / len(value) ** 0.5
    harmonic = sum(1 / k for k in range(1, 10))
    assert abs(mean - harmonic) < max(4 * error, 1e-3)


@pytest.mark.parametrize("rate", ["uniform", "beta", *SCHEDULES])
def test_rate_distribution_matches_its_samples(rate):
    settings = TaskConfig(rate=rate)
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    r = settings.rates.draw_rate(u)
    assert r.min() > 0 and r.max() <= 1
    for x in (0.1, 0.5, 0.6, 0.9, 1.0):
        assert abs((r <= x).double().mean() - settings.rates.chance_below(torch.tensor(x, dtype=torch.float64))) < 1e-4


def test_times_cover_any_run_of_samples_evenly(tmp_path):
    times = mixer(tmp_path).times(torch.arange(1000, 1256)).sort().values
    gaps = (times - (torch.arange(256) + 0.5) / 256).abs().max()
    assert gaps < 0.02


def test_cropped_fill_is_batch_padding_and_keeps_one_eos(tmp_path):
    text = torch.tensor([[1, 9, 0, 0, 0, 0], [1, 9, 9, 9, 9, 9], [1, 0, 0, 0, 0, 0]])
    yes = torch.ones(3, dtype=torch.bool)
    keep = keep_fill(text, 0, yes, torch.tensor([0.0001, 0.5, 0.9999]))
    assert keep.tolist() == [[True] * 3 + [False] * 3, [True] * 6, [True] * 6]
    assert keep_fill(text, 0, ~yes, torch.zeros(3)).all()
    made = mixer(tmp_path, "data.crop_fill=1").batch(0, 64).batch
    assert not made.valid.all() and made.valid[:, 6:].all()
    assert (made.sample_ids == torch.where(made.valid, 0, -1)).all() and not made.targets[~made.valid].any()


def test_modality_weights_and_scale_reach_the_loss(tmp_path):
    made = mixer(tmp_path, "objective.image_weight=0.5", "tasks.text_to_image.scale=3").batch(0, 64)
    rows = made.task == T2I
    assert (made.weight[rows][:, :6] == 3).all() and (made.weight[rows][:, 6:] == 1.5).all()


def test_impossible_mixtures_are_refused(tmp_path):
    tensors = {k: v for k, v in tiny_table().tensors.items() if k not in ("questions", "answer_start")}
    from unidiff.train.data.source import TokenTable

    config = tiny_config(tmp_path, *MIXED)
    with pytest.raises(ValueError, match="no questions"):
        TaskMixer(TokenTable(tensors, VOCABULARY), config.tasks, config.objective, 0)
    with pytest.raises(ValueError, match="rate that reaches 0"):
        mixer(tmp_path, "tasks.text_to_image.rate=high", "tasks.text_to_image.loss=elbo")
