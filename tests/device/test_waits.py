"""How often the host waits for a device: today's numbers per pass, per call and per step, as upper bounds.

A read waits until the device has done all that it was given; an upload of memory that is not pinned waits as well. `MOST` is the
one table; `pytest tests/device/test_waits.py -s` prints what was counted and where.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from cache_cases import POLICIES, make_model, rows
from cache_cases import VOCABULARY as CACHED
from device_cases import any_name_means_it, moved, moved_model
from killed_tokenizer import config as tokenizer_config
from tiny_families import FAMILIES, family
from tiny_pipeline import tiny_pipeline
from train_fixtures import MIXED, VOCABULARY, tiny_config, tiny_table, write_documents
from virtual_device import DEVICE, Ledger, virtual_device

from unidiff.decoding import Guidance, ModalityDecoding, NoCache, RefreshPolicy, Sampler, SamplerConfig
from unidiff.decoding.cache import BlockCausalCache, CacheByRow, DualCache, PrefixCache
from unidiff.decoding.config import RULES
from unidiff.models.transformer import MaskedTransformer
from unidiff.pipeline import UniDiffPipeline
from unidiff.tokens import Span, TokenBatch
from unidiff.tokens.image.vq import CellVQModel
from unidiff.train.data.shard_source import DocumentTokens
from unidiff.train.image_tokenizer import trainer as tokenizer_training
from unidiff.train.image_tokenizer.losses import place_codes
from unidiff.train.image_tokenizer.trainer import train_image_tokenizer
from unidiff.train.reward import RewardConfig, RewardTuner
from unidiff.train.trainer import Trainer


class Waits(NamedTuple):
    """Most of a pass, a call or a step."""

    reads: int
    uploads: int


Places = Counter[tuple[str, str]]


class Marks:
    """What a ledger held at some moments, and what came between them."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger, self.held = ledger, [(Counter(ledger.reads), Counter(ledger.uploads))]

    def __call__(self, *_: Any) -> None:
        self.held.append((Counter(self.ledger.reads), Counter(self.ledger.uploads)))

    def between(self, first: int = 0) -> list[tuple[Places, Places]]:
        pairs = zip(self.held[first:], self.held[first + 1 :])
        return [(b[0] - a[0], b[1] - a[1]) for a, b in pairs]


def most(parts: list[tuple[Places, Places]]) -> tuple[Waits, str]:
    """The largest numbers, and the places of the part with the most waits in all."""
    assert parts
    found = Waits(max(r.total() for r, _ in parts), max(u.total() for _, u in parts))
    reads, uploads = max(parts, key=lambda part: part[0].total() + part[1].total())
    lines = [f"{n} x {kind} at {place or 'elsewhere'}" for (place, kind), n in reads.most_common()]
    lines += [f"{n} x upload at {place or 'elsewhere'}" for (place, _), n in uploads.most_common()]
    return found, "".join(f"\n      {line}" for line in lines)


# what is counted

ROWS = {  # several rows that differ, a packed one among them; rows that do the same
    "mixed": lambda: TokenBatch.cat(rows()).pad_to(20),
    "alike": lambda: TokenBatch.cat(rows()[:1] * 2),
}
GUIDED = {"mixed": (Guidance(2.0, hide="other"),), "alike": (Guidance(1.0), Guidance(2.0))}


def passes(
    model: Any, batch: TokenBatch, config: SamplerConfig, policy: RefreshPolicy, vocabulary: Any = CACHED, **more: Any
) -> list[tuple[Places, Places]]:
    """Of one decode, from the second pass on."""
    with virtual_device() as ledger:
        there = moved_model(model)
        seeds = torch.arange(len(batch.ids)).to(DEVICE)
        given = {name: moved(value) for name, value in more.items()}
        batch, marks = batch.to(DEVICE), Marks(ledger)
        Sampler(there, vocabulary, config, policy)(batch, seeds, callback=marks, **given)
    return marks.between(1)


def with_cache(make: Callable[[], RefreshPolicy], kind: str) -> list[tuple[Places, Places]]:
    found = []
    for guidance in GUIDED[kind]:
        config = SamplerConfig(ModalityDecoding(steps=6, block_length=4), ModalityDecoding(steps=6), guidance)
        found += passes(make_model(), ROWS[kind](), config, make())
    return found


