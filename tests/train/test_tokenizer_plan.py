"""What an image tokenizer's training costs, counted."""

from __future__ import annotations

import pytest
import torch

from unidiff.config import load_config
from unidiff.train.image_tokenizer.config import ImageTokenizerConfig, new_network
from unidiff.train.image_tokenizer.plan import plan_tokenizer

SMALL = ["model.encoder_width=16", "model.encoder_depth=1", "model.decoder_widths=[16,8]", "model.decoder_depths=[1,1]"]


def test_a_plan_counts_what_the_network_does():
    plans = {}
    for side in (16, 32):
        config = load_config(ImageTokenizerConfig, "own_tokenizer", [*SMALL, f"data.image_size={side}"])
        plans[side] = plan_tokenizer(config)
    small, large = plans[16], plans[32]
    assert small.parameters == sum(p.numel() for p in new_network(config.model).parameters())
    assert (small.codes, large.codes) == (4, 16)
    assert large.flops == pytest.approx(4 * small.flops, rel=0.05)
    assert 3 < large.saved / small.saved < 4.5
    before = torch.random.get_rng_state()
    plan_tokenizer(config)
    assert torch.equal(before, torch.random.get_rng_state())
    with pytest.raises(ValueError, match="factor 8 must divide"):
        plan_tokenizer(load_config(ImageTokenizerConfig, "own_tokenizer", [*SMALL, "data.image_size=20"]))


def test_the_command_plans_tokenizers_too(run):
    status, said, err = run("plan", "own_tokenizer", *SMALL, "data.image_size=16", "--memory", 8, "--tflops", 10)
    assert status == 0 and "4 codes each" in said and "hours on 1 GPUs" in said and "batch_size up to" in said, err
