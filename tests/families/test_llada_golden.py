"""LLaDA and Fast-dLLM against recorded runs: forward, caches, decoding traces, likelihood, losses, sampling units."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from golden import absent_set, golden_folders
from reference import llada_decoding as reference
from reference.batches import llada_batch
from reference.llada_decoding import LladaCompat, LladaSettings
from safetensors.torch import load_file
from torch import Tensor

from unidiff.decoding.commit.base import quota
from unidiff.families.llada import LLADA
from unidiff.models.denoiser import CachePlan
from unidiff.models.store import StoreOptions
from unidiff.models.transformer import MaskedTransformer
from unidiff.tokens import Vocabulary

pytestmark = pytest.mark.golden
LOGITS = dict(atol=2e-4, rtol=0.0)
HIDDEN = dict(atol=5e-5, rtol=0.0)
INPUTS = {
    "forward": {
        "input_ids",
        "cache.fill_input_ids",
        "padded.input_ids",
        "padded.attention_mask",
        "step1_input_ids",
        "step2_input_ids",
    },
    "likelihood": {
        "prompt",
        "answer",
        "noisy",
        "pretrain.input_ids",
        "pretrain.noisy",
        "pretrain.p_mask",
        "sft.input_ids",
        "sft.noisy",
        "sft.p_mask",
        "sft.prompt_lengths",
    },
    "sampling": {"gumbel.uniform", "gumbel.logits", "select.logits", "select.k", "select.tokens", "select.mask"},
}
# not compared, with the reason
REASONS = {"padded.logits_mask_ignored": "a defect: the Fast-dLLM model ignores the padding mask it is given"}

FOLDERS = [f for f in golden_folders("llada") if (f / "weights.safetensors").is_file()]


def read_config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def case_params() -> list:
    found = [pytest.param(f, name, id=f"{f.name}-{name}") for f in FOLDERS for name in read_config(f)["cases"]]
    return found or [absent_set("llada", "")]


@lru_cache(maxsize=1)
def load(folder: Path) -> tuple[MaskedTransformer, Vocabulary]:
    config = read_config(folder)
    named = {k: v for k, v in config.items() if k.endswith("_token_id")}
    return LLADA.load(load_file(folder / "weights.safetensors"), {**config["model"], **named})


@lru_cache(maxsize=1)
def traces(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "traces.safetensors")


class Stored:
    """Tensors of a file; `finish` says what nobody looked at."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.kind, self.tensors = kind, load_file(folder / f"{kind}.safetensors")
        self.compared: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        value = self.tensors[name]
        return value.long() if value.dtype == torch.int32 else value

    def close(self, name: str, actual: Tensor, **tolerance) -> None:
        self.compared.add(name)
        torch.testing.assert_close(actual, self.tensors[name], **tolerance, msg=lambda m: f"{name}: {m}")

    def equal(self, name: str, actual: Tensor) -> None:
        self.compared.add(name)
        assert torch.equal(actual.to(self.tensors[name].dtype), self.tensors[name]), name

    def finish(self) -> None:
        rest = set(self.tensors) - self.compared - INPUTS[self.kind] - set(REASONS)
        assert not rest, f"stored tensors that nothing compares: {sorted(rest)}"


@pytest.fixture(params=[pytest.param(f, id=f.name) for f in FOLDERS] or [absent_set("llada")])
def folder(request) -> Path:
    return request.param


def test_every_weight_maps_both_ways(folder):
    weights = load_file(folder / "weights.safetensors")
    for prefix in ("", "module.", "_orig_mod.module."):
        model, _ = LLADA.load({prefix + name: value for name, value in weights.items()}, read_config(folder)["model"])
        back = LLADA.export(model)
        assert set(back) == set(weights) and all(torch.equal(back[name], value) for name, value in weights.items())


@torch.no_grad()
def test_forward(folder):
    model, _ = load(folder)
    stored = Stored(folder, "forward")
    hidden = []
    hooks = [b.register_forward_pre_hook(lambda _m, args: hidden.append(args[0])) for b in model.blocks]
    hooks.append(model.final_norm.register_forward_hook(lambda _m, _a, output: hidden.append(output)))
    stored.close("logits", model(llada_batch(stored["input_ids"])), **LOGITS)
    for hook in hooks:
        hook.remove()
    stored.close("hidden_states", torch.stack(hidden), **HIDDEN)
    seen = stored["padded.attention_mask"].bool()
    padded = model(llada_batch(stored["padded.input_ids"], attended=seen))
    stored.compared.add("padded.logits")
    torch.testing.assert_close(padded[seen], stored["padded.logits"][seen], **LOGITS)
    for row, kept in enumerate(seen):  # exact: the padded row equals the row without padding
        alone = model(llada_batch(stored["padded.input_ids"][row : row + 1, kept]))
        torch.testing.assert_close(padded[row, kept], alone[0], atol=2e-5, rtol=1e-5)
    caches(folder, model, stored)
    stored.finish()


