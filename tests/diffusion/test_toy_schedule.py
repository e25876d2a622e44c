"""A schedule is one module: nothing of unidiff names it, and training and decoding know it by its name."""

from __future__ import annotations

from toy_packages import run_with

PACKAGE = """
from dataclasses import dataclass

import torch

from unidiff.diffusion.schedules import Schedule


@dataclass(frozen=True)
class Logarithmic(Schedule):
    name = "logarithmic"

    def mask_rate(self, t):
        return torch.log1p(t) / torch.log(torch.tensor(2.0, dtype=t.dtype))

    def dalpha(self, t):
        return -1 / ((1 + t) * torch.log(torch.tensor(2.0, dtype=t.dtype)))

    def inverse_rate(self, rate):
        return torch.exp2(rate) - 1
"""
RUN = """
import sys
from pathlib import Path

import torch

from unidiff.decoding import ModalityDecoding, Sampler, SamplerConfig
from unidiff.diffusion.schedules import SCHEDULES, get_schedule
from unidiff.models.transformer import MaskedTransformer
from unidiff.tokens import Modality, Span, TokenBatch, Vocabulary
from unidiff.train.config import read_config
from unidiff.train.data.source import TokenTable
from unidiff.train.trainer import Trainer

assert "logarithmic" in SCHEDULES and get_schedule("logarithmic").weight(torch.tensor(0.5)) > 0
vocabulary = Vocabulary.unified(8, 16, {"eos": 0})
model = MaskedTransformer(vocabulary.size, hidden_size=16, num_layers=1, num_heads=2).eval()
batch = TokenBatch.from_spans([[Span.text([1], True), Span.masked_image((4, 4), vocabulary)]])
config = SamplerConfig(image=ModalityDecoding(steps=4, schedule="logarithmic"))
out = Sampler(model, vocabulary, config)(batch, torch.tensor([0]), record=True)
left = [int((ids == vocabulary.image_mask).sum()) for ids in out.trajectory]
assert left[-5:] == [16, 12, 9, 5, 0], left  # 16 log2(1 + t) at t = 3/4, 1/2, 1/4
words = ["tasks.generate={weight: 1, rate: logarithmic, loss: elbo}", "steps=3", "batch_size=8", "device=cpu"]
words += ["model={hidden_size: 16, num_layers: 1, num_heads: 2}", f"output={Path(sys.argv[1]) / 'run'}"]
words += ["data.validation_rows=0", "logging.progress=false", "precision=fp32"]
table = TokenTable({"codes": torch.randint(0, 16, (9, 2, 2)), "captions": torch.randint(0, 8, (9, 4))}, vocabulary)
run = Trainer(read_config(None, words), table)
made = run.mixer.of(torch.arange(2000))
rates = made.rate.sort().values
assert (get_schedule("logarithmic").inverse_rate(rates) - torch.linspace(0, 1, 2000)).abs().max() < 0.01
run.train()
try:
    read_config(None, ["tasks.generate.rate=logaritmic"])
except ValueError as error:
    assert "logarithmic" in str(error)
"""


def test_a_schedule_of_another_package(tmp_path):
    run_with(tmp_path, "schedules", PACKAGE, RUN)
