"""LLaDA-V against recorded runs: tiles, tower, packing, forward, and its decoding with and without its cache."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import absent_set, golden_cases, golden_folders
from PIL import Image
from reference import llada_v_decoding as reference
from released_parts import llada_v_config
from safetensors.torch import load_file
from torch import Tensor

from unidiff.decoding import Sampler
from unidiff.decoding.cache import AdaptiveCache, NoCache
from unidiff.families.layout import DecodeRequest, TaskInputs
from unidiff.families.llada_v import LLADA_V, llada_v_settings
from unidiff.families.llada_v.network import VisionLanguageTransformer
from unidiff.families.llada_v.rows import LLADA_V_CHAT, PICTURE, LladaVLayout, llada_v_sampler
from unidiff.families.llada_v.tiles import Tiling
from unidiff.models.denoiser import CachePlan
from unidiff.models.store import StoreOptions
from unidiff.tokens import Span, TokenBatch, Vocabulary

pytestmark = pytest.mark.golden
CLOSE = dict(atol=1e-4, rtol=0.0)
LOGITS = dict(atol=2e-4, rtol=0.0)
FOLDERS = golden_cases("llada_v", having="weights.safetensors")


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def upstream(folder: Path) -> dict[str, Any]:
    return llada_v_config(read_config(folder))


@lru_cache(maxsize=1)
def load(folder: Path) -> tuple[VisionLanguageTransformer, Vocabulary]:
    return LLADA_V.load(load_file(folder / "weights.safetensors"), upstream(folder))


@lru_cache(maxsize=4)
def pictures(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "images.safetensors")


def picture(folder: Path, number: int) -> Image.Image:
    return Image.fromarray(pictures(folder)[f"image_{number}.rgb"].numpy())


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_weight_maps_both_ways(folder):
    weights = load_file(folder / "weights.safetensors")
    model, vocabulary = load(folder)
    back = LLADA_V.export(model)
    assert set(back) == set(weights) and all(torch.equal(back[name], value) for name, value in weights.items())
    assert vocabulary.mask_id == read_config(folder)["tokens"]["mask"]
    assert llada_v_settings(upstream(folder)) == {k: model.config[k] for k in llada_v_settings(upstream(folder))}


def assert_resized(ours: Tensor, theirs: Tensor) -> None:
    """Equal but for rounding: Pillow 13 may resize rows before columns, others columns first, and each way rounds twice."""
    off = (ours.int() - theirs.int()).abs()
    assert ours.shape == theirs.shape and int(off.max()) <= 2 and float(off.float().mean()) < 0.3


@pytest.mark.parametrize("folder", FOLDERS)
@torch.no_grad()
def test_pictures(folder):
    """Tiles from pixels, and features from the stored tiles; one picture in every step."""
    model, _ = load(folder)
    stored, config = pictures(folder), read_config(folder)
    tiling = model.settings.tiling
    for number, about in enumerate(config["images"]):
        shown = picture(folder, number)
        assert list(shown.size) == about["image_wh"] and list(tiling.grid(*shown.size)) == about["grid_hw"]
        tiles, theirs = tiling.tiles(shown), stored[f"image_{number}.tiles_uint8"]
        assert len(tiles) == about["tiles"]
        assert_resized(tiles, theirs)
        features = torch.cat([grid.flatten(0, 1) for grid in model.seen(theirs, shown.size)])
        assert len(features) == about["feature_tokens"]
        torch.testing.assert_close(features, stored[f"image_{number}.features"], **CLOSE)
    steps = sorted({name.partition(".")[0] for name in list(stored) if name.endswith(".tower_output")})
    for name in steps:
        pixels = (stored[f"{name}.tiles_uint8"].float() / 255 - 0.5) / 0.5
        torch.testing.assert_close(pixels, stored[f"{name}.pixel_values"], atol=1e-6, rtol=0)
        tower = model.tower(pixels)
        torch.testing.assert_close(tower, stored[f"{name}.tower_output"], **CLOSE)
        torch.testing.assert_close(model.projector(tower), stored[f"{name}.projected_tiles"], **CLOSE)
    squares = sorted({name.partition(".")[0] for name in list(stored) if name.startswith("pad_")})
    assert steps and squares
    for name in squares:
        number, theirs = int(name.removeprefix("pad_")), stored[f"{name}.tiles_uint8"]
        ours = tiling.square(picture(folder, number))
        assert_resized(ours, theirs)
        features = torch.cat([grid.flatten(0, 1) for grid in model.seen(theirs, None)])
        torch.testing.assert_close(features, stored[f"{name}.features"], **CLOSE)


@pytest.mark.parametrize("folder", FOLDERS)
def test_released_geometry(folder):
    """Sizes of the released model, without its weights."""
    config = read_config(folder)
    vision, mm = config["released_reference"]["vision"], config["released_reference"]["mm"]
    most, largest = (
        int(mm["image_aspect_ratio"].rpartition("_")[2]),
        int(mm["image_grid_pinpoints"].rpartition("x")[2][:-1]),
    )
    tiling = Tiling(vision["image_size"], vision["tokens_per_side"], largest, most)
    for about in config["released_geometry"]:
        width, height = about["image_wh"]
        rows, columns = tiling.grid(width, height)
        assert [rows, columns] == about["grid_hw"]
        kept = tiling.joined(torch.zeros(rows * columns, tiling.patches**2, 1), width, height)
        assert list(kept.shape[:2]) == about["reduced_hw"]
        assert tiling.patches**2 + kept.shape[0] * (kept.shape[1] + 1) == about["feature_tokens"]
        whole = Tiling(vision["image_size"], vision["tokens_per_side"], largest)
        assert (
            list(whole.joined(torch.zeros(rows * columns, tiling.patches**2, 1), width, height).shape[:2])
            == about["unpadded_hw"]
        )


@pytest.fixture
def stored_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiles of the set in place of those that this Pillow makes, see `assert_resized`."""

    def tiles(self: Tiling, shown: Image.Image) -> Tensor:
        for folder in golden_folders("llada_v"):
            own = pictures(folder)
            for name in [n for n in list(own) if n.endswith(".rgb")]:
                if own[name].numpy().tobytes() == shown.tobytes() and own[name].shape[1] == shown.width:
                    return own[name.replace("rgb", "tiles_uint8")]
        raise AssertionError("no picture of the set")

    monkeypatch.setattr(Tiling, "tiles", tiles)


