"""The library's own sampler and cache policies against recorded LLaDA and Fast-dLLM runs, wherever no quirk acts."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from golden import absent_set, golden_folders
from reference.batches import llada_batch
from safetensors.torch import load_file
from torch import Tensor

from unidiff.decoding import Guidance, ModalityDecoding, Sampler, SamplerConfig
from unidiff.decoding.cache import DualCache, NoCache, PrefixCache
from unidiff.families.llada import LLADA
from unidiff.models.transformer import MaskedTransformer
from unidiff.tokens import Vocabulary

pytestmark = pytest.mark.golden
FOLDERS = [f for f in golden_folders("llada") if (f / "weights.safetensors").is_file()]
POLICIES = {
    "generate": NoCache,
    "generate_with_prefix_cache": PrefixCache,
    "generate_with_dual_cache": DualCache,
}


@lru_cache(maxsize=1)
def load(folder: Path) -> tuple[dict, dict[str, Tensor], MaskedTransformer, Vocabulary]:
    config = json.loads((folder / "config.json").read_text())
    model, vocabulary = LLADA.load(load_file(folder / "weights.safetensors"), config["model"])
    return config, load_file(folder / "traces.safetensors"), model, vocabulary


def unfinished_block(case: dict, trace: Tensor) -> bool:
    """Whether the reference left a block before it was complete."""
    block, stop = -1, case["prompt_length"]
    for i, kind in enumerate(case["forward_kind"]):
        if kind == "full":
            if block >= 0 and bool((trace[i][:, :stop] == case["mask_id"]).any()):
                return True
            block += 1
            stop = case["prompt_length"] + (block + 1) * case["block_length"]
    return False


def quirk(case: dict, prompt: Tensor, trace: Tensor) -> str | None:
    """What the reference does here that the sampler does not."""
    if case.get("remasking") == "random":
        return "a ranking by recorded uniforms"
    if case.get("confidence_eos_eot_inf"):
        return "confidences over fewer tokens than proposals"
    if case.get("last_token_quirk_hits"):
        return "the factor rule writes one token too many"
    if bool((prompt == case["mask_id"]).any()):
        return "masks of the prompt take part"
    if case["entry_point"] == "generate_with_dual_cache" and unfinished_block(case, trace):
        return "a block ends before it is complete"
    return None


def case_params() -> list:
    found = []
    for folder in FOLDERS:
        config, stored, *_ = load(folder)
        for name, case in config["cases"].items():  # the others: test_llada_golden
            if quirk(case, stored[f"{name}.prompt"], stored[f"{name}.trace"]) is None:
                found.append(pytest.param(folder, name, id=f"{folder.name}-{name}"))
    return found or [absent_set("llada", "")]


@pytest.mark.parametrize(("folder", "name"), case_params())
def test_trace(folder, name):
    config, stored, model, vocabulary = load(folder)
    case, prompt, trace = config["cases"][name], stored[f"{name}.prompt"], stored[f"{name}.trace"]
    text = ModalityDecoding(
        steps=case["steps"],
        rule="quota" if case["selection"] == "topk" else case["selection"],
        schedule="fixed",
        temperature=0.0,
        threshold=case.get("threshold", 0.9),
        factor=case.get("factor", 1.0),
        block_length=case["block_length"],
        forbid=(config["model"]["eos_token_id"],) if case.get("logits_eos_inf") else (),
    )
    sampler = Sampler(
        model,
        replace(vocabulary, mask_id=case["mask_id"]),
        SamplerConfig(text=text, guidance=Guidance(1 + case.get("cfg_scale", 0.0)), stop_at_eos=False),
        POLICIES[case["entry_point"]](),
    )
    given = torch.arange(trace.shape[-1]) < case["prompt_length"]
    batch = llada_batch(trace[0].long(), given.expand(trace.shape[1:]))
    out = sampler(batch, torch.zeros(len(prompt), dtype=torch.long), record=True)
    ours = torch.stack(out.trajectory).int()
    for row in range(len(prompt)):  # rows of a batch do not wait here, and no pass is made that writes nothing
        assert torch.equal(changes(ours[:, row]), changes(trace[:, row]))
    if len(prompt) == 1:
        idle = sum(bool((a == b).all()) for a, b in pairwise(trace))
        assert out.steps == case["forward_passes"] - idle
        assert out.nfe == out.steps * (2 if case.get("cfg_scale") else 1)
        fed = sum(stop - start for start, stop in case["forward_range"]) - idle * trace.shape[-1]
        assert out.stats.model_tokens == fed * (2 if case.get("cfg_scale") else 1)


def changes(rows: Tensor) -> Tensor:
    """States `[n, L]` without repetitions."""
    return torch.stack([rows[0], *(b for a, b in pairwise(rows) if not torch.equal(a, b))])
