"""LLaDA2.0 and LLaDA2.1 against recorded runs: forward, experts in both layouts, the exact cache, and block decoding."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from golden import absent_set, golden_cases, golden_folders
from reference.batches import llada_batch
from safetensors.torch import load_file
from torch import Tensor

from unidiff.decoding import Sampler, SamplerConfig
from unidiff.decoding.cache import BlockCausalCache, NoCache
from unidiff.families.layout import TaskInputs
from unidiff.families.llada2 import LLADA2, llada2_sampler
from unidiff.families.llada2.rows import BlockChatLayout
from unidiff.families.llada2.soft_blocks import SoftBlocks
from unidiff.models.denoiser import CachePlan
from unidiff.models.experts import mixtures, recorded_routings
from unidiff.models.transformer import MaskedTransformer, block_causal_mask
from unidiff.tokens import TokenBatch, Vocabulary

pytestmark = pytest.mark.golden
LOGITS = dict(atol=2e-4, rtol=0.0)
CLOSE = dict(atol=1e-4, rtol=0.0)
FOLDERS = golden_cases("llada2_mini", having="forward.safetensors")


def read_config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


@lru_cache(maxsize=1)
def tensors(folder: Path, kind: str) -> dict[str, Tensor]:
    return load_file(folder / f"{kind}.safetensors")


def settings_of(folder: Path) -> dict[str, Any]:
    config = read_config(folder)
    return {**config["model"], **config["token_ids"], "block_length": config["block_length"]}


@lru_cache(maxsize=1)
def load(folder: Path) -> tuple[MaskedTransformer, Vocabulary]:
    return LLADA2.load(load_file(folder / "weights.safetensors"), settings_of(folder))


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_weight_maps_both_ways(folder):
    """Also from stacked experts, as the training programs write them."""
    weights = load_file(folder / "weights.safetensors")
    stacked = dict(load_file(folder / "experts_stacked.safetensors").items())
    model, _ = load(folder)
    back = LLADA2.export(model)
    assert set(back) == set(weights) and all(torch.equal(back[name], value) for name, value in weights.items())
    rest = {name: value for name, value in weights.items() if ".experts." not in name}
    other, _ = LLADA2.load({**rest, **stacked}, settings_of(folder))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    again = LLADA2.export(other, LLADA2.spelling([*rest, *stacked], {}))
    assert all(torch.equal(again[name], value) for name, value in {**rest, **stacked}.items())


@pytest.mark.parametrize("folder", FOLDERS)
@torch.no_grad()
def test_forward(folder):
    model, _ = load(folder)
    stored = tensors(folder, "forward")
    ids, real = stored["input_ids"].long(), stored["real"].bool()
    batch = llada_batch(ids, attended=real)
    assert torch.equal(batch.positions[..., 0][real].int(), stored["position_ids"][real])
    seen = block_causal_mask(batch.positions[..., 0], read_config(folder)["block_length"], batch.attention_mask())
    allowed = stored["attention_allowed"].bool()
    assert torch.equal(seen[:, 0][real], allowed[:, 0][real])  # queries that are padding see nothing here
    hidden, outputs, attended, raw = [], [], [], []
    hooks = [b.register_forward_pre_hook(lambda _m, args: hidden.append(args[0])) for b in model.blocks]
    hooks.append(model.final_norm.register_forward_hook(lambda _m, _a, output: hidden.append(output)))
    hooks += [
        b.attention.out.register_forward_hook(lambda _m, _a, output: attended.append(output)) for b in model.blocks
    ]
    for layer in mixtures(model):
        hooks.append(layer.register_forward_hook(lambda _m, _a, output: outputs.append(output)))
        hooks.append(layer.router.register_forward_pre_hook(lambda m, args: raw.append(m.logits(args[0]))))
    with recorded_routings(model) as routings:
        logits = model(batch)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(logits[real], stored["logits"][real], **LOGITS)
    for ours, theirs in zip(hidden, stored["hidden_states"], strict=True):
        torch.testing.assert_close(ours[real], theirs[real], **CLOSE)
    for n, ours in enumerate(attended):
        torch.testing.assert_close(ours[real], stored[f"attention.{n}.output"][real], **CLOSE)
    flat = real.flatten()
    for n, (routing, output, own) in enumerate(zip(routings, outputs, raw, strict=True), 1):
        torch.testing.assert_close(output[real], stored[f"moe.{n}.output"][real], **CLOSE)
        torch.testing.assert_close(own[flat], stored[f"router.{n}.logits"][real], **CLOSE)
        ours, order = routing.experts[flat].sort(1)
        theirs, stored_order = stored[f"router.{n}.topk_idx"].long()[real].sort(1)
        assert torch.equal(ours, theirs)
        weights = stored[f"router.{n}.topk_weight"][real].gather(1, stored_order)
        torch.testing.assert_close(routing.weights[flat].gather(1, order), weights, **CLOSE)
    store = model.make_store(batch)
    model.partial(ids, CachePlan(), store)
    for layer in range(len(model.blocks)):
        for name, kept in (("key", store.keys(layer)), ("value", store.values(layer))):
            theirs = stored[f"cache.{layer}.{name}"].transpose(1, 2)[real]
            torch.testing.assert_close(kept.transpose(1, 2)[real], theirs, **CLOSE)
    for row, kept in enumerate(real):  # exact: a padded row is the row alone
        torch.testing.assert_close(logits[row, kept], model(llada_batch(ids[row : row + 1, kept]))[0], **CLOSE)


@pytest.mark.parametrize("folder", FOLDERS)
@torch.no_grad()
def test_a_cache_of_finished_blocks_is_exact(folder):
    model, _ = load(folder)
    stored, start = tensors(folder, "forward"), read_config(folder)["forward"]["cached_from"]
    ids = stored["input_ids"].long()[:1]
    place = torch.arange(ids.shape[1])[None]
    store = model.make_store(llada_batch(ids))
    model.partial(ids, CachePlan(place < start, full=False), store)
    last = model.head(model.partial(ids, CachePlan(place >= start, full=False), store).hidden)
    torch.testing.assert_close(last, stored["cached_last_block.logits"], **LOGITS)
    torch.testing.assert_close(last, model(llada_batch(ids))[:, start:], **CLOSE)


def soft_logits(model: MaskedTransformer, ids: Tensor) -> Tensor:
    """With the table of blocks added to the scores as 0 and 1, so that nothing is hidden."""
    batch, soft = llada_batch(ids), SoftBlocks(model)
    return soft.head(soft.hidden(batch.ids, batch.modality, batch.positions))


@pytest.mark.parametrize("folder", FOLDERS)
@torch.no_grad()
def test_a_mask_that_is_added_is_another_model(folder):
    """What the file of the released LLaDA2.1 is reported to do; here blocks are blocks."""
    stored = tensors(folder, "forward")
    ids = stored["input_ids"].long()[:1]
    soft = soft_logits(load(folder)[0], ids)
    torch.testing.assert_close(soft, stored["soft_bias.logits"], **LOGITS)
    assert float((soft - stored["logits"][:1]).abs().max()) > 10


def case_params() -> list:
    folders = [f for f in golden_folders("llada2_mini") if (f / "traces.safetensors").is_file()]
    found = [pytest.param(f, name, id=name) for f in folders for name in read_config(f)["cases"]]
    return found or [absent_set("llada2_mini", "")]


def own_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    stored = tensors(folder, "traces")
    return {key.partition(".")[2]: stored[key] for key in list(stored) if key.partition(".")[0] == name}


def request(folder: Path, name: str) -> tuple[TokenBatch, SamplerConfig, Vocabulary, dict[str, Tensor]]:
    """A case for the sampler."""
    case, own = read_config(folder)["cases"][name], own_tensors(folder, name)
    asked = case["settings"]
    chosen: dict[str, Any] = {"block_length": asked["block_length"], "threshold": asked["threshold"]}
    if case["version"] == "2.1":
        chosen |= {"edit_threshold": asked["editing_threshold"], "edit_passes": asked["max_post_steps"]}
        chosen |= {"least": asked.get("num_to_transfer", 1)}
    else:
        chosen |= {"steps": min(asked["steps"], asked["gen_length"] // asked.get("minimal_topk", 1))}
    vocabulary = replace(load(folder)[1], mask_id=case["mask_id"], specials={"eos": case["eos_id"]})
    early = asked.get("eos_early_stop", False)
    config = llada2_sampler(vocabulary, stop_early=early, **chosen)
    config = replace(config, stop_at_eos=early or case["version"] == "2.0")
    place = torch.arange(len(own["canvas"]))
    given = place < len(own["prompt"])
    ids = torch.where(given, torch.nn.functional.pad(own["prompt"].long(), (0, int((~given).sum()))), case["mask_id"])
    return llada_batch(ids[None], given[None]), config, vocabulary, own


@pytest.mark.parametrize(("folder", "name"), case_params())
@torch.no_grad()
def test_compat_gives_every_record(folder, name):
    """The sampler in the ways of the program, through the layout: [MASK] written where it is the best token, blocks that hide
    nothing where the file had it so. Proposals, probabilities and logits of every pass are the model's."""
    model, _ = load(folder)
    case, own = read_config(folder)["cases"][name], own_tensors(folder, name)
    batch, config, vocabulary, _ = request(folder, name)
    layout = BlockChatLayout(
        vocabulary, list, config, paced=True, compat="upstream", soft_blocks=case["soft_bias"], family="llada2"
    )
    prompt, block = own["prompt"].tolist(), case["settings"]["block_length"]
    asked = layout.complete(TaskInputs(1, [prompt], longest=case["settings"]["gen_length"]))
    assert torch.equal(asked.batch.ids, batch.ids) and torch.equal(asked.batch.given, batch.given)
    seeds = torch.zeros(1, dtype=torch.long)
    made = layout.prepared(SimpleNamespace(transformer=model), asked, config, seeds)
    fed, written, edited = own["input_ids"].long(), own["written"].bool(), own["edited"].bool()
    for policy in (made.policy or NoCache(), *(() if case["soft_bias"] else (BlockCausalCache(),))):
        out = Sampler(made.model, vocabulary, made.config, policy)(made.request.batch, seeds, record=True)
        assert out.steps == case["forwards"] == len(fed)
        states = torch.cat(out.trajectory)
        assert torch.equal(torch.where(fed < 0, -1, states[: len(fed)]), fed)
        answer = out.batch.ids[0, len(prompt) :][: case["settings"]["gen_length"]].tolist()
        answer = answer[: answer.index(case["eos_id"]) + 1] if case["eos_id"] in answer else answer
        assert answer == own["output"].tolist()
        reached = own["canvas"] != case["mask_id"]
        assert torch.equal(states[-1][reached].int(), own["canvas"][reached])
    for number, (before, after) in enumerate(pairwise(states)):
        place = slice(int(own["block"][number]) * block, (int(own["block"][number]) + 1) * block)
        x0, known = own["x0"][number].long(), case["mask_id"]
        moved = written[number] | edited[number]
        fill = after[place] != torch.where(moved, x0, before[place])  # behind an end of text, after the last pass
        assert not bool(fill.any()) or (number + 1 == len(fed) and bool((after[place][fill] == case["eos_id"]).all()))
        assert bool((before[place][written[number]] == known).all())
        ids = before[None, : place.stop]
        logits = (soft_logits(model, ids) if case["soft_bias"] else model(llada_batch(ids)))[0, place]
        proposed = logits.softmax(-1).max(-1)
        assert torch.equal(proposed.indices[moved], x0[moved])
        torch.testing.assert_close(proposed.values, own["prob"][number], **CLOSE)
        if "logits" in own:
            torch.testing.assert_close(logits, own["logits"][number], atol=1e-3, rtol=0)
    steps = [sum(own["block"][:n] == own["block"][n]) for n in range(len(fed))]
    assert own["step"].tolist() == [int(n) for n in steps]