def caches(folder: Path, model: MaskedTransformer, stored: Stored) -> None:
    """The stored cache and both cached passes, with keys before rotary as upstream and after rotary."""
    where = read_config(folder)["forward"]
    start, stop = where["cache_block_start"], where["cache_block_end"]
    ids = stored["cache.fill_input_ids"]
    place = torch.arange(ids.shape[1])
    inside = ((place >= start) & (place < stop)).expand(ids.shape)
    assert torch.equal(inside, stored["dual.replace_position"])
    stored.compared.add("dual.replace_position")
    regions = {"prefix": (place >= start).expand(ids.shape), "dual": inside}
    for rotated in (False, True):
        for name, query in regions.items():
            store = model.make_store(llada_batch(ids), StoreOptions(rotated=rotated))
            stored.close("cache.fill_logits", model.head(model.partial(ids, CachePlan(), store).hidden), **LOGITS)
            for layer in range(len(model.blocks)):
                value = store.values(layer)
                stored.close(f"cache.layers.{layer}.value", value, **HIDDEN)
                if not rotated:
                    stored.close(f"cache.layers.{layer}.key", store.keys(layer), **HIDDEN)
            steps = sorted(n for n in stored.tensors if n.startswith(f"{name}.step") and n.endswith("_logits"))
            for step in steps:
                number = step.removeprefix(f"{name}.step").removesuffix("_logits")
                out = model.partial(stored[f"step{number}_input_ids"], CachePlan(query, full=False), store)
                stored.close(step, model.head(out.hidden), **LOGITS)
            if name == "dual" and not rotated:
                prefix = f"dual.key_after_step{len(steps)}.layer_"
                for key in [n for n in stored.tensors if n.startswith(prefix)]:
                    stored.close(key, store.keys(int(key.removeprefix(prefix))), **HIDDEN)


def settings_of(case: dict, config: dict) -> LladaSettings:
    eos, eot = config["model"]["eos_token_id"], config["eot_token_id"]
    return LladaSettings(
        steps=case["steps"],
        gen_length=case["gen_length"],
        block_length=case["block_length"],
        rule=case["selection"],
        threshold=case.get("threshold", 0.0),
        factor=case.get("factor", 0.0),
        cache={"generate": "none", "generate_with_prefix_cache": "prefix", "generate_with_dual_cache": "dual"}[
            case["entry_point"]
        ],
        cfg_scale=case.get("cfg_scale", 0.0),
        random_order=case.get("remasking") == "random",
        no_proposal=(eos,) if case.get("logits_eos_inf") else (),
        no_confidence=(eos, eot) if case.get("confidence_eos_eot_inf") else (),
    )


def test_every_stored_trace_is_a_case(folder):
    assert {name.partition(".")[0] for name in traces(folder)} == set(read_config(folder)["cases"])


@pytest.mark.parametrize(("folder", "name"), case_params())
def test_trace(folder, name):
    """Ids after every pass, which positions each pass was fed, and the logits of one pass."""
    config = read_config(folder)
    case = config["cases"][name]
    model, vocabulary = load(folder)
    vocabulary = replace(vocabulary, mask_id=case["mask_id"])  # an argument of the programs
    tensors = {k.partition(".")[2]: v for k, v in traces(folder).items() if k.partition(".")[0] == name}
    settings = settings_of(case, config)
    streams = range(2 if settings.cfg_scale else 1)
    middle: list[Tensor] = []

    def keep(number, forward):
        if number == case.get("mid_pass"):
            start, stop = case["forward_range"][number]
            middle.append(model.head(torch.cat([forward.features(s)[:, start:stop] for s in streams])))

    trace = reference.generate(
        model,
        vocabulary,
        tensors.pop("prompt").long(),
        settings,
        LladaCompat.of(case["codebase"], settings.cache),
        tensors.pop("uniforms", None),
        keep,
    )
    assert torch.equal(torch.stack(trace.ids).int(), tensors.pop("trace"))
    assert len(trace.fed) == case["forward_passes"]
    assert [list(fed) for fed in trace.fed] == case["forward_range"]
    kinds = {"full": (0, trace.ids[0].shape[1])}
    length, blocks = case["prompt_length"], case["gen_length"] // case["block_length"]
    for kind, fed in zip(case["forward_kind"], trace.fed, strict=True):
        starts = [length + i * case["block_length"] for i in range(blocks)]
        allowed = {
            "suffix": [(s, length + case["gen_length"]) for s in starts],
            "block": [(s, s + case["block_length"]) for s in starts],
        }
        assert fed == kinds["full"] if kind == "full" else fed in allowed[kind]
    assert [int((a != b).sum()) for a, b in pairwise(trace.ids)] == case["tokens_per_pass"]
    if "forward_passes_june_2025" in case:  # then, cached blocks that were complete after their first pass got a second
        edges = [i for i, (start, _) in enumerate(trace.fed) if start == 0] + [len(trace.fed)]
        single = sum(b - a == 1 for a, b in pairwise(edges)) if settings.cache != "none" else 0
        assert case["forward_passes_june_2025"] == len(trace.fed) + single
    if middle:
        torch.testing.assert_close(middle[0], tensors.pop("mid_logits"), **LOGITS)
    assert not tensors, f"stored tensors that nothing compares: {sorted(tensors)}"


