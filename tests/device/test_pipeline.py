"""Every task and option of the pipeline gives the CPU's results on another device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from device_cases import covering, on_both, same_outputs
from pass_tape import TapeRecorder
from tiny_pipeline import tiny_parts
from virtual_device import DEVICE, VirtualTensor, virtual_device

from unidiff.decoding import CacheConfig, Guidance, ModalityDecoding, SamplerConfig, draw
from unidiff.decoding.cache import IntervalCache
from unidiff.decoding.cache.config import CACHES
from unidiff.decoding.config import BLOCK_ORDERS, CONFIDENCES, ORDERS, RULES
from unidiff.diffusion.schedules import SCHEDULES
from unidiff.kernels.fused_draw import FusedDraw
from unidiff.models.transformer import MaskedTransformer
from unidiff.pipeline import UniDiffPipeline
from unidiff.tokens.image.vq import VQImageTokenizer

TASKS = ("text_to_image", "caption", "answer", "inpaint", "generate", "generate from words", "generate from a picture")
CAUSAL = ("block-causal", "sprint")  # for models that attend block after block
SIMPLE = [name for name in CACHES if name not in ("none", *CAUSAL, "vicinity", "adaptive")]
KEPT: dict[str, Any] = {
    "none": None,
    "auto": "auto",
    **{name: name for name in SIMPLE},
    "vicinity": CacheConfig("vicinity", {"warmup": 1, "look_back": 1, "look_ahead": 1}),
    "adaptive": CacheConfig("adaptive", {"prompt_interval": 4, "response_interval": 3, "ratio": 0.4}),
    "drift": CacheConfig("dual", {"drift": 0.3}),
    "segments": CacheConfig("none", {}, {"text": CacheConfig("dual"), "image": CacheConfig("max-logit")}),
    "held guidance": CacheConfig("interval", {"interval": 3}, guidance_interval=3, guidance_warmup=1),
    "policy": IntervalCache(3),
}
UNMASKING: dict[str, dict[str, Any]] = {
    **{rule: {"rule": rule, "threshold": 0.3, "low_threshold": 0.2} for rule in RULES if rule != "ancestral"},
    "ancestral": {"rule": "ancestral"},
    "remdm": {"rule": "ancestral", "remask": "remdm", "remask_cap": 0.4},
    "quota and remasking": {"remask": "confidence", "remask_threshold": 0.5, "remask_budget": 3},
    "threshold and remasking": {
        "rule": "threshold", "threshold": 0.3, "remask": "confidence", "remask_threshold": 0.4, "remask_budget": 2,
    },
}  # fmt: skip
GUIDED = {
    "off": Guidance(1.0),
    "given": Guidance(2.5),
    "other, ramp": Guidance(2.0, mode="ramp", hide="other"),
    "text, window": Guidance(3.0, mode="window", window=(0.2, 0.7), hide="text"),
    "image": Guidance(2.0, hide="image", text_scale=1.0),
}
DRAWN: dict[str, dict[str, Any]] = {
    "best": {"temperature": 0.0},
    "warm": {"temperature": 1.0},
    "cut": {"temperature": 1.0, "top_k": 4, "top_p": 0.8},
    "shuffled": {"temperature": 0.7, "choice_temperature": 1.0},
    **{name: {"confidence": name} for name in CONFIDENCES},
}
BLOCKS: dict[str, dict[str, Any]] = {
    "whole": {},
    "blocks": {"block_length": 4},
    "in flight": {"block_length": 3, "blocks_in_flight": 2, "flight_share": 0.3, "flight_threshold": 0.2},
    **{order: {"block_length": 3, "block_order": order} for order in BLOCK_ORDERS if order != "sequence"},
}
WATCHED = ("nobody", "candidates", "trajectory", "callback", "stopped", "interrupted", "recorded")
OUTPUTS = ("pil", "pt", "np", "codes")
FACTORS: dict[str, tuple[Any, ...]] = {
    "task": TASKS,
    "cache": tuple(KEPT),
    "text": tuple(UNMASKING),
    "image": tuple(UNMASKING),
    "guidance": tuple(GUIDED),
    "drawn": tuple(DRAWN),
    "blocks": tuple(BLOCKS),
    "order": ORDERS,
    "watched": WATCHED,
    "output": OUTPUTS,
}


def settings_of(case: Mapping[str, Any]) -> SamplerConfig:
    """Raises ValueError where they do not go together."""
    common = {"steps": 4, **DRAWN[case["drawn"]]}
    text = BLOCKS["blocks" if "block_order" in BLOCKS[case["blocks"]] else case["blocks"]]
    return SamplerConfig(
        ModalityDecoding(**{**common, **text, **UNMASKING[case["text"]]}),
        ModalityDecoding(**{**common, **BLOCKS[case["blocks"]], **UNMASKING[case["image"]]}),
        GUIDED[case["guidance"]],
        order=case["order"],
    )


def fits(case: Mapping[str, Any]) -> bool:
    try:
        settings_of(case)
    except ValueError:
        return False
    return True


CASES = covering(FACTORS, fits)
PARTS = 16  # of the cases, two of which are always tried
EMBEDDED = (0,)


def tiny() -> UniDiffPipeline:
    """Two layers, so that layers differ."""
    _, image, text, settings = tiny_parts()
    torch.manual_seed(5)
    model = MaskedTransformer(settings.vocabulary.size, hidden_size=16, num_layers=2, num_heads=2, ffn_size=32)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    pipe = UniDiffPipeline(model.eval(), VQImageTokenizer(image), text, settings)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe() -> UniDiffPipeline:
    return tiny()


@pytest.fixture(scope="module")
def emoji() -> UniDiffPipeline:
    pipe = UniDiffPipeline.from_pretrained("emoji")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def inputs_of(task: str, size: tuple[int, int]) -> dict[str, Any]:
    """Two rows that differ."""
    pictures = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(2, *size)
    mask[0, : size[0] // 2], mask[1, :, : size[1] // 2] = 1, 1
    return {
        "text_to_image": {"prompt": ["a dog on a red background", "two cats"]},
        "caption": {"image": pictures},
        "answer": {"image": pictures, "question": ["what is it?", "a dog?"]},
        "inpaint": {"image": pictures, "mask_image": mask.numpy(), "text": ["a <mask:2> dog", "<mask> cats"]},
        "generate": {"num_images_per_prompt": 2},
        "generate from words": {"text": ["a <mask:2> dog", "two <mask>"]},
        "generate from a picture": {"image": pictures},
    }[task]


def call(pipe: UniDiffPipeline, case: Mapping[str, Any], seeds: list[int]) -> tuple[Any, list[Any]]:
    """The result, and what a callback saw."""
    seen: list[Any] = []

    def look(pipe: UniDiffPipeline, step: int, time: float, tensors: Mapping[str, torch.Tensor]) -> bool:
        assert all((x.device == DEVICE) == isinstance(x, VirtualTensor) for x in tensors.values())
        seen.append((step, time, tensors["ids"].tolist(), tensors["open"].tolist()))
        if case["watched"] == "interrupted" and step == 1:
            pipe.interrupt = True
        return not (case["watched"] == "stopped" and step == 0)

    options: dict[str, Any] = {"sampler": settings_of(case), "generator": seeds, "output_type": case["output"]}
    kept = KEPT[case["cache"]]
    options |= {"policy": kept} if isinstance(kept, IntervalCache) else {"cache": kept}
    options |= {"num_candidates": 2} if case["watched"] == "candidates" else {}
    options |= {"record_trajectory": True} if case["watched"] == "trajectory" else {}
    options |= {"callback_on_step_end": look} if case["watched"] in ("callback", "stopped", "interrupted") else {}
    options |= {"graphs": TapeRecorder()} if case["watched"] == "recorded" else {}
    task = case["task"]
    return getattr(pipe, task.partition(" ")[0])(**inputs_of(task, pipe.image_size), **options), seen


def check(pipe: UniDiffPipeline, case: Mapping[str, Any], number: int) -> None:
    seeds = [number, number + (1 << 40)]
    (expected, saw), (found, seen), _ = on_both(pipe, lambda p: call(p, case, seeds))
    try:
        same_outputs(expected, found)
        assert saw == seen
    except AssertionError as error:
        raise AssertionError(f"case {number}: {case}") from error


def test_cases_cover_all_pairs():
    met = {(name, case[name]) for case in CASES for name in FACTORS}
    assert met == {(name, value) for name, values in FACTORS.items() for value in values}
    assert len(CASES) < 250


@pytest.mark.parametrize("part", range(2))
def test_any_two_choices_together(pipe, part):
    for number in range(part, len(CASES), PARTS):
        check(pipe, CASES[number], number)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(2, PARTS))
def test_any_two_choices_together_in_full(pipe, part):
    for number in range(part, len(CASES), PARTS):
        check(pipe, CASES[number], number)


@pytest.mark.parametrize("number", EMBEDDED)
def test_the_embedded_model(emoji, number):
    check(emoji, CASES[number], number)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
def test_the_embedded_model_with_any_two_choices_together(emoji, part):
    for number in range(part, len(CASES), 8):
        check(emoji, CASES[number], number)


@pytest.mark.parametrize("part", range(2))
def test_every_schedule(pipe, part):
    for number, name in enumerate(("fixed", *SCHEDULES)):
        if number % 2 == part:
            plain = ModalityDecoding(steps=3, schedule=name)
            call = lambda p: p.text_to_image("a dog", sampler=SamplerConfig(plain, plain), generator=3)  # noqa: B023, E731
            expected, found, _ = on_both(pipe, call)
            same_outputs(expected, found)


@pytest.mark.parametrize("drawn", ["best", "warm", "shuffled"])
def test_the_fused_draw_is_given_what_is_on_the_device(pipe, monkeypatch, drawn):
    """The kernel is of CUDA: in its place its torch twin, which is handed the same."""
    calls = []

    def twin(values, u, temperature, top_k, confidence, weights, banned):
        assert weights is None  # streams are mixed before the head
        assert all(isinstance(x, VirtualTensor) for x in (values, u, banned) if x is not None)
        settings = ModalityDecoding(temperature=temperature, top_k=top_k, confidence=confidence)
        mixed = values[0]
        if banned is not None:
            mixed = mixed.masked_fill(banned, -torch.inf)
        with monkeypatch.context() as patch:
            patch.setattr(draw, "fuses", lambda *_: False)
            out = draw.choose(mixed[None], torch.ones_like(u, dtype=torch.bool), settings, u, u)
        calls.append(values.shape)
        return FusedDraw(out.token, out.probability, out.confidence, mixed.amax(-1).isfinite())

    def call(p):
        config = SamplerConfig(image=ModalityDecoding(steps=4, **DRAWN[drawn]), guidance=Guidance(2.0))
        return p.text_to_image(["a dog", "two cats"], sampler=config, generator=3)

    monkeypatch.setattr(draw, "fuses", lambda values, settings: isinstance(values, VirtualTensor))
    monkeypatch.setattr(draw, "fused_draw", twin)
    expected, found, _ = on_both(pipe, call)
    same_outputs(expected, found)
    assert len(calls) == 4 and all(shape[1] == 2 for shape in calls)


@pytest.mark.parametrize("places", [{"transformer": "cpu", "image_tokenizer": DEVICE}, {"transformer": DEVICE}])
def test_parts_on_devices_of_their_own(tmp_path, places):
    tiny().save_pretrained(tmp_path)
    picture, mask = torch.rand(3, *tiny().image_size, generator=torch.manual_seed(3)), torch.eye(*tiny().image_size)

    def results(pipe):
        pipe.set_progress_bar_config(disable=True)
        drawn = pipe("a dog", generator=1, output_type="pt", num_candidates=2)
        told = pipe.caption(picture, generator=2)
        filled = pipe.inpaint(picture, mask, "a dog", generator=3, output_type="pt", paste_back=True)
        scores = pipe.score(picture, "a dog", samples=2)
        return drawn.images, told.ids, filled.images, scores.log_prob

    expected = results(tiny())
    with virtual_device():
        pipe = UniDiffPipeline.from_pretrained(tmp_path, device_map=places)
        assert pipe.device == pipe.transformer.device == torch.device(places["transformer"])
        assert pipe.images.device == torch.device(places.get("image_tokenizer", "cpu"))
        found = [value.cpu() for value in results(pipe)]
        with pytest.raises(ValueError, match="device mapping"):
            pipe.to("cpu")
        pipe.reset_device_map()
        assert pipe.images.device == pipe.device == torch.device("cpu")
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other, one)


def test_parts_on_no_devices(tmp_path):
    tiny().save_pretrained(tmp_path)
    for places, said in (
        ({"transformer": "cpu", "blocks.0": "cpu"}, "names 'blocks.0' beside parts of the pipeline"),
        ({"transformer": "the attic"}, "expected a device for each part"),
        ({"image_tokenizer": None}, "expected a device for each part"),
    ):
        with pytest.raises(ValueError, match=said):
            UniDiffPipeline.from_pretrained(tmp_path, device_map=places)
