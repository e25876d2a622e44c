"""Stored likelihoods of LLaDA and LLaDA-MoE through the estimator of this package: their masks, their weights, their softmax.

UniDisc's are in test_golden_unidisc. Of the files nothing is left out here but LLaDA's training losses, which
families/test_llada_golden compares.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch
from golden import golden_cases
from reference.batches import llada_batch
from safetensors.torch import load_file
from torch import Tensor

from unidiff.diffusion.likelihood import Nelbo, Scorer, average_nelbo, model_scorer
from unidiff.diffusion.noise import NoisyBatch
from unidiff.families.family import FAMILIES
from unidiff.tokens import Vocabulary

pytestmark = pytest.mark.golden
CLOSE = {"rtol": 1e-5, "atol": 0.0}
HAVING = "likelihood.safetensors"


class Stored:
    """A set's likelihood file: a prompt, an answer, masked copies of both in batches, and what came out."""

    def __init__(self, folder) -> None:
        self.folder, self.config = folder, json.loads((folder / "config.json").read_text())
        self.tensors = load_file(folder / HAVING)
        self.mask_id = self.config.get("mask_token_id", self.config["model"].get("mask_token_id"))
        self.prompt, self.answer, noisy = (self.tensors[n].long() for n in ("prompt", "answer", "noisy"))
        self.copies, self.batches = noisy.flatten(0, 1)[:, None], len(noisy)  # [copies, 1, L]
        ids = torch.cat([self.prompt, self.answer])[None]
        self.row = llada_batch(ids, torch.arange(ids.shape[1])[None] < len(self.prompt))
        # the reference's softmax is over all ids, [MASK] too: a vocabulary whose [MASK] lies behind them forbids none
        size = self.config["model"]["vocab_size"]
        self.vocabulary = Vocabulary(size + 1, (0, size), (size + 1, size + 1), size)

    def draws(self) -> Iterator[tuple[NoisyBatch, Tensor]]:
        for copy, ratio in zip(self.copies, self.tensors["mask_ratio"].flatten(), strict=True):
            masked = copy == self.mask_id
            torch.testing.assert_close(masked.sum(1) / len(self.answer), ratio[None], rtol=1e-6, atol=0.0)
            yield NoisyBatch(self.row.replace(ids=copy), masked), 1 / ratio[None]

    def check(self, tag: str, score: Scorer) -> Nelbo:
        found = average_nelbo(score, self.row, self.draws())
        losses = found.draws.unflatten(0, (self.batches, -1)).mean(1)[:, 0]
        torch.testing.assert_close(losses.float(), self.tensors[f"{tag}.batch_loss"], **CLOSE)
        assert -float(found.total) == pytest.approx(self.config["likelihood"][tag]["log_likelihood"], rel=1e-5)
        return found

    def load(self):
        family = self.folder.name.replace("_", "-")  # families are named as their sets
        named = {k: v for k, v in self.config.items() if k.endswith("_token_id")}
        weights = load_file(self.folder / "weights.safetensors")
        return FAMILIES[family].load(weights, {**self.config["model"], **named})


@pytest.fixture(params=[*golden_cases("llada", having=HAVING), *golden_cases("llada_moe", having=HAVING)])
def stored(request) -> Stored:
    return Stored(request.param)


class Guided:
    """A denoiser with guidance away from a hidden prompt: u + (scale + 1) (c - u)."""

    def __init__(self, model, stored: Stored, scale: float) -> None:
        self.model, self.hidden_ids, self.scale = model, stored.row.given, scale
        self.mask_id = stored.mask_id

    def hidden(self, ids, modality, positions, attention_mask, time=None):
        logits = [
            self.model.head(self.model.hidden(rows, modality, positions, attention_mask, time))
            for rows in (ids, ids.masked_fill(self.hidden_ids, self.mask_id))
        ]
        return logits[1] + (self.scale + 1) * (logits[0] - logits[1])

    def head(self, hidden, start=0, stop=None):
        return hidden[..., start:stop]


@torch.no_grad()
@pytest.mark.parametrize("tag", ["cfg0", "cfg"])
def test_the_estimator_gives_the_stored_likelihood(stored, tag):
    model, vocabulary = stored.load()
    scale = stored.config["likelihood"][tag]["cfg_scale"]
    model = Guided(model, stored, scale) if scale else model
    found = stored.check(tag, model_scorer(model, stored.vocabulary))
    if scale:
        return
    # this package forbids [MASK], which raises every probability by 1 / (1 - p([MASK]))
    own = average_nelbo(model_scorer(model, vocabulary), stored.row, stored.draws())
    assert bool((own.draws <= found.draws).all()) and float(own.total) < float(found.total)

    def without_mask(x_t, x0, where):
        chances = model.head(model.hidden(x_t.ids, x_t.modality, x_t.positions, None)).double().softmax(-1)
        chosen = chances.gather(-1, x0.ids[..., None])[..., 0] / (1 - chances[..., stored.mask_id])
        return torch.where(where, -chosen.log(), 0)

    expected = average_nelbo(without_mask, stored.row, stored.draws())
    torch.testing.assert_close(own.draws, expected.draws, **CLOSE)


@pytest.mark.parametrize("tag", ["cfg0", "cfg"])
def test_the_estimator_on_stored_cross_entropies(stored, tag):
    """Needs no model: sums, weights and means alone."""
    if f"{tag}.cross_entropy" not in stored.tensors:
        pytest.skip(f"golden set {stored.folder.name} stores no cross-entropies")
    values = iter(stored.tensors[f"{tag}.cross_entropy"].flatten(0, 1))

    def score(x_t, x0, where):
        nll = next(values)[None]
        assert torch.equal(nll != 0, where)
        return nll

    stored.check(tag, score)
