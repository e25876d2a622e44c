"""ML-Cache traces (golden set `ml_cache`): the sampler with `MaxLogitCache(compat="upstream")` against every one."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from golden import absent_set, golden_folders
from reference.batches import lumina_pair
from safetensors.torch import load_file
from torch import Tensor

from unidiff.decoding import Guidance, ModalityDecoding, NoCache, Sampler, SamplerConfig, draw
from unidiff.decoding.cache.max_logit import MaxLogitCache
from unidiff.diffusion.schedules.known import Cosine
from unidiff.families.llada import LLADA
from unidiff.models.transformer import MaskedTransformer
from unidiff.tokens import Vocabulary

pytestmark = pytest.mark.golden
CASES = [
    pytest.param(folder, name, id=f"{folder.name}-{name}")
    for folder in golden_folders("ml_cache")
    if (folder / "config.json").exists()
    for name in json.loads((folder / "config.json").read_text())["scenarios"]
] or [absent_set("ml_cache", "")]
LOGITS = 2e-4  # tolerance of the set's README


def vocabulary_of(config: dict) -> Vocabulary:
    ids, size = config["tokens"], config["model_config"]["vocab_size"]
    start = ids["vocab_offset"]
    return Vocabulary(size, (0, start), (start, start + ids["codebook_size"]), ids["mask"])


def float32_cosine(schedule: Cosine, done: Tensor) -> Tensor:
    """The reference takes the cosine in float32: where n cos(..) should be whole, one token fewer may stay masked."""
    return torch.cos(done.float() * math.pi / 2).double()


class Replayed:
    """`draw.choose` with the stored noise: argmax of logits / T + Gumbel, ranked by log p + T Gumbel."""

    def __init__(self, sample: Tensor, ranking: Tensor) -> None:
        self.sample, self.ranking, self.step = sample, ranking, 0

    def __call__(self, values, is_real, settings, u, noise, blend) -> draw.Choice:
        logits = blend(values)
        n, temperature = int(is_real.sum()), settings.temperature
        noise, ranking = (x[self.step][:, :n].double() for x in (self.sample, self.ranking))
        self.step += 1
        token = torch.zeros_like(is_real, dtype=torch.long)
        token[:, :n] = (logits[:, :n] / temperature + noise).argmax(-1)
        p = logits.double().softmax(-1).gather(-1, token[..., None])[..., 0]
        confidence = p.log()
        confidence[:, :n] += temperature * ranking
        return draw.Choice(token, p, confidence, torch.ones((), dtype=torch.bool))


@pytest.mark.parametrize("folder, name", CASES)
def test_trace(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = json.loads((folder / "config.json").read_text())
    scenario, vocabulary, start = config["scenarios"][name], vocabulary_of(config), config["tokens"]["code_start"]
    model, _ = LLADA.load(load_file(folder / "model.safetensors"), config["model_config"], vocabulary=vocabulary)
    inputs = load_file(folder / "inputs.safetensors")
    expected = load_file(folder / f"trace_{name}.safetensors")
    batch, other = lumina_pair(inputs["cond_ids"], inputs["uncond_prefix_ids"], start, vocabulary)
    targets = batch.targets[0]
    seen: dict[str, list[Tensor]] = {"cond": [], "uncond": []}
    computed: dict[str, list[Tensor]] = {"cond": [], "uncond": []}

    def record(ids: Tensor, hidden: Tensor, query: Tensor) -> None:
        for row in range(len(ids)):  # each stream has a prompt of its own
            stream = "cond" if torch.equal(ids[row, ~targets], batch.ids[0, ~targets]) else "uncond"
            valid = (batch if stream == "cond" else other).valid[0]
            seen[stream].append(model.head(hidden[row : row + 1], *vocabulary.image)[:, valid])
            computed[stream].append(query[row : row + 1, valid])

    whole, partial = MaskedTransformer.hidden, MaskedTransformer.partial

    def on_whole(model, ids, modality, positions, mask, time, *wanted):
        hidden = whole(model, ids, modality, positions, mask, time)
        record(ids, hidden, torch.ones_like(ids, dtype=torch.bool))
        return whole(model, ids, modality, positions, mask, time, *wanted)

    def on_partial(model, ids, plan, store, time=None, select=None):
        out = partial(model, ids, plan, store, time, select)
        query = torch.ones_like(ids, dtype=torch.bool) if plan.query is None else plan.query
        record(ids, store.hidden[:, :-1], query)
        return out

    monkeypatch.setattr(MaskedTransformer, "hidden", on_whole)
    monkeypatch.setattr(MaskedTransformer, "partial", on_partial)
    monkeypatch.setattr(Cosine, "rate_after", float32_cosine)
    if scenario["temperature"]:
        replayed = Replayed(expected.pop("gumbel_sample"), expected.pop("gumbel_topk"))
        monkeypatch.setattr(draw, "choose", replayed)
    image = ModalityDecoding(
        steps=scenario["timesteps"], schedule="cosine", rule="quota", temperature=scenario["temperature"]
    )
    policy = NoCache()
    if scenario["use_cache"]:
        names = ("cache_ratio", "warmup_ratio", "refresh_interval")
        policy = MaxLogitCache(*(scenario[n] for n in names), compat="upstream")
    sampler = Sampler(
        model, vocabulary, SamplerConfig(image=image, guidance=Guidance(scale=1 + scenario["cfg_scale"])), policy
    )
    out = sampler(batch, torch.zeros(1, dtype=torch.long), record=True, unconditional=other)
    states = torch.stack(out.trajectory)[:, :, batch.valid[0]]  # a shorter prompt than the other stream's is padded
    assert torch.equal(states[:-1].int(), expected.pop("input_ids"))
    assert torch.equal(states[1:].int(), expected.pop("tokens_after"))
    assert torch.equal(out.batch.ids[batch.targets].int()[None], expected.pop("final_vq_ids"))
    for stream in ("cond", "uncond"):
        query = torch.stack(computed[stream])
        assert torch.equal(query.to(torch.uint8), expected.pop(f"{stream}_computed"))
        theirs = expected.pop(f"{stream}_logits")
        assert (torch.stack(seen[stream]) - theirs).abs().max() < LOGITS
    counts = torch.stack([torch.stack(computed[s]).sum((1, 2)) for s in ("cond", "uncond")], 1)
    assert torch.equal(counts.int(), expected.pop("computed_tokens"))
    assert not expected  # every stored tensor was compared
