"""LLaDA2.0-Uni against recorded runs: forward, the cache of finished blocks, pictures, edits, answers, and Sprint.

The image parts are compared elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
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

from unidiff.decoding import Sampler, SamplerOutput, draw
from unidiff.decoding.cache import BlockCausalCache, NoCache, SprintCache
from unidiff.families.family import recognise
from unidiff.families.layout import Prepared, TaskInputs
from unidiff.families.llada2 import llada2_sampler, llada2_settings
from unidiff.families.llada2_uni import LLADA2_UNI
from unidiff.families.llada2_uni.rows import NUMBER, LLaDA2UniLayout, uni_image_sampler
from unidiff.models.denoiser import CachePlan
from unidiff.models.experts import recorded_routings
from unidiff.models.transformer import MaskedTransformer
from unidiff.tokens import TokenBatch, Vocabulary
from unidiff.weights.files import build_on_meta

pytestmark = pytest.mark.golden
CLOSE = dict(atol=1e-4, rtol=0.0)
FOLDERS = golden_cases("llada2_uni", having="forward.safetensors")
SEEDS = torch.zeros(1, dtype=torch.long)


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def settings_of(folder: Path) -> dict[str, Any]:
    config = read_config(folder)
    ids = {name: config["token_ids"][name] for name in ("mask_token_id", "eos_token_id")}
    return {**config["model"], **ids, "block_length": config["block_length"]}


@lru_cache(maxsize=1)
def load(folder: Path) -> tuple[MaskedTransformer, Vocabulary]:
    return LLADA2_UNI.load(load_file(folder / "weights.safetensors"), settings_of(folder))


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_weight_maps_both_ways(folder):
    weights = load_file(folder / "weights.safetensors")
    assert recognise(settings_of(folder), list(weights)) is LLADA2_UNI
    back = LLADA2_UNI.export(load(folder)[0])
    assert set(back) == set(weights) and all(torch.equal(back[name], value) for name, value in weights.items())


@pytest.mark.parametrize("folder", FOLDERS)
def test_image_codes_stand_behind_the_words(folder):
    ids, vocabulary = read_config(folder)["token_ids"], load(folder)[1]
    assert vocabulary.image == (ids["image_token_offset"], ids["image_token_offset"] + ids["codebook_size"])
    assert vocabulary.mask_id == vocabulary.image_mask == ids["mask_token_id"]
    with pytest.raises(ValueError, match=r"image_token_offset = 9999 of \d+ ids"):
        LLADA2_UNI.vocabulary({**settings_of(folder), "image_token_offset": 9999})


@pytest.mark.parametrize("folder", FOLDERS)
@torch.no_grad()
def test_forward(folder):
    """The second row is padded in front, and its blocks are counted with the padding: by a mask of its own."""
    model, _ = load(folder)
    stored = load_file(folder / "forward.safetensors")
    plain = {**llada2_settings(settings_of(folder)), "attention": "full", "block_length": None}
    twin = build_on_meta(MaskedTransformer, plain)
    twin.load_state_dict(model.state_dict(), assign=True)
    ids, allowed = stored["input_ids"].long(), stored["attention_allowed"].bool()
    positions = stored["position_ids"].long()[..., None].expand(*ids.shape, 3)
    hidden: list[Tensor] = []
    hooks = [b.register_forward_pre_hook(lambda _m, args: hidden.append(args[0])) for b in twin.blocks]
    hooks.append(twin.final_norm.register_forward_hook(lambda _m, _a, output: hidden.append(output)))
    with recorded_routings(twin) as routings:
        logits = twin.head(twin.eval().hidden(ids, torch.zeros_like(ids), positions, allowed))
    for hook in hooks:
        hook.remove()
    real = torch.ones_like(ids, dtype=torch.bool)
    real[1, : int((positions[1, :, 0] == 0).nonzero()[-1])] = False
    torch.testing.assert_close(logits[real], stored["logits"][real], **CLOSE)
    for ours, theirs in zip(hidden, stored["hidden_states"], strict=True):
        torch.testing.assert_close(ours[real], theirs[real], **CLOSE)
    for n, routing in enumerate(routings, 1):
        theirs, order = stored[f"router.{n}.topk_idx"].long()[real].sort(1)
        ours, own_order = routing.experts[real.flatten()].sort(1)
        assert torch.equal(ours, theirs)
        weights = stored[f"router.{n}.topk_weight"][real].gather(1, order)
        torch.testing.assert_close(routing.weights[real.flatten()].gather(1, own_order), weights, **CLOSE)
        raw = stored[f"router.{n}.logits"][real].sigmoid()
        torch.testing.assert_close(routing.scores[real.flatten()], raw, **CLOSE)
    # the first row by positions alone, and with finished blocks kept
    alone = llada_batch(ids[:1])
    torch.testing.assert_close(model(alone), stored["logits"][:1], **CLOSE)
    store, place = model.make_store(alone), torch.arange(ids.shape[1])[None]
    last = len(place[0]) - stored["cached_last_block.logits"].shape[1]
    model.partial(ids[:1], CachePlan(place < last, full=False), store)
    out = model.head(model.partial(ids[:1], CachePlan(place >= last, full=False), store).hidden)
    torch.testing.assert_close(out, stored["cached_last_block.logits"], **CLOSE)
    for layer in range(len(model.blocks)):
        torch.testing.assert_close(store.keys(layer), stored[f"cache.{layer}.key"], **CLOSE)
        torch.testing.assert_close(store.values(layer), stored[f"cache.{layer}.value"], **CLOSE)


def case_params() -> list:
    found = [
        pytest.param(folder, name, id=name)
        for folder in golden_folders("llada2_uni")
        if (folder / "forward.safetensors").is_file()
        for name in read_config(folder)["traces"]
    ]
    return found or [absent_set("llada2_uni", "")]


class Case:
    """A recorded run, and the request that asks our layout for it."""

    def __init__(self, folder: Path, name: str, compat: str | None = "upstream") -> None:
        self.model, self.vocabulary = load(folder)
        self.stored = load_file(folder / f"trace_{name}.safetensors")
        config = read_config(folder)
        self.about, self.ids, self.block = config["traces"][name], config["token_ids"], config["block_length"]
        self.settings, self.kind = self.about["settings"], "answer"
        height, width = config["grid"]
        own = self.settings
        count = own["gen_length"]
        drawn = {height: "height_token", width: "width_token"}
        if own.get("image"):
            self.kind = "edit" if own.get("editing") else "draw"
        self.grid = (1, count)  # as many codes as were decoded, on whatever grid
        sides = {NUMBER.format(side): [self.ids[mark]] for side, mark in drawn.items()}
        if self.kind == "draw":
            sides |= {NUMBER.format(1): [self.ids["height_token"]], NUMBER.format(count): [self.ids["width_token"]]}
        if self.kind == "edit":
            self.grid = (height, width)
        marks = {name: [self.ids[name]] for name in ("soi", "eoi", "boi")} | {"uncondition": self.ids["uncondition"]}
        steps, threshold = own["steps"], own["threshold"]
        rescale = {"rescale": own.get("cfg_rescale", 0.7), "threshold": threshold}
        self.sprint = None
        if own.get("sprint"):
            ratios = {name: own.get(short) for name, short in (("keep_text", "tkr"), ("keep_images", "ikr"))}
            pins = {name: ratio >= 1 for name, ratio in ratios.items() if ratio is not None}
            self.sprint = SprintCache(own["keep_ratio"], own["warmup"], own.get("alpha", 0.5), **pins)
        text = llada2_sampler(self.vocabulary, self.block, steps, threshold)
        if own.get("remasking") == "neg_entropy":
            text = replace_text(text, confidence="entropy")
        self.layout = LLaDA2UniLayout(
            self.vocabulary,
            lambda text: self.ids["question" if self.kind == "answer" else "prompt"],
            {**marks, **sides},
            *(self.ids["system"], self.ids["system"], self.ids["assistant"]),
            image=uni_image_sampler(self.block, steps, own.get("cfg_scale", 1.0), **rescale),
            edits=uni_image_sampler(self.block, steps, own.get("cfg_text", 1.0), own.get("cfg_image"), **rescale),
            text=text,
            compat=compat,
            sprint=self.sprint,
        )
        picture = self.stored["prompt"].long()
        picture = picture[picture >= self.vocabulary.image[0]] - self.vocabulary.image[0]
        codes = picture.view(1, height, width) if len(picture) else None
        inputs = TaskInputs(1, ["words"], codes=codes, grid=self.grid, longest=count)
        task = {"draw": "text_to_image", "edit": "edit", "answer": "answer"}[self.kind]
        asked = self.layout.request(task, inputs)
        pipe = SimpleNamespace(transformer=self.model)
        self.made: Prepared = self.layout.prepared(pipe, asked, asked.needs.keep_in(asked.config), SEEDS)

    def decode(self, policy: Any) -> SamplerOutput:
        vocabulary = self.made.vocabulary or self.vocabulary
        sampler = Sampler(self.made.model, vocabulary, self.made.config, policy)
        others = self.made.request.unconditional or None
        return sampler(self.made.request.batch, SEEDS, record=True, unconditional=others)


def replace_text(config: Any, **changes: Any) -> Any:
    from dataclasses import replace

    return replace(config, text=replace(config.text, **changes))


def known(rows: TokenBatch) -> Tensor:
    """The prompt of the only row."""
    return rows.ids[0][(rows.valid & rows.given)[0]]


@pytest.fixture
def guided(monkeypatch) -> Iterator[list[Tensor]]:
    """Logits of every pass as tokens are drawn from them, after guidance, rescaling and restriction."""
    seen: list[Tensor] = []
    original = draw.choose

    def choose(values, is_real, settings, u, noise, blend=None):
        logits = values[0] if blend is None else blend(values)
        seen.append(logits[0][is_real[0]])
        return original(values, is_real, settings, u, noise, blend)

    monkeypatch.setattr(draw, "choose", choose)
    yield seen


@pytest.mark.parametrize(("folder", "name"), case_params())
def test_trace(folder, name, guided):
    """Prompts, logits, and codes or words of every pass; with the exact cache far fewer tokens are computed."""
    case = Case(folder, name)
    stored, request = case.stored, case.made.request
    prompt, sequence = stored["prompt"].long(), stored["sequence"].long()
    assert torch.equal(known(request.batch), prompt)
    own_rows = [stored[key].long() for key in ("uncond_ids", "uncond_text", "uncond_img") if key in stored]
    for rows, ids in zip(request.unconditional, own_rows, strict=False):
        assert torch.equal(known(rows), ids)
    for policy in (case.made.policy,) if case.sprint else (NoCache(), BlockCausalCache()):
        guided.clear()
        out = case.decode(policy)
        assert out.steps == case.about["forwards"] == len(guided)
        assert torch.equal(out.batch.ids[0, : len(sequence)], sequence)
        first, mask = case.vocabulary.image[0], case.vocabulary.mask_id
        for number, (before, after) in enumerate(pairwise(out.trajectory)):
            start = int(stored["block"][number]) * case.block
            assert int(stored["window"][number]) == start + case.block
            place = slice(start, start + case.block)
            written = stored["written"][number].bool()
            x0 = stored["x0"][number].long()
            fill = after[0, place] != torch.where(written, x0, before[0, place])  # behind an end of text, at last
            ended = case.kind == "answer" and number + 1 == out.steps
            assert not bool(fill.any()) or (ended and bool((after[0, place][fill] == case.ids["eos_token_id"]).all()))
            assert ended or int((before != after).sum()) <= int(written.sum())
            theirs = stored["logits" if case.kind == "answer" else "logits_image"][number]
            open_ones = before[0, place] == mask
            torch.testing.assert_close(guided[number], theirs[open_ones], atol=1e-3, rtol=0)
        assert first > mask
        if case.sprint:
            assert out.stats.model_tokens == case.about["token_forwards"]
        elif isinstance(policy, BlockCausalCache):
            assert 1.5 * out.stats.model_tokens < case.about["token_forwards"]
    steps = [int((stored["block"][:n] == stored["block"][n]).sum()) for n in range(len(guided))]
    assert stored["step"].tolist() == steps
    pruned = [step >= case.sprint.warmup if case.sprint else False for step in steps]
    assert stored["cached"].bool().tolist() == pruned


@pytest.mark.parametrize(
    ("folder", "name"), [p for p in case_params() if "sprint" in str(p.values[1])] or case_params()
)
def test_sprint_keeps_the_recorded_positions(folder, name, monkeypatch):
    """In every layer of every stream."""
    case, kept = Case(folder, name), {}
    original = SprintCache.keep

    def keep(self, stream, ids, store, head):
        original(self, stream, ids, store, head)
        if bool(self._due[stream].any()):
            kept.setdefault(int(store.passes[0]) - 1, []).append((stream, self.keys_seen(stream).keys[:, 0]))

    monkeypatch.setattr(SprintCache, "keep", keep)
    case.decode(case.made.policy)
    names = {key for key in case.stored if key.startswith("kept.")}
    found = set()
    for number, streams in kept.items():
        start = int(case.stored["block"][number]) * case.block
        layers = [keys[:start].nonzero()[:, 0] for _, own in sorted(streams, key=lambda s: s[0]) for keys in own]
        for place, positions in enumerate(layers):
            found.add(f"kept.{number}.{place}")
            assert torch.equal(positions, case.stored[f"kept.{number}.{place}"].long())
    assert found == names and names


@pytest.mark.parametrize(("folder", "name"), [p for p in case_params() if "sprint" not in str(p.values[1])])
def test_without_compat_pictures_are_the_same_and_answers_are_words(folder, name):
    case = Case(folder, name, None)
    out, sequence = case.decode(BlockCausalCache()), case.stored["sequence"].long()
    if case.kind != "answer":
        assert torch.equal(out.batch.ids[0, : len(sequence)], sequence)
        return
    answer = out.batch.ids[0, len(case.stored["prompt"]) :]
    assert bool((answer < case.vocabulary.image[0]).all()) and not bool((answer == case.vocabulary.mask_id).any())
    wrote = sequence[len(case.stored["prompt"]) :]
    assert bool((wrote >= case.vocabulary.image[0]).any())  # upstream answered in image codes
