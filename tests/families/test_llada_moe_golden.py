"""LLaDA-MoE against recorded runs: forward with every variant, routers, decoding traces and likelihood."""

from __future__ import annotations

import json
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from golden import absent_set, golden_cases, golden_folders
from reference import llada_decoding as reference
from reference.batches import llada_batch
from safetensors.torch import load_file
from torch import Tensor

from unidiff.decoding import Guidance, ModalityDecoding, Sampler, SamplerConfig
from unidiff.decoding.cache import BlockCausalCache, DualCache, IntervalCache, PrefixCache
from unidiff.families.layout import TaskInputs
from unidiff.families.llada.rows import as_upstream, llada_sampler
from unidiff.families.llada_moe import LLADA_MOE, LLaDAMoELayout
from unidiff.models.denoiser import CachePlan
from unidiff.models.experts import mixtures, recorded_routings
from unidiff.models.store import StoreOptions
from unidiff.models.transformer import MaskedTransformer
from unidiff.tokens import Vocabulary

pytestmark = pytest.mark.golden
LOGITS = dict(atol=3e-4, rtol=0.0)
CLOSE = dict(atol=1e-4, rtol=0.0)
FOLDERS = golden_cases("llada_moe", having="forward.safetensors")


def read_config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


@lru_cache(maxsize=1)
def tensors(folder: Path, kind: str) -> dict[str, Tensor]:
    return load_file(folder / f"{kind}.safetensors")


def load(folder: Path, more: dict | None = None, weights: dict | None = None) -> tuple[MaskedTransformer, Vocabulary]:
    config = read_config(folder)
    state = {**load_file(folder / "weights.safetensors"), **(weights or {})}
    return LLADA_MOE.load(state, {**config["model"], "mask_token_id": config["mask_token_id"], **(more or {})})


@lru_cache(maxsize=1)
def plain(folder: Path) -> tuple[MaskedTransformer, Vocabulary]:
    return load(folder)


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_weight_maps_both_ways(folder):
    """In each of the layouts of experts, with the same result."""
    weights, config = load_file(folder / "weights.safetensors"), read_config(folder)
    model, _ = plain(folder)
    back = LLADA_MOE.export(model)
    assert set(back) == set(weights) and all(torch.equal(back[name], value) for name, value in weights.items())
    for layout in ("stacked", "fused"):
        other = LLADA_MOE.export(model, {"experts": layout})
        assert len(other) < len(weights)
        assert LLADA_MOE.spelling(other, config["model"]) == {"experts": layout}
        again, _ = LLADA_MOE.load(other, {**config["model"], "mask_token_id": 93})
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
        assert all(torch.equal(v, LLADA_MOE.export(again)[n]) for n, v in weights.items())
    up = other["model.layers.1.mlp.w1"]  # gate above up
    assert torch.equal(up[2, :16], weights["model.layers.1.mlp.experts.2.gate_proj.weight"])


@pytest.mark.parametrize("folder", FOLDERS)
@torch.no_grad()
def test_forward(folder):
    model, _ = plain(folder)
    stored = tensors(folder, "forward")
    ids, seen = stored["input_ids"].long(), stored["attention_mask"].bool()
    hidden, outputs = [], []
    hooks = [b.register_forward_pre_hook(lambda _m, args: hidden.append(args[0])) for b in model.blocks]
    hooks.append(model.final_norm.register_forward_hook(lambda _m, _a, output: hidden.append(output)))
    hooks += [m.register_forward_hook(lambda _m, _a, output: outputs.append(output)) for m in mixtures(model)]
    hooks += [
        m.router.register_forward_pre_hook(lambda m, args: logits.append(m.logits(args[0]))) for m in mixtures(model)
    ]
    logits: list[Tensor] = []
    with recorded_routings(model) as routings:
        found = model(llada_batch(ids, attended=seen))
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(found[seen], stored["logits"][seen], **LOGITS)
    for ours, theirs in zip(hidden, stored["hidden_states"], strict=True):
        torch.testing.assert_close(ours[seen], theirs[seen], **CLOSE)
    flat = seen.flatten()
    for n, (routing, output, raw) in enumerate(zip(routings, outputs, logits, strict=True), 1):
        torch.testing.assert_close(output[seen], stored[f"moe.{n}.output"][seen], **CLOSE)
        torch.testing.assert_close(raw[flat], stored[f"router.{n}.logits"][seen], **CLOSE)
        same_choice(routing, stored, n, seen)
    batch = llada_batch(ids, attended=seen)  # upstream counts positions from the beginning of the padded row
    places = torch.arange(ids.shape[1])[:, None].expand(*ids.shape, 3)
    store = model.make_store(batch.replace(positions=places), StoreOptions())
    model.partial(ids, CachePlan(), store)
    for layer in range(3):
        for name, kept in (("keys", store.keys(layer)), ("values", store.values(layer))):
            theirs = stored[f"{name}.{layer}"].transpose(1, 2)[seen]
            torch.testing.assert_close(kept.transpose(1, 2)[seen], theirs, **CLOSE)
    # what the released file does with any mask: padding is seen
    torch.testing.assert_close(model(llada_batch(ids)), stored["logits_mask_ignored"], **LOGITS)
    for row, kept in enumerate(seen):
        alone = model(llada_batch(ids[row : row + 1, kept]))
        torch.testing.assert_close(found[row, kept], alone[0], atol=1e-4, rtol=0)