def with_rule(rule: str) -> list[tuple[Places, Places]]:
    own: dict[str, Any] = dict(steps=4, rule=rule, threshold=0.3, low_threshold=0.2, top_k=5, top_p=0.9, block_length=4)
    if rule == "ancestral":
        own |= {"remask": "remdm", "remask_cap": 0.4}
    elif rule != "first_hitting":
        own |= {"choice_temperature": 0.5, "blocks_in_flight": 2, "flight_threshold": 0.2}
    if rule in ("quota", "threshold"):
        own |= {"remask": "confidence", "remask_threshold": 0.5, "remask_budget": 2}
    settings = ModalityDecoding(**own)
    return [
        part
        for kind, batch in ROWS.items()
        for part in passes(make_model(), batch(), SamplerConfig(settings, settings, GUIDED[kind][0]), NoCache())
    ]


def block_causal() -> list[tuple[Places, Places]]:
    model = make_model(attention="block_causal", block_length=4)
    batch = TokenBatch.from_spans([[Span.text([3, 1], True), Span.masked_text(10, CACHED)]] * 2)
    return passes(model, batch, SamplerConfig(ModalityDecoding(steps=8, block_length=4)), BlockCausalCache())


def with_family(name: str) -> list[tuple[Places, Places]]:
    tiny = family(name)
    other = tiny.unconditional
    return passes(tiny.model, tiny.batch, tiny.config, NoCache(), tiny.vocabulary, unconditional=other)


CALLS: dict[str, Callable[[UniDiffPipeline, Any], Any]] = {
    "text_to_image": lambda pipe, more: pipe.text_to_image(["a dog", "two cats"], **more),
    "caption": lambda pipe, more: pipe.caption(pictures(pipe), **more),
    "answer": lambda pipe, more: pipe.answer(pictures(pipe), ["what?", "a dog?"], **more),
    "inpaint": lambda pipe, more: pipe.inpaint(pictures(pipe), hole(pipe), ["a <mask:2>", "<mask> cats"], **more),
    "generate": lambda pipe, more: pipe.generate(num_images_per_prompt=2, **more),
}


def pictures(pipe: UniDiffPipeline) -> torch.Tensor:
    return torch.rand(2, 3, *pipe.image_size, generator=torch.Generator().manual_seed(0))