@torch.no_grad()
def test_likelihood(folder):
    config = read_config(folder)
    model, vocabulary = load(folder)
    stored, mask_id = Stored(folder, "likelihood"), vocabulary.mask_id
    prompt, answer, noisy = stored["prompt"], stored["answer"], stored["noisy"]
    x0 = torch.cat((prompt, answer)).expand(noisy.shape[1:])
    ratio = (noisy == mask_id).sum(-1) / len(answer)
    stored.close("mask_ratio", ratio.float(), rtol=1e-6, atol=0.0)
    for tag, run in [(k, v) for k, v in config["likelihood"].items() if isinstance(v, dict)]:
        losses = []
        for copies, share in zip(noisy, ratio, strict=True):
            nll = reference.masked_nll(model, copies, x0, mask_id, len(prompt), run["cfg_scale"])
            losses.append(reference.answer_nll(nll, share))
        stored.close(f"{tag}.batch_loss", torch.stack(losses), rtol=1e-5, atol=0.0)
        assert -float(torch.stack(losses).mean()) == pytest.approx(run["log_likelihood"], rel=1e-5)
    nll = reference.masked_nll(model, stored["pretrain.noisy"], stored["pretrain.input_ids"], mask_id)
    loss = reference.pretraining_loss(nll, stored["pretrain.p_mask"])
    stored.close("pretrain.loss", loss[None], rtol=1e-5, atol=0.0)
    assert float(loss) == pytest.approx(config["likelihood"]["pretrain_loss"], rel=1e-5)
    nll = reference.masked_nll(model, stored["sft.noisy"], stored["sft.input_ids"], mask_id)
    loss = reference.finetuning_loss(nll, stored["sft.p_mask"], stored["sft.prompt_lengths"])
    stored.close("sft.loss", loss[None], rtol=1e-5, atol=0.0)
    assert float(loss) == pytest.approx(config["likelihood"]["sft_loss"], rel=1e-5)
    stored.finish()


def test_sampling_units(folder):
    stored = Stored(folder, "sampling")
    for name in [n for n in stored.tensors if n.startswith("gumbel.argmax.")]:
        value = name.removeprefix("gumbel.argmax.")
        scores = reference.gumbel_scores(stored["gumbel.logits"], stored["gumbel.uniform"], float(value))
        stored.equal(name, scores.argmax(-1))
        stored.close(f"gumbel.max_score.{value}", scores.amax(-1), rtol=1e-9, atol=0.0)
    for row in stored["num_transfer"]:  # masked tokens, steps, quota of each step
        masked, steps = int(row[0]), int(row[1])
        left, made = torch.tensor([masked]), []
        for step in range(steps):
            made.append(int(quota("fixed", torch.tensor([masked]), left, torch.tensor([step]), torch.tensor([steps]))))
            left = left - made[-1]
        assert made == row[2 : 2 + steps].tolist() and (row[2 + steps :] == -1).all()
    stored.compared.add("num_transfer")
    logits, mask, k = stored["select.logits"], stored["select.mask"], stored["select.k"]
    proposal, confidence = reference.propose(logits)
    stored.equal("select.proposal", torch.where(mask, proposal, stored["select.tokens"]))
    for name in [n for n in stored.tensors if n.startswith(("select.topk", "select.threshold.", "select.factor."))]:
        rule, _, value = name.removeprefix("select.").partition(".")
        settings = LladaSettings(rule=rule, **({rule: float(value)} if value else {}))
        stored.equal(name, reference.select(confidence, mask, k, settings, LladaCompat()))
    stored.finish()