def layout_of(folder: Path, **more: Any) -> LladaVLayout:
    model, vocabulary = load(folder)
    config, tokens = llada_v_sampler(vocabulary), read_config(folder)["tokens"]
    more["template"] = replace(LLADA_V_CHAT, marks={name: tokens[name] for name in LLADA_V_CHAT.marks})
    return LladaVLayout(vocabulary, lambda text: [], config, family="llada-v", network=model, paced=True, **more)


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.usefixtures("stored_tiles")
@torch.no_grad()
def test_forward(folder):
    model, _ = load(folder)
    stored = load_file(folder / "forward.safetensors")
    shown = [picture(folder, int(n)) for n in stored["images_used"]]
    spans = layout_of(folder, squares=False).prompt(stored["prompt_ids"].tolist(), shown)
    batch = TokenBatch.from_spans([spans])
    embedded = model.embed(batch.ids, batch.modality, None, batch.features)
    torch.testing.assert_close(embedded, stored["inputs_embeds"], **CLOSE)
    torch.testing.assert_close(model(batch), stored["logits"], **CLOSE)
    text = TokenBatch.from_spans([[Span.text(row, True)] for row in stored["text_only_ids"]])
    torch.testing.assert_close(model(text), stored["text_only_logits"], **CLOSE)


def case_params() -> list:
    folders = [f for f in golden_folders("llada_v") if (f / "weights.safetensors").is_file()]
    found = [pytest.param(f, name, id=f"{f.name}-{name}") for f in folders for name in read_config(f)["cases"]]
    return found or [absent_set("llada_v", "")]