def same_choice(routing, stored: dict[str, Tensor], layer: int, seen: Tensor) -> None:
    """The same experts, as sets, with the same weights."""
    flat = seen.flatten()
    ours, order = routing.experts[flat].sort(1)
    theirs, stored_order = stored[f"router.{layer}.topk_idx"].long()[seen].sort(1)
    assert torch.equal(ours, theirs)
    weights = stored[f"router.{layer}.topk_weight"][seen].gather(1, stored_order)
    torch.testing.assert_close(routing.weights[flat].gather(1, order), weights, **CLOSE)


@pytest.mark.parametrize("folder", FOLDERS)
@torch.no_grad()
def test_variants(folder):
    stored, more = tensors(folder, "forward"), load_file(folder / "variant_weights.safetensors")
    ids, seen = stored["input_ids"].long(), stored["attention_mask"].bool()
    marks = {"norm_topk": "nothing", "shared": ".shared_expert.", "expert_bias": ".expert_bias"}
    for name, config in read_config(folder)["variants"].items():
        weights = {n: more[n] for n in list(more) if marks[name] in n}
        model, _ = load(folder, config, weights)
        found = model(llada_batch(ids, attended=seen))
        torch.testing.assert_close(found[seen], stored[f"{name}.logits"][seen], **LOGITS)
        assert float((found[seen] - stored["logits"][seen]).abs().max()) > 1


def case_params() -> list:
    folders = [f for f in golden_folders("llada_moe") if (f / "traces.safetensors").is_file()]
    found = [pytest.param(f, name, id=name) for f in folders for name in read_config(f)["cases"]]
    return found or [absent_set("llada_moe", "")]


def changes(rows: Tensor) -> Tensor:
    """States `[n, L]` without repetitions."""
    return torch.stack([rows[0], *(b for a, b in pairwise(rows) if not torch.equal(a, b))])


@pytest.mark.parametrize(("folder", "name"), case_params())
@torch.no_grad()
def test_trace(folder, name):
    """The sampler writes what LLaDA's program writes, pass by pass; its proposals, probabilities and logits are ours."""
    model, vocabulary = plain(folder)
    case, stored = read_config(folder)["cases"][name], tensors(folder, "traces")
    own = {k.partition(".")[2]: stored[k] for k in list(stored) if k.partition(".")[0] == name}
    settings, trace = case["settings"], own["trace"].long()
    prompt, scale = own["prompt"].long(), settings["cfg_scale"]
    length = settings["gen_length"]
    seen = torch.nn.functional.pad(own["attention_mask"].bool(), (0, length), value=True)
    batch = llada_batch(trace[0], (torch.arange(trace.shape[-1]) < prompt.shape[1]).expand_as(seen), seen)
    assert torch.equal(trace[0][:, : prompt.shape[1]], prompt)
    # 1. the sampler, which makes no pass that writes nothing
    text = ModalityDecoding(settings["steps"], schedule="fixed", temperature=0.0, block_length=settings["block_length"])
    config = SamplerConfig(text=text, guidance=Guidance(1 + scale), stop_at_eos=False)
    out = Sampler(model, vocabulary, config)(batch, torch.zeros(len(prompt), dtype=torch.long), record=True)
    ours = torch.stack(out.trajectory)
    for row, kept in enumerate(seen):
        assert torch.equal(changes(ours[:, row, kept]), changes(trace[:, row, kept]))
        if f"alone_{row}" in own:
            bare = llada_batch(batch.ids[row : row + 1, kept], batch.given[row : row + 1, kept])
            alone = Sampler(model, vocabulary, config)(bare, torch.zeros(1, dtype=torch.long))
            assert torch.equal(alone.batch.ids.int(), own[f"alone_{row}"])
    idle = sum(bool((a == b).all()) for a, b in pairwise(trace))
    assert out.steps == case["forward_passes"] - idle
    upstream = Sampler(model, vocabulary, as_upstream(config))(batch, torch.zeros(len(prompt)).long(), record=True)
    assert torch.equal(torch.stack(upstream.trajectory), ours)  # no record has [MASK] as the best token
    # 2. what the model says of every recorded state
    tolerance = dict(atol=5e-4 if scale else 2e-4, rtol=0.0)
    for number, (before, after) in enumerate(pairwise(trace)):
        logits = model(llada_batch(before, attended=seen))
        raw, inputs = logits, before
        if scale:
            inputs = torch.where(batch.given, vocabulary.mask_id, before)
            uncond = model(llada_batch(inputs, attended=seen))
            raw, inputs = torch.cat([logits, uncond]), torch.cat([before, inputs])
            logits = uncond + (scale + 1) * (logits - uncond)
        written = (before != after) & seen
        proposal, probability = reference.propose(logits)
        assert torch.equal(proposal[written].int(), own["x0"][number][written])
        masked = (before == vocabulary.mask_id) & seen
        torch.testing.assert_close(probability[masked].float(), own["prob"][number][masked], **tolerance)
        if number == case["mid_pass"]:
            torch.testing.assert_close(logits[seen], own["mid_logits"][seen], atol=1e-3, rtol=0)
            if scale:
                both = seen.repeat(2, 1)
                assert torch.equal(inputs[both].int(), own["mid_model_input"][both])
                torch.testing.assert_close(raw[both], own["mid_raw_logits"][both], atol=1e-3, rtol=0)