SAMPLED = [p for p in case_params() if p.values[1] not in ("mask_proposed", "edit_soft_bias")]


@pytest.mark.parametrize(("folder", "name"), SAMPLED)
def test_the_sampler_decodes_the_recorded_runs(folder, name):
    """The same canvas before every pass and the same answer, without a cache and with the exact one, which computes no
    finished block twice."""
    model, _ = load(folder)
    batch, config, vocabulary, own = request(folder, name)
    fed, tokens, asked = own["input_ids"].long(), [], read_config(folder)["cases"][name]["settings"]
    for policy in (NoCache(), BlockCausalCache()):
        out = Sampler(model, vocabulary, config, policy)(batch, torch.zeros(1, dtype=torch.long), record=True)
        assert out.steps == out.nfe == len(fed)
        states = torch.cat(out.trajectory)[: len(fed)]
        assert torch.equal(torch.where(fed < 0, -1, states), fed)
        answer = out.batch.ids[0, len(own["prompt"]) :][: asked["gen_length"]].tolist()
        end = vocabulary.specials["eos"]
        answer = answer[: answer.index(end) + 1] if end in answer else answer
        assert answer == own["output"].tolist()
        tokens.append(out.stats.model_tokens)
    upstream = int((fed >= 0).sum())  # every pass recomputes everything up to the end of the block
    assert tokens[1] < upstream <= tokens[0]
    whole = asked["block_length"] * (len(fed) + len(batch.ids[0]) // asked["block_length"])
    assert tokens[1] <= whole


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("names", [("pair_a", "pair_b"), ("edit_pair_a", "edit_pair_b")])
@pytest.mark.parametrize("policy", [NoCache(), BlockCausalCache()])
def test_rows_of_unequal_prompts_share_a_batch(folder, names, policy):
    """Upstream takes no such batch, and for 2.1 none at all."""
    model, _ = load(folder)
    requests = [request(folder, name) for name in names]
    length = max(len(batch.ids[0]) for batch, *_ in requests)
    ids, given, seen = (torch.zeros(2, length, dtype=kind) for kind in (torch.long, torch.bool, torch.bool))
    for row, (batch, *_) in enumerate(requests):
        n = batch.shape[1]
        ids[row, length - n :], given[row, length - n :], seen[row, length - n :] = batch.ids[0], batch.given[0], True
    _, config, vocabulary, _ = requests[0]
    together = Sampler(model, vocabulary, config, policy)(
        llada_batch(ids, given, seen), torch.zeros(2, dtype=torch.long)
    )
    for row, (batch, own_config, _, own) in enumerate(requests):
        assert own_config == config
        alone = Sampler(model, vocabulary, config, policy)(batch, torch.zeros(1, dtype=torch.long))
        assert torch.equal(together.batch.ids[row, length - batch.shape[1] :], alone.batch.ids[0])
        start = len(own["prompt"])
        assert torch.equal(alone.batch.ids[0, start : start + len(own["output"])].int(), own["output"])


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_mask_is_proposed_and_none_is_left(folder):
    """Upstream writes [MASK] where it is the best token: it uses up quota, and may stay."""
    model, _ = load(folder)
    batch, config, vocabulary, own = request(folder, "mask_proposed")
    moved = own["written"].bool()
    assert bool((own["x0"][moved] == vocabulary.mask_id).any())  # upstream did
    out = Sampler(model, vocabulary, config, BlockCausalCache())(batch, torch.zeros(1, dtype=torch.long), record=True)
    assert not bool((out.batch.ids == vocabulary.mask_id).any())
    for before, after in zip(out.trajectory, out.trajectory[1:], strict=False):
        assert not bool(((before != vocabulary.mask_id) & (after == vocabulary.mask_id)).any())