def row_of(folder: Path, name: str, stored: dict[str, Tensor]) -> tuple[dict, list[Span], list[Span]]:
    """The case, and the spans of its prompt, and of what is decoded behind it."""
    case, (_, vocabulary) = read_config(folder)["cases"][name], load(folder)
    numbers = [] if case["image"] is None else case["image"] if isinstance(case["image"], list) else [case["image"]]
    squares = case.get("aspect") == "pad"
    prompt = layout_of(folder, squares=squares).prompt(
        stored["prompt_ids"].tolist(), [picture(folder, n) for n in numbers]
    )
    assert sum(span.size for span in prompt) == case["prompt_positions"]
    assert stored["prompt_ids"].tolist().count(PICTURE) == len(numbers)
    hidden = [Span.words([None] * case["gen_length"], vocabulary, read=True)]
    if "suffix" in case:
        hidden.append(Span.text(stored["suffix_ids"], True))
    return case, prompt, hidden


class Network:
    """Logits of the generated part as upstream computes them, with its cache where the case has one."""

    def __init__(self, folder: Path, case: dict, prompt: list[Span], hidden: list[Span]) -> None:
        self.model, self.vocabulary = load(folder)
        self.batch, self.case = TokenBatch.from_spans([[*prompt, *hidden]]), case
        self.start, self.cache, self.number = case["prompt_positions"], case.get("cache"), 0
        if self.cache:
            self.policy = policy_of(case)
            self.store = self.model.make_store(self.batch, StoreOptions(rotated=False, outputs=True))

    def __call__(self, ids: Tensor) -> Tensor:
        full = torch.cat([self.batch.ids[:, : self.start], ids[None]], 1)
        if self.cache:
            return self._cached(full)
        logits = self._logits(self.batch.replace(ids=full))
        if not self.case["cfg_scale"]:
            return logits
        prompt = torch.arange(full.shape[1])[None] < self.start
        blind = self._logits(self.batch.replace(ids=full).hide(prompt, self.vocabulary))
        return blind + (self.case["cfg_scale"] + 1) * (logits - blind)

    def _logits(self, batch: TokenBatch) -> Tensor:
        return self.model(batch)[0, self.start :]

    def _cached(self, ids: Tensor) -> Tensor:
        prompt = torch.arange(ids.shape[1])[None] < self.start
        whole = self.number % self.cache["gen_interval_steps"] == 0
        query = prompt & (self.number % self.cache["prompt_interval_steps"] == 0) | (~prompt & whole)
        verify = None if whole or not self.cache["transfer_ratio"] else ~prompt
        plan = CachePlan(query, full=False, verify=verify)
        self.model.partial(ids, plan, self.store, select=self._select)
        self.number += 1
        # of a pass that computes nothing, the library keeps the last features; upstream adds what it kept to the new tokens
        x = self.model.embed(ids, self.batch.modality, None, self.batch.features)
        for kept in self.store.outputs:  # of both branches of every layer
            x = x + kept[:, :-1]
        return self.model.head(self.model.final_norm(x)[0, self.start :])

    def _select(self, layer: int, similarity: Tensor) -> Tensor:
        """Among values that did not change, upstream takes those that rounding makes least similar."""
        compared = similarity[0, self.start :]
        count = int(self.cache["transfer_ratio"] * len(compared))
        least = compared.topk(count, largest=False).indices + self.start
        return torch.zeros(similarity.shape, dtype=torch.bool).index_fill(1, least, True)


def policy_of(case: dict) -> AdaptiveCache:
    cache = case["cache"]
    intervals = cache["prompt_interval_steps"], cache["gen_interval_steps"]
    return AdaptiveCache(*intervals, cache["transfer_ratio"], full_layers=(), compat="upstream")