@pytest.mark.parametrize("folder", FOLDERS)
@torch.no_grad()
def test_with_compat_padding_is_seen(folder):
    """As the released file has it, which drops the attention mask."""
    model, vocabulary = plain(folder)
    stored, settings = tensors(folder, "traces"), read_config(folder)["cases"]["batch"]["settings"]
    prompt, seen = stored["batch.prompt"].long(), stored["batch.attention_mask"].bool()
    prompts = [row[kept].tolist() for row, kept in zip(prompt, seen, strict=True)]
    config = llada_sampler(vocabulary, settings["steps"], settings["block_length"])
    layout = LLaDAMoELayout(vocabulary, list, config, paced=True, family="llada-moe", compat="upstream")
    asked = layout.complete(TaskInputs(2, prompts, longest=settings["gen_length"]))
    first = stored["batch.trace"][0].long()
    assert torch.equal(asked.batch.ids, first) and bool(asked.batch.valid.all())
    ignored = model(llada_batch(first))
    torch.testing.assert_close(model(asked.batch), ignored, **LOGITS)
    short = int(seen.sum(1).argmin())
    row = torch.nn.functional.pad(seen, (0, settings["gen_length"]), value=True)
    kept = model(llada_batch(first, attended=row))
    assert float((kept - ignored)[short][row[short]].abs().max()) > 1
    made = layout.prepared(SimpleNamespace(transformer=model), asked, config, torch.zeros(2))
    assert made.config.text.writes_mask and made.config.text.forbid == ()
    with pytest.raises(ValueError, match="compat = 'old'"):
        LLaDAMoELayout(vocabulary, list, config, compat="old")


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("policy", [PrefixCache(interval=1), DualCache(interval=1), IntervalCache(interval=1)])
def test_a_cache_that_is_refreshed_in_every_pass_decodes_the_recorded_batch(folder, policy):
    model, vocabulary = plain(folder)
    stored = tensors(folder, "traces")
    trace, case = stored["batch_cfg.trace"].long(), read_config(folder)["cases"]["batch_cfg"]
    length, settings = stored["batch_cfg.prompt"].shape[1], case["settings"]
    seen = torch.nn.functional.pad(stored["batch_cfg.attention_mask"].bool(), (0, settings["gen_length"]), value=True)
    batch = llada_batch(trace[0], (torch.arange(trace.shape[-1]) < length).expand_as(seen), seen)
    text = ModalityDecoding(settings["steps"], schedule="fixed", temperature=0.0, block_length=settings["block_length"])
    config = SamplerConfig(text=text, guidance=Guidance(1 + settings["cfg_scale"]), stop_at_eos=False)
    out = Sampler(model, vocabulary, config, policy)(batch, torch.zeros(2, dtype=torch.long))
    assert torch.equal(out.batch.ids[seen], trace[-1][seen])
    with pytest.raises(ValueError, match="block_causal"):
        Sampler(model, vocabulary, config, BlockCausalCache())(batch, torch.zeros(2, dtype=torch.long))


@pytest.mark.parametrize("folder", FOLDERS)
@torch.no_grad()
def test_likelihood(folder):
    model, vocabulary = plain(folder)
    stored, config = tensors(folder, "likelihood"), read_config(folder)["likelihood"]
    prompt, answer, noisy = (stored[n].long() for n in ("prompt", "answer", "noisy"))
    x0 = torch.cat((prompt, answer)).expand(noisy.shape[1:])
    ratio = (noisy == vocabulary.mask_id).sum(-1) / len(answer)
    torch.testing.assert_close(ratio.float(), stored["mask_ratio"], rtol=1e-6, atol=0.0)
    for tag in ("cfg0", "cfg"):
        losses = []
        for n, (copies, share) in enumerate(zip(noisy, ratio, strict=True)):
            nll = reference.masked_nll(model, copies, x0, vocabulary.mask_id, len(prompt), config[tag]["cfg_scale"])
            torch.testing.assert_close(nll, stored[f"{tag}.cross_entropy"][n], rtol=1e-5, atol=2e-4)
            losses.append(reference.answer_nll(nll, share))
        torch.testing.assert_close(torch.stack(losses), stored[f"{tag}.batch_loss"], rtol=1e-5, atol=0.0)
        assert -float(torch.stack(losses).mean()) == pytest.approx(config[tag]["log_likelihood"], rel=1e-5)
