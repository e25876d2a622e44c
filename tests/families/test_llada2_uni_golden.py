"""The network of LLaDA2.0-Uni against recorded runs: forward, the cache of finished blocks, pictures and answers.

Not compared yet: image tokenizer, pixel decoder, guided logits that are rescaled, editing, and Sprint.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from golden import golden_cases
from reference import llada2_decoding as reference
from reference.batches import llada_batch
from safetensors.torch import load_file
from torch import Tensor

from unidiff.decoding import Guidance, ModalityDecoding, Sampler, SamplerConfig
from unidiff.decoding.cache import BlockCausalCache, NoCache
from unidiff.families.llada2 import LLADA2, llada2_settings
from unidiff.models.denoiser import CachePlan
from unidiff.models.experts import recorded_routings
from unidiff.models.transformer import MaskedTransformer
from unidiff.tokens import Modality, TokenBatch, Vocabulary
from unidiff.weights.files import build_on_meta

pytestmark = pytest.mark.golden
CLOSE = dict(atol=1e-4, rtol=0.0)
FOLDERS = golden_cases("llada2_uni", having="forward.safetensors")


def settings_of(folder: Path) -> dict:
    config = json.loads((folder / "config.json").read_text())
    ids = {name: config["token_ids"][name] for name in ("mask_token_id", "eos_token_id")}
    return {**config["model"], **ids, "block_length": config["block_length"]}


@lru_cache(maxsize=1)
def load(folder: Path) -> tuple[MaskedTransformer, Vocabulary]:
    return LLADA2.load(load_file(folder / "weights.safetensors"), settings_of(folder))


@pytest.mark.parametrize("folder", FOLDERS)
def test_image_codes_stand_behind_the_words(folder):
    ids, vocabulary = json.loads((folder / "config.json").read_text())["token_ids"], load(folder)[1]
    assert vocabulary.image == (ids["image_token_offset"], ids["image_token_offset"] + ids["codebook_size"])
    assert vocabulary.mask_id == vocabulary.image_mask == ids["mask_token_id"]
    assert LLADA2.fits(settings_of(folder))
    with pytest.raises(ValueError, match="image_token_offset = 200 of 160 ids"):
        LLADA2.vocabulary({**settings_of(folder), "image_token_offset": 200})


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


def canvas(prompt: Tensor, codes: int, vocabulary: Vocabulary, block: int, shift: int = 0) -> TokenBatch:
    """A row of a prompt and hidden codes up to the end of a block, behind `shift` positions of padding. Rotary only knows how far
    apart tokens are, so positions that begin later say where blocks begin, and nothing else."""
    length = shift + len(prompt) + codes
    length += -length % block
    place = torch.arange(length)[None]
    ids = torch.full((1, length), vocabulary.mask_id)
    ids[0, shift : shift + len(prompt)] = prompt
    known = place < shift + len(prompt)
    batch = llada_batch(ids, known, (place >= shift) if shift else None)
    positions = place[..., None].expand(1, length, 3).clone()
    return batch.replace(modality=torch.where(known, Modality.TEXT, Modality.IMAGE), positions=positions)


def drawing(steps: int, threshold: float, block: int) -> ModalityDecoding:
    return ModalityDecoding(
        rule="at_least",
        threshold=threshold,
        temperature=0.0,
        block_length=block,
        block_order="aligned",
        block_steps=steps,
    )


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("name", ["t2i_nocfg", "t2i_cfg_norescale"])
@pytest.mark.parametrize("policy", [NoCache(), BlockCausalCache()])
def test_a_picture(folder, name, policy):
    """The sampler decodes it code by code as recorded; with the exact cache, one of each stream, it computes far fewer tokens."""
    model, vocabulary = load(folder)
    stored = load_file(folder / f"trace_{name}.safetensors")
    case = json.loads((folder / "config.json").read_text())["traces"][name]
    prompt, sequence, settings = stored["prompt"].long(), stored["sequence"].long(), case["settings"]
    codes, other = len(sequence) - len(prompt), None
    batch = canvas(prompt, codes, vocabulary, 8)
    if "cfg_scale" in settings:
        nothing = stored["uncond_ids"].long()
        other = canvas(nothing, codes, vocabulary, 8, len(prompt) - len(nothing))
    guidance = Guidance(settings.get("cfg_scale", 1.0))
    config = SamplerConfig(image=drawing(settings["steps"], settings["threshold"], 8), guidance=guidance)
    out = Sampler(model, vocabulary, config, policy)(batch, torch.zeros(1).long(), record=True, unconditional=other)
    assert torch.equal(out.batch.ids[0, : len(sequence)], sequence)
    assert out.steps == case["forwards"]
    for number, (before, after) in enumerate(zip(out.trajectory, out.trajectory[1:], strict=False)):
        start = int(stored["block"][number]) * 8
        changed = (before != after)[0]
        written = stored["written"][number].bool()
        assert torch.equal(changed[start : start + 8], written) and int(changed.sum()) == int(written.sum())
        assert torch.equal(after[0, start : start + 8][written], stored["x0"][number].long()[written])
    if isinstance(policy, BlockCausalCache):
        assert 1.9 * out.stats.model_tokens < case["token_forwards"]


def test_tokens_of_a_large_picture():
    """1,024 px are 32 x 32 codes: in blocks of 32 and 8 passes each, guided, behind 192 words. Counted on a network of one tiny
    layer, which has as many positions to compute as a large one."""
    torch.manual_seed(0)
    shape = dict(hidden_size=8, num_layers=1, num_heads=1, rope="1d", modality_embedding=False)
    vocabulary = Vocabulary(24, (0, 8), (8, 24), 7)
    model = MaskedTransformer(vocabulary.size, **shape, attention="block_causal", block_length=32).eval()
    torch.nn.init.normal_(model.output_weight)
    batch, other = (
        canvas(torch.arange(192) % 6, 1024, vocabulary, 32),
        canvas(torch.arange(6), 1024, vocabulary, 32, 186),
    )
    config = SamplerConfig(image=drawing(8, 1.0, 32), guidance=Guidance(2.0))
    out = Sampler(model, vocabulary, config, BlockCausalCache())(batch, torch.zeros(1).long(), unconditional=other)
    assert out.steps == 32 * 8
    baseline = 2 * sum(
        8 * window for window in range(224, 1217, 32)
    )  # every pass: both streams, up to the end of the block
    print(
        f"{out.stats.model_tokens} token-forwards, the baseline {baseline}: {baseline / out.stats.model_tokens:.1f} times"
    )
    assert baseline > 18.5 * out.stats.model_tokens


@pytest.mark.parametrize("folder", FOLDERS)
@torch.no_grad()
def test_an_answer_about_a_picture(folder):
    """By upstream's loop written anew, since there a word may be an image code."""
    model, vocabulary = load(folder)
    stored = load_file(folder / "trace_understand.safetensors")
    settings = json.loads((folder / "config.json").read_text())["traces"]["understand"]["settings"]
    logits: list[Tensor] = []

    def forward(ids: Tensor) -> Tensor:
        logits.append(model(llada_batch(ids))[0, -8:])
        return model(llada_batch(ids))

    asked = {"block_length": 8, **settings}
    eos = vocabulary.specials["eos"]
    trace = reference.generate(forward, stored["prompt"].long(), asked, vocabulary.mask_id, eos, False)
    sequence = stored["sequence"].long()
    assert torch.equal(trace.canvas[: len(sequence)], sequence)
    assert trace.block == stored["block"].tolist() and trace.step == stored["step"].tolist()
    written = torch.stack(trace.written)
    assert torch.equal(written, stored["written"].bool())
    assert torch.equal(torch.stack(trace.x0)[written], stored["x0"].long()[written])
    torch.testing.assert_close(torch.stack(logits), stored["logits"], atol=1e-3, rtol=0)