@pytest.mark.parametrize(("folder", "name"), case_params())
@pytest.mark.usefixtures("stored_tiles")
@torch.no_grad()
def test_upstreams_loop(folder, name):
    """Written anew with its quirks, it gives every record."""
    stored = dict(load_file(folder / f"trace_{name}.safetensors").items())
    config = read_config(folder)
    case, prompt, hidden = row_of(folder, name, stored)
    noise = stored.get("noise.uniform_float64"), stored.get("noise.remask_uniform")
    network = Network(folder, case, prompt, hidden)
    forbidden = config["forbidden_at_masked"]
    trace = reference.generate(network, case, config["tokens"]["mask"], forbidden, stored.get("suffix_ids"), *noise)
    assert len(trace.logits) == case["passes"]
    for key in ("ids_before", "masked", "candidate", "proposal", "committed", "quota", "block_and_step"):
        assert torch.equal(trace[key].to(stored[key].dtype), stored[key]), key
    torch.testing.assert_close(trace["confidence"], stored["confidence"], **CLOSE)
    assert torch.equal(trace.output.int(), stored["output_ids"])
    for key, ours in (("first_pass_logits", trace.logits[0]), ("last_pass_logits", trace.logits[-1])):
        torch.testing.assert_close(ours, stored[key], **LOGITS)


def quirk(case: dict) -> str | None:
    """What the reference does here that the sampler does not."""
    if any(len(stop) > 1 for stop in case["stop_ids"] or ()):
        return "a stop sequence of several ids"
    if case["remasking"] == "random" or case["temperature"]:
        return "recorded draws"
    if "cache" in case and case["cache"]["transfer_ratio"]:
        return "of values that did not change, rounding names the least similar ones"
    return None


def sampled(folder: Path, names: list[str]) -> tuple[list[dict], DecodeRequest, Any]:
    """Cases with one decoding as rows of one request, and the sampler's answer."""
    model, vocabulary = load(folder)
    stored = [load_file(folder / f"trace_{name}.safetensors") for name in names]
    rows = [row_of(folder, name, own) for name, own in zip(names, stored, strict=True)]
    case, layout = rows[0][0], layout_of(folder, compat="upstream")
    config = llada_v_sampler(vocabulary, case["steps"], case["block_length"], guidance=case["cfg_scale"])
    request = layout.request("chat", TaskInputs(1, turns=[[1]], longest=case["gen_length"]))
    config, ends = request.needs.keep_in(config), tuple(i for (i,) in case["stop_ids"] or ())
    config = replace(config, stop_at_eos=bool(ends), ends=ends)  # upstream stops where it is told to
    batch = TokenBatch.from_spans([[*prompt, *hidden] for _, prompt, hidden in rows], left=True)
    policy = policy_of(case) if "cache" in case else NoCache()
    out = Sampler(model, vocabulary, config, policy)(batch, torch.zeros(len(names), dtype=torch.long), record=True)
    return stored, batch, out


@pytest.mark.parametrize(
    ("folder", "name"),
    [p for p in case_params() if p.values[0] is None or quirk(read_config(p.values[0])["cases"][p.values[1]]) is None],
)
@pytest.mark.usefixtures("stored_tiles")
def test_the_sampler_decodes_the_recorded_runs(folder, name):
    (stored,), _, out = sampled(folder, [name])
    assert out.steps == len(stored["ids_before"])
    length = stored["ids_before"].shape[1]
    for ours, theirs in zip(out.trajectory, stored["ids_before"], strict=False):
        assert torch.equal(ours[0, -length:].int(), theirs)
    answer = out.batch.ids[0, -length:].tolist()
    if stops := read_config(folder)["cases"][name]["stop_ids"]:
        found = [n for n, i in enumerate(answer) if [i] in stops]
        answer = answer[: found[0] if found else None]
    assert answer == stored["output_ids"].tolist()


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.usefixtures("stored_tiles")
def test_rows_of_different_lengths_together(folder):
    """Cases of one decoding and their own pictures, as one batch."""
    cases = read_config(folder)["cases"]
    plain = ("gen_length", "block_length", "steps", "cfg_scale", "remasking", "temperature")
    alike: dict[tuple, list[str]] = {}
    for name, case in cases.items():
        if quirk(case) is None and not case["stop_ids"] and not {"cache", "suffix"} & case.keys():
            alike.setdefault(tuple(case[key] for key in plain), []).append(name)
    groups = [names for names in alike.values() if len({cases[n]["prompt_positions"] for n in names}) > 1]
    assert groups
    for names in groups:
        stored, _, out = sampled(folder, names)
        for row, own in enumerate(stored):
            assert torch.equal(out.batch.ids[row, -own["ids_before"].shape[1] :].int(), own["output_ids"])
