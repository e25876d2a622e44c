"""Every released family on another device: decodes with every cache, every task of its pipeline, loading straight to it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from all_pipelines import FAMILIES as PIPELINES
from all_pipelines import make_pipelines
from device_cases import moved, moved_model, on_both, plainly, same_outputs
from PIL import Image
from released_parts import write_tiny
from tiny_families import FAMILIES, family
from virtual_device import DEVICE, VirtualTensor, virtual_device

from unidiff.decoding import NoCache, RefreshPolicy, Sampler
from unidiff.decoding import cache as policies
from unidiff.families.checkpoint.load import load_released
from unidiff.families.checkpoint.small_memory import offload
from unidiff.families.checkpoint.verify import answer
from unidiff.families.family import FAMILIES as RELEASED
from unidiff.tokens import Vocabulary

SEEDS = torch.tensor([3, 4, 5])
POLICIES: dict[str, Any] = {
    "none": NoCache,
    "prefix": policies.PrefixCache,
    "dual": policies.DualCache,
    "vicinity": lambda: policies.VicinityCache(warmup=1, look_back=1, look_ahead=1),
    "adaptive": lambda: policies.AdaptiveCache(prompt_interval=4, response_interval=3, ratio=0.4),
    "max-logit": lambda: policies.MaxLogitCache(0.6, 0.2, 4),
    "interval": lambda: policies.IntervalCache(4),
    "modality": lambda: policies.ModalityCache(3),
    "segments": lambda: policies.SegmentCache(policies.DualCache(), policies.MaxLogitCache(0.5, 0.2, 4)),
    "held guidance": lambda: policies.HeldGuidance(policies.IntervalCache(4), 4, 1),
}
QUICK: dict[str, Any] = {"steps": 2, "generator": 5}
TALK = [
    {"role": "user", "content": "owls?"},
    {"role": "assistant", "content": "two owls"},
    {"role": "user", "content": "on a hill?"},
]


def check_decode(name: str, policy: RefreshPolicy) -> None:
    tiny = family(name)
    with plainly():
        sampler = Sampler(tiny.model, tiny.vocabulary, tiny.config, policy)
        expected = sampler(tiny.batch, SEEDS, record=True, unconditional=tiny.unconditional)
    with virtual_device():
        there = Sampler(moved_model(tiny.model), tiny.vocabulary, tiny.config, policy)
        found = there(moved(tiny.batch), SEEDS.to(DEVICE), record=True, unconditional=moved(tiny.unconditional))
        assert found.batch.ids.device == DEVICE and found.nfe == expected.nfe
        for a, b in zip(expected.trajectory, found.trajectory, strict=True):
            assert torch.equal(a, b.cpu())
        torch.testing.assert_close(expected.confidence, found.confidence.cpu())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_decode_is_the_same(name):
    others = list(POLICIES)[1:]
    for policy in ("none", others[list(FAMILIES).index(name) % len(others)]):
        check_decode(name, POLICIES[policy]())


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_decode_with_any_cache_is_the_same(name, policy):
    check_decode(name, POLICIES[policy]())


@pytest.fixture(scope="module")
def pipes(tmp_path_factory):
    return make_pipelines(tmp_path_factory.mktemp("device"))


def calls(pipe: Any) -> dict[str, list[dict[str, Any]]]:
    """Arguments of every task that a pipeline can do, several where they differ in kind."""
    pictured: dict[str, list[dict[str, Any]]] = {}
    if pipe.layout.reads_pixels:
        shown = [Image.effect_noise(size, 90) for size in ((9, 5), (4, 16), (7, 7))]
        pictured = {
            "caption": [{"image": shown, "max_text_tokens": 4}],
            "answer": [{"image": [shown[:2], shown[2]], "question": ["a", "b c?"], "max_text_tokens": 4}],
        }
    if pipe.images is not None:
        size = pipe.image_size
        pictures = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(2))
        mask = torch.zeros(2, *size)
        mask[:, :, : size[1] // 2] = 1
        short = {} if pipe.layout.family in ("unidisc", "muddit") else {"max_text_tokens": 4}
        known = {"image": pictures, "mask_image": mask.numpy()}
        pictured = {
            "text_to_image": [{"prompt": ["a", "b c"]}, {"prompt": ["a", "b c"], "guidance_scale": 3.0}],
            "caption": [{"image": pictures, **short}],
            "answer": [{"image": pictures, "question": ["a", "b c?"], **short}],
            "inpaint": [{**known, "text": ["a b", "b"]}, {**known, "text": "a", "paste_back": True}],
            "generate": [{"num_images_per_prompt": 2}, {"text": ["a <mask:2>", "b"]}],
            "edit": [{"image": pictures, "prompt": ["a", "b"]}, {**known, "prompt": "a"}],
        }
        if "generate" in pipe.layout.words_beside:
            pictured["generate"] = [
                {"prompt": ["a", "b c"], **short},
                {"prompt": "a", "num_images_per_prompt": 2, **short},
            ]
        if pipe.layout.family == "llada2-uni":  # edits whole pictures
            pictured["edit"] = [{"image": pictures, "prompt": ["a", "b"]}, {"image": pictures, "prompt": "a"}]
        elif pipe.layout.family == "lumina":
            pictured["edit"] += [{"image": pictures, "prompt": "a", "reference": pictures, "image_guidance_scale": 2.0}]
        else:
            pictured["edit"] += [{"image": pictures, "prompt": "a", "max_text_tokens": 4}]
    return pictured | {
        "chat": [{"messages": ["a fox?", "two red owls on a hill?"], "max_text_tokens": 6}, {"messages": TALK}][
            : 2 if pipe.images is None else 1
        ],
        "complete": [{"prompt": ["a red", "two owls on a"], "max_text_tokens": 6}],
        "infill": [{"text": ["a <mask:2> fox", "two<mask> on a<mask:3>"]}],
    }


OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"cache": "interval", "record_trajectory": True},
    {"cache": "auto", "temperature": 1.0},
)


@pytest.mark.parametrize("name", PIPELINES)
def test_every_task_is_the_same(pipes, name):
    pipe = pipes[name]
    done = 0
    for task, several in calls(pipe).items():
        for number, given in enumerate(several if task in pipe.layout.tasks else ()):
            options = QUICK | OPTIONS[(done + number) % len(OPTIONS)]
            expected, found, _ = on_both(pipe, lambda p: getattr(p, task)(**given, **options))  # noqa: B023
            try:
                same_outputs(expected, found)
            except AssertionError as error:
                raise AssertionError(f"{task} {given} {options}") from error
        done += task in pipe.layout.tasks
    assert done == len(pipe.layout.tasks)


@pytest.mark.slow
@pytest.mark.parametrize("name", PIPELINES)
def test_every_task_with_every_cache_and_several_candidates_is_the_same(pipes, name):
    pipe = pipes[name]
    for task in pipe.layout.tasks:
        given = calls(pipe)[task][0]
        for cache in ("prefix", "dual", "vicinity", "interval", "adaptive", "max-logit", "modality", "auto"):
            options = QUICK | {"cache": cache}
            if pipe.images is not None and task not in ("chat", "complete", "infill"):
                options |= {"num_candidates": 2}
            expected, found, _ = on_both(pipe, lambda p: getattr(p, task)(**given, **options))  # noqa: B023
            same_outputs(expected, found)


@pytest.mark.parametrize("name", sorted(RELEASED))
def test_weights_are_loaded_straight_to_the_device(name, tmp_path):
    write_tiny(tmp_path / name, name)
    options: dict[str, Any] = {"family": name}
    if name in ("mmada", "dynin", "lumina"):  # whose configs do not imply the ids
        size = RELEASED[name].settings(RELEASED[name].tiny.config)["vocab_size"]
        options["vocabulary"] = Vocabulary(size, (0, 24), (24, 40), 23, specials={"eos": 0})
    expected = load_released(tmp_path / name, **options)
    with virtual_device():
        found = load_released(tmp_path / name, device=DEVICE, **options)
        for (key, a), b in zip(expected.model.state_dict().items(), found.model.state_dict().values(), strict=True):
            assert isinstance(b, VirtualTensor) and torch.equal(a, b.cpu()), key
        with plainly():
            one, two = (answer(part.images or part.model, part.vocabulary) for part in (expected, found))
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("disk", [False, True])
@pytest.mark.parametrize("name", ["llada", "unidisc", "muddit"])
def test_weights_off_the_device_are_brought_to_it(name, disk, tmp_path):
    pytest.importorskip("accelerate", reason="the extra `offload` (accelerate) is not installed")
    entry = RELEASED[name]
    torch.manual_seed(0)
    model = entry.make(entry.tiny.config).eval()
    for value in model.parameters():
        torch.nn.init.normal_(value, std=0.3)
    vocabulary = entry.vocabulary(entry.tiny.config)
    with plainly():
        expected = answer(model, vocabulary)
    with virtual_device():
        there = offload(copy.deepcopy(model), DEVICE, tmp_path if disk else None)
        kept = {isinstance(value, VirtualTensor) for value in there.parameters()}
        assert kept == {True, False}
        torch.testing.assert_close(answer(there, vocabulary), expected, rtol=1e-4, atol=1e-5)
