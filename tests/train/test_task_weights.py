"""Loss weights that are not the ELBO's: UniDisc's soft cap, and answers that count the same whatever their length."""

from __future__ import annotations

import pytest
import torch
from reference.loss_weights import time_weight
from train_fixtures import tiny_config, tiny_table

from unidiff.diffusion.schedules import get_schedule
from unidiff.train.data.tasks import TaskMixer


def mixer(tmp_path, *overrides):
    config = tiny_config(tmp_path, *overrides)
    return TaskMixer(tiny_table(), config.tasks, config.objective, config.seed, config.data.crop_fill)


def test_softmin_is_the_capped_weight_at_the_share_that_is_hidden(tmp_path):
    batch = mixer(tmp_path, "tasks.generate={weight: 1, loss: softmin}").batch(0, 32)
    total = batch.batch.targets.sum(1)
    share = (batch.rate * total).ceil() / total
    expected = time_weight("softmin_snr", get_schedule("linear"), share, gamma=5.0)
    torch.testing.assert_close(batch.weight, expected[:, None].float().expand_as(batch.weight))
    assert float(expected.max()) < 5 < float((1 / share).max())


@pytest.mark.parametrize("per_sample", ["false", "true"])
def test_per_sample_makes_every_row_weigh_the_same(tmp_path, per_sample):
    overrides = [f"tasks.text={{weight: 1, loss: elbo, per_sample: {per_sample}}}", "tasks.generate.weight=0"]
    batch = mixer(tmp_path, *overrides, "data.crop_fill=1.0").batch(0, 64)
    total = batch.batch.targets.sum(1)
    hidden = (batch.noise < batch.rate[:, None]) & batch.batch.targets
    sums = (batch.weight * hidden).sum(1)  # what a row of unit losses adds
    expected = torch.full_like(sums, 6.0) if per_sample == "true" else total.float()
    torch.testing.assert_close(sums, expected)
    assert len(total.unique()) > 1