def hole(pipe: UniDiffPipeline) -> Any:
    mask = torch.zeros(pipe.image_size)
    mask[: pipe.image_size[0] // 2] = 1
    return mask.numpy()


def around_passes(task: str, **more: Any) -> list[tuple[Places, Places]]:
    """What a call of the pipeline waits for besides its passes: all of a call less the passes between the first and last."""
    pipe = tiny_pipeline()
    with virtual_device() as ledger:
        pipe.to(DEVICE)
        marks = Marks(ledger)
        config = SamplerConfig(ModalityDecoding(steps=3), ModalityDecoding(steps=3))
        CALLS[task](pipe, {"generator": [1, 2], "sampler": config, **more})
        marks()
    return marks.between()


def each_pass(task: str, bar: bool, callback: bool) -> list[tuple[Places, Places]]:
    """Of a pipeline whose progress bar shows, or with a callback of the caller's."""
    pipe = tiny_pipeline()
    pipe.set_progress_bar_config(disable=not bar)
    with virtual_device() as ledger:
        pipe.to(DEVICE)
        marks = Marks(ledger)
        real = Sampler.__call__

        def marked(self: Sampler, batch: TokenBatch, seeds: Any, condition: Any, watch: Any, *rest: Any) -> Any:
            def look(step: int, view: Any) -> Any:
                answer = watch(step, view)
                marks()
                return answer

            return real(self, batch, seeds, condition, look, *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Sampler, "__call__", marked)
            more = {"callback_on_step_end": lambda *_: None} if callback else {}
            CALLS[task](pipe, {"generator": [1, 2], "steps": 4, **more})
    return marks.between(1)


def training(folder: Path, *overrides: str, logged: bool = False, **more: Any) -> list[tuple[Places, Places]]:
    """Of steps, from the second on, with or without a look at what came of each."""
    with virtual_device() as ledger, any_name_means_it():
        table = tiny_table(72)
        trainer = Trainer(tiny_config(folder, *MIXED, *overrides), table, **more)
        marks = Marks(ledger)
        for _ in range(4):
            trainer.step(1.0)
            if logged:
                trainer.settle()
            marks()
    return marks.between(1)


def saving(folder: Path, what: str) -> list[tuple[Places, Places]]:
    """Of a checkpoint, an export or a validation, whose reads grow with the number of tensors."""
    with virtual_device() as ledger, any_name_means_it():
        table, held_out = tiny_table(72).split(8)
        trainer = Trainer(tiny_config(folder, *MIXED), table, held_out)
        trainer.step(1.0)
        marks = Marks(ledger)
        {"validation": trainer.validate, "checkpoint": trainer.save, "export": lambda: trainer.export(folder / "m")}[
            what
        ]()
        trainer.saver.wait()
        marks()
    return marks.between()


def tokenizer_steps(folder: Path, make: Callable[[Path], Any]) -> list[tuple[Places, Places]]:
    """Of the image tokenizer's steps, from one forward pass to the next."""
    with virtual_device() as ledger, any_name_means_it(), pytest.MonkeyPatch.context() as patch:
        marks = Marks(ledger)
        real = tokenizer_training.vq_forward

        def marked(*args: Any) -> Any:
            marks()
            return real(*args)

        patch.setattr(tokenizer_training, "vq_forward", marked)
        train_image_tokenizer(make(folder))
    return marks.between(2)


def reward_step(states: str) -> list[tuple[Places, Places]]:
    with virtual_device() as ledger:
        torch.manual_seed(0)
        model = MaskedTransformer(VOCABULARY.size, hidden_size=32, num_layers=1, num_heads=2).to(DEVICE)
        settings = SamplerConfig(image=ModalityDecoding(steps=3))
        config = RewardConfig(group=4, chunk=64, states=states)
        words = Span.text(torch.tensor([1, 9]), True)
        prompts = TokenBatch.from_spans([[words, Span.masked_image((2, 3), VOCABULARY)] for _ in range(3)]).to(DEVICE)
        reward = lambda finished: (finished.ids[:, 2:] == VOCABULARY.image[0] + 3).float().mean(1)  # noqa: E731
        tuner = RewardTuner(model, VOCABULARY, settings, reward, config)
        marks = Marks(ledger)
        for _ in range(3):
            tuner.step(prompts)
            marks()
    return marks.between(1)


def placing_codes() -> list[tuple[Places, Places]]:
    """Of 13 cells at once, before the decoder is trained on their codes."""
    with virtual_device() as ledger:
        torch.manual_seed(0)
        model = CellVQModel(8, 32, 8, 64, 1, (16,), (1,)).to(DEVICE)
        cells, flat = torch.rand(10, 4, 3, 8, 8).to(DEVICE), torch.rand(3, 3, 8, 8).to(DEVICE)
        marks = Marks(ledger)
        place_codes(model, cells, flat)
        marks()
    return marks.between()


CAUSAL = "model={hidden_size: 32, num_layers: 2, num_heads: 2, attention: block_causal, block_length: 4}"
COUNTED: Mapping[str, Callable[[Path], list[tuple[Places, Places]]]] = {
    **{
        f"{kind} rows, {name}": lambda _, make=make, kind=kind: with_cache(make, kind)
        for kind in ROWS
        for name, make in {"no cache": NoCache, **POLICIES}.items()
    },
    "mixed rows, a cache each": lambda _: passes(
        make_model(), ROWS["mixed"](), SamplerConfig(), CacheByRow([DualCache(), PrefixCache()], [0, 1, 0])
    ),
    "alike rows, block-causal": lambda _: block_causal(),
    **{f"pass, {rule} rule": lambda _, rule=rule: with_rule(rule) for rule in RULES},
    **{f"pass, {name}": lambda _, name=name: with_family(name) for name in FAMILIES},
    "pass, progress bar": lambda _: each_pass("generate", True, False),
    "pass, callback": lambda _: each_pass("generate", False, True),
    **{f"call, {task}": lambda _, task=task: around_passes(task) for task in CALLS},
    "call, candidates": lambda _: around_passes("text_to_image", num_candidates=2),
    "call, trajectory": lambda _: around_passes("text_to_image", record_trajectory=True),
    "call, auto": lambda _: around_passes("text_to_image", cache="auto"),
    "step, adamw": lambda folder: training(folder),
    "step, adamw, logged": lambda folder: training(folder, logged=True),
    "step, muon": lambda folder: training(folder, "optimiser.name=muon"),
    "step, accumulated twice": lambda folder: training(folder, "accumulate=2"),
    "step, packed": lambda folder: training(folder, "data.pack=40"),
    "step, block diffusion": lambda folder: training(folder, CAUSAL, "tasks.caption.weight=0", "tasks.answer.weight=0"),
    "step, documents": lambda folder: training(
        folder / "run", documents=DocumentTokens(str(write_documents(folder / "documents")), seed=3)
    ),
    "step, recomputed": lambda folder: training(folder, "activation_checkpointing=full"),
    "validation": lambda folder: saving(folder, "validation"),
    "checkpoint": lambda folder: saving(folder, "checkpoint"),
    "export": lambda folder: saving(folder, "export"),
    "tokenizer step": lambda folder: tokenizer_steps(
        folder, lambda out: tokenizer_config(out, steps=9, validate_every=99, checkpoint_every=99)
    ),
    "codes of cells": lambda _: placing_codes(),
    "reward step, random": lambda _: reward_step("random"),
    "reward step, decoded": lambda _: reward_step("decoded"),
}
MOST: Mapping[str, Waits] = {
    "mixed rows, no cache": Waits(1, 0),
    "mixed rows, prefix": Waits(1, 0),
    "mixed rows, dual": Waits(1, 0),
    "mixed rows, vicinity": Waits(1, 0),
    "mixed rows, interval": Waits(1, 0),
    "mixed rows, held guidance": Waits(1, 0),
    "mixed rows, adaptive": Waits(1, 0),
    "mixed rows, max-logit": Waits(1, 0),
    "mixed rows, modality": Waits(1, 0),
    "mixed rows, segments": Waits(1, 0),
    "mixed rows, segments by layer": Waits(1, 0),
    "alike rows, no cache": Waits(1, 0),
    "alike rows, prefix": Waits(1, 0),
    "alike rows, dual": Waits(1, 0),
    "alike rows, vicinity": Waits(1, 0),
    "alike rows, interval": Waits(1, 0),
    "alike rows, held guidance": Waits(1, 0),
    "alike rows, adaptive": Waits(1, 0),
    "alike rows, max-logit": Waits(1, 0),
    "alike rows, modality": Waits(1, 0),
    "alike rows, segments": Waits(1, 0),
    "alike rows, segments by layer": Waits(1, 0),
    "mixed rows, a cache each": Waits(1, 0),
    "alike rows, block-causal": Waits(1, 0),
    "pass, ancestral rule": Waits(1, 0),
    "pass, at_least rule": Waits(1, 0),
    "pass, credit rule": Waits(1, 0),
    "pass, even_share rule": Waits(1, 0),
    "pass, factor rule": Waits(1, 0),
    "pass, first_hitting rule": Waits(1, 0),
    "pass, hierarchical rule": Waits(1, 0),
    "pass, quota rule": Waits(1, 0),
    "pass, threshold rule": Waits(1, 0),
    "pass, timed rule": Waits(1, 0),
    "pass, unidisc": Waits(0, 0),
    "pass, mdlm": Waits(1, 0),
    "pass, llada": Waits(1, 0),
    "pass, llada_v": Waits(1, 0),
    "pass, llada_moe": Waits(3, 0),  # and in each of two layers of experts
    "pass, llada2": Waits(3, 0),
    "pass, llada2_uni": Waits(3, 0),
    "pass, dream": Waits(1, 0),
    "pass, mmada": Waits(0, 0),
    "pass, dynin": Waits(1, 0),
    "pass, parallel": Waits(1, 0),
    "pass, lumina": Waits(0, 0),
    "pass, muddit": Waits(0, 0),
    "pass, ddit": Waits(1, 0),
    "pass, progress bar": Waits(2, 0),
    "pass, callback": Waits(2, 0),
    "call, text_to_image": Waits(11, 2),
    "call, caption": Waits(13, 2),
    "call, answer": Waits(13, 2),
    "call, inpaint": Waits(14, 3),
    "call, generate": Waits(13, 2),
    "call, candidates": Waits(44, 2),
    "call, trajectory": Waits(13, 3),
    "call, auto": Waits(12, 2),
    "step, adamw": Waits(0, 0),
    "step, adamw, logged": Waits(1, 0),
    "step, muon": Waits(1, 0),
    "step, accumulated twice": Waits(0, 0),
    "step, packed": Waits(0, 0),
    "step, block diffusion": Waits(0, 0),
    "step, documents": Waits(0, 0),
    "step, recomputed": Waits(0, 0),
    "validation": Waits(1, 0),
    "checkpoint": Waits(104, 0),
    "export": Waits(20, 0),
    "tokenizer step": Waits(1, 0),
    "codes of cells": Waits(2, 0),
    "reward step, random": Waits(12, 1),
    "reward step, decoded": Waits(12, 1),
}


@pytest.mark.parametrize("name", COUNTED)
def test_the_host_waits_no_more_often(name, tmp_path):
    found, places = most(COUNTED[name](tmp_path))
    print(f'\n    "{name}": Waits{tuple(found)},{places}')
    bound = MOST[name]
    assert found.reads <= bound.reads and found.uploads <= bound.uploads, f"{found}:{places}"
