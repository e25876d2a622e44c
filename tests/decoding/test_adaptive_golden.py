"""dLLM-Cache traces (golden set `dllm_cache`): the sampler with `AdaptiveCache(compat="upstream")` against every one."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from golden import absent_set, golden_folders
from safetensors.torch import load_file
from torch import Tensor

from unidiff.decoding import Guidance, ModalityDecoding, NoCache, Sampler, SamplerConfig
from unidiff.decoding.cache import AdaptiveCache, HeldGuidance
from unidiff.families.llada import LLADA
from unidiff.models.transformer import MaskedTransformer
from unidiff.tokens import Modality, Span, TokenBatch

pytestmark = pytest.mark.golden
CASES = [
    pytest.param(folder, name, id=f"{folder.name}-{name}")
    for folder in golden_folders("dllm_cache")
    if (folder / "config.json").exists()
    for name in json.loads((folder / "config.json").read_text())["scenarios"]
] or [absent_set("dllm_cache", "")]
LOGITS, COSINE = 2e-4, 1e-5  # tolerances of the set's README


@dataclass
class Trace:
    """What passes of the network did, one entry per pass and stream."""

    prompt: int
    batch: int
    values: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, **values: Tensor) -> None:
        for name, value in values.items():
            self.values.setdefault(name, []).append(value)

    def __getitem__(self, name: str) -> Tensor:
        return torch.stack(self.values[name])


@pytest.fixture
def spied(monkeypatch: pytest.MonkeyPatch):
    """Record every evaluation of the network; returns a function that starts a `Trace`."""
    whole, partial = MaskedTransformer.hidden, MaskedTransformer.partial
    trace: list[Trace] = []

    def on_whole(model, ids, modality, positions, mask, time, *wanted):
        hidden = whole(model, ids, modality, positions, mask, time)
        for part_ids, part in zip(ids.split(trace[0].batch), hidden.split(trace[0].batch), strict=True):
            trace[0].add(input_ids=part_ids, logits=model.head(part)[:, trace[0].prompt :])
        return whole(model, ids, modality, positions, mask, time, *wanted)

    def on_partial(model, ids, plan, store, time=None, select=None):
        layers, verified = model.config.num_layers, {}

        def spy(layer: int, similarity: Tensor) -> Tensor | None:
            verified[layer] = similarity, select(layer, similarity)
            return verified[layer][1]

        out = partial(model, ids, plan, store, time, spy if select else None)
        p, everywhere = trace[0].prompt, torch.ones_like(ids, dtype=torch.bool)
        refreshed = [everywhere if plan.query is None or i in plan.full_layers else plan.query for i in range(layers)]
        nothing = torch.full(ids.shape, torch.nan), ~everywhere
        seen = [verified.get(i, nothing) for i in range(layers)]
        for rows in torch.arange(len(ids)).split(trace[0].batch):
            trace[0].add(
                input_ids=ids[rows],
                logits=model.head(store.hidden[rows, p:-1]),
                linear_tokens=torch.tensor([[w.out, w.k, w.v, w.out, w.out] for w in out.work]),
                refresh_prompt=torch.stack([r[rows, :p].all() for r in refreshed]),
                refresh_response=torch.stack([r[rows, p:].all() for r in refreshed]),
                vverify_cosine=torch.stack([similarity[rows, p:] for similarity, _ in seen]),
                vverify_selected=torch.stack([chosen[rows, p:] for _, chosen in seen]),
            )
        return out

    monkeypatch.setattr(MaskedTransformer, "hidden", on_whole)
    monkeypatch.setattr(MaskedTransformer, "partial", on_partial)

    def start(prompt: int, batch: int) -> Trace:
        trace[:] = [Trace(prompt, batch)]
        return trace[0]

    return start


def policy_of(scenario: dict) -> AdaptiveCache | NoCache:
    if scenario["hook"] == "none":
        return NoCache()
    cache = AdaptiveCache(
        scenario["prompt_interval_steps"],
        scenario["gen_interval_steps"],
        scenario["transfer_ratio"],
        full_layers=(0,) if scenario["hook"] == "llada" else (),
        compat="upstream",
    )
    return HeldGuidance(cache, scenario["cfg_interval_steps"])


@pytest.mark.parametrize("folder, name", CASES)
def test_trace(folder: Path, name: str, spied) -> None:
    config = json.loads((folder / "config.json").read_text())
    scenario, run = config["scenarios"][name], config["generation"]
    model, vocabulary = LLADA.load(load_file(folder / "model.safetensors"), config["model_config"])
    prompt = load_file(folder / "inputs.safetensors")["prompt_ids"]
    expected = load_file(folder / f"trace_{name}.safetensors")
    rows = [[Span.text(p, True), Span.masked_text(run["gen_length"], vocabulary)] for p in prompt]
    text = ModalityDecoding(
        steps=run["steps"], schedule="fixed", block_length=run["block_length"], temperature=run["temperature"]
    )
    sampler = Sampler(
        model,
        vocabulary,
        SamplerConfig(text=text, guidance=Guidance(scale=1 + scenario["cfg_scale"]), stop_at_eos=False),
        policy_of(scenario),
    )
    sampler.banned[Modality.TEXT] = torch.empty(0, dtype=torch.long)  # upstream's softmax includes [MASK]
    trace = spied(prompt.shape[1], len(prompt))
    out = sampler(TokenBatch.from_spans(rows), torch.arange(len(prompt)), record=True)
    after = torch.stack(out.trajectory[1:])
    assert torch.equal(after.int(), expected.pop("tokens_after"))
    assert torch.equal(out.batch.ids[:, prompt.shape[1] :].int(), expected.pop("final_ids"))
    # which pass is which follows from the ids it was fed: an unconditional one sees no prompt
    assert torch.equal(trace["input_ids"].int(), expected.pop("input_ids"))
    hidden = (trace["input_ids"][:, :, : prompt.shape[1]] == vocabulary.mask_id).flatten(1).all(1)
    assert torch.equal(hidden.int(), expected.pop("forward_pass"))
    assert torch.equal((~hidden).int().cumsum(0).int() - 1, expected.pop("forward_step"))
    assert (trace["logits"] - expected.pop("logits")).abs().max() < LOGITS
    work = expected.pop("linear_tokens")
    if scenario["hook"] == "none":
        whole = torch.full_like(work, after.shape[-1])
        assert torch.equal(work, whole) and not expected
        return
    assert (trace["linear_tokens"] <= work).all()
    for key in ("refresh_prompt", "refresh_response", "vverify_selected"):
        assert torch.equal(trace[key].to(torch.uint8), expected.pop(key)), key
    theirs, ours = expected.pop("vverify_cosine"), trace["vverify_cosine"]
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert (ours - theirs).nan_to_num().abs().max() < COSINE
    assert not expected  # every stored tensor was compared
