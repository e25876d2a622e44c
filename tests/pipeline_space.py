"""Random calls of a small pipeline whose rows differ: holes, pictures to repaint, candidates, "auto"; each row alone and in the batch."""

from __future__ import annotations

from functools import cache
from random import Random
from typing import Any

import torch
from tiny_pipeline import CORPUS, tiny_parts, tiny_pipeline
from torch import Tensor

from unidiff.decoding import Guidance, ModalityDecoding, SamplerConfig
from unidiff.models.transformer import MaskedTransformer
from unidiff.pipeline import UniDiffPipeline
from unidiff.tokens.image.vq import VQImageTokenizer

GRIDS = {"small": (2, 3), "long": (9, 10)}  # "auto" takes a cache for pictures of the second
TEXTS = [
    "a <mask:2> dog",
    "two <mask>",
    "two cats",
    "a dog",
    "<mask:4>",
    "an owl <mask> a fox",
    "a dog on a red background",
]


@cache
def pipeline_of(grid: str, timed: bool) -> UniDiffPipeline:
    if not timed:
        return tiny_pipeline(grid=GRIDS[grid])
    _, image, text, settings = tiny_parts(grid=GRIDS[grid], corpus=CORPUS)
    sizes = dict(hidden_size=16, num_layers=1, num_heads=2, ffn_size=32, time_conditioning=True, cond_dim=8)
    model = MaskedTransformer(settings.vocabulary.size, **sizes)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    pipe = UniDiffPipeline(model, VQImageTokenizer(image), text, settings)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def check_call(number: int) -> tuple[int, int]:
    """Assert that the rows of a call are the rows alone; how many there were, and how many lay within rounding."""
    r = Random(number)
    grid = r.choice(["small", "small", "long"])
    pipe = pipeline_of(grid, r.random() < 0.3)
    steps = r.randint(2, 5) if grid == "small" else r.randint(8, 16)
    options: dict[str, Any] = dict(
        output_type="codes", num_candidates=r.choice([1, 2, 3]), cache=r.choice([None, "auto"])
    )
    options["sampler"] = SamplerConfig(
        ModalityDecoding(
            rule=r.choice(["quota", "threshold"]), steps=steps, threshold=0.3, temperature=r.choice([0.0, 1.0])
        ),
        ModalityDecoding(steps=steps, temperature=r.choice([0.0, 1.0]), choice_temperature=r.choice([0.0, 1.0])),
        Guidance(r.choice([1.0, 3.0]), hide=r.choice(["given", "other", "text"])),
        order=r.choice(["together", "text_first", "level"]),
    )
    rows, inputs = r.randint(2, 4), [dict[str, Any]() for _ in range(4)]
    texts = [r.choice(TEXTS) for _ in range(rows)]
    task = r.choice(["generate", "inpaint", "text_to_image"])
    masks = torch.zeros(rows, *pipe.image_size)
    picture = torch.rand(rows, 3, *pipe.image_size, generator=torch.Generator().manual_seed(number))
    for i in range(rows):
        high = r.choice([0, pipe.image_size[0] // 2, pipe.image_size[0]])
        masks[i, : high if "<mask" in texts[i] else max(high, 8)] = 1
        own = {
            "generate": dict(text=texts[i]),
            "text_to_image": dict(prompt=texts[i].replace("<mask", "").replace(">", "")),
        }
        inputs[i] = own.get(task) or dict(text=texts[i], image=picture[i : i + 1], mask_image=masks[i].numpy())
    seeds = [r.randrange(1 << 60) for _ in range(rows)]
    together = call(pipe, task, inputs[:rows], seeds, options)
    near = 0
    for i in range(rows):
        alone = call(pipe, task, inputs[i : i + 1], seeds[i : i + 1], options)
        if not torch.equal(alone[0], together[i]):
            near += 1
            assert within_rounding(pipe, task, inputs, rows, i, seeds, options), (number, task, i, texts, options)
    return rows, near


def call(
    pipe: UniDiffPipeline, task: str, inputs: list[dict[str, Any]], seeds: list[int], options: dict[str, Any]
) -> Tensor:
    """Ids `[B, L]`."""
    joined = {name: [own[name] for own in inputs] for name in inputs[0]}
    joined["image"] = torch.cat(joined["image"]) if "image" in joined else None
    joined = {name: values for name, values in joined.items() if values is not None}
    return getattr(pipe, task)(**joined, generator=seeds, **options).ids


def within_rounding(pipe: Any, task: str, inputs: Any, rows: int, i: int, seeds: list[int], options: Any) -> bool:
    """Whether the row differs in float32 alone: with weights in float64 it may not."""
    pipe.transformer.double()
    try:
        together = call(pipe, task, inputs[:rows], seeds, options)
        alone = call(pipe, task, inputs[i : i + 1], seeds[i : i + 1], options)
    finally:
        pipe.transformer.float()
    return torch.equal(alone[0], together[i])
