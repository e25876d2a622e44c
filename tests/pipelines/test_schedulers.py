"""Discrete schedulers of the installed diffusers as commit rules of ours, and ours in diffusers' loops, on the same logits."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import diffusers
import pytest
import torch
from diffusers import AmusedScheduler
from tiny_pipeline import tiny_pipeline
from torch import Tensor

from unidiff.decoding import ModalityDecoding, Sampler, SamplerConfig
from unidiff.pipeline import UniDiffPipeline
from unidiff.schedulers import DISCRETE, UnmaskingScheduler
from unidiff.schedulers.rule import with_scheduler
from unidiff.tokens import Span, TokenBatch, Vocabulary

SIZE, LENGTH = 50, 16
MASK = SIZE
VOCABULARY = Vocabulary(SIZE + 1, (0, SIZE), (SIZE + 1, SIZE + 1), SIZE)
GREEDY = ModalityDecoding(steps=4, rule="quota", schedule="fixed", temperature=0.0)
INSTALLED = [name for name in DISCRETE if hasattr(diffusers, name)]


def scheduler_of(name: str, *args, **settings):
    if name not in INSTALLED:
        pytest.skip(f"the installed diffusers has no {name}")
    return getattr(diffusers, name)(*args, **settings)


class Known:
    """A denoiser whose logits `[L, V]` are known; `moved` by how many tokens are still masked."""

    def __init__(self, logits: Tensor, moved: float = 1.0) -> None:
        self.logits, self.moved = logits, moved

    def __call__(self, ids: Tensor) -> Tensor:
        left = (ids == MASK).sum(1).float()[:, None, None]  # [B, 1, 1]
        return self.logits * (1 + self.moved * torch.cos(left)) + self.moved * torch.sin(left * (1 + self.logits))

    def hidden(self, ids, modality, positions, attention_mask, time=None):
        return torch.nn.functional.pad(self(ids[:, :LENGTH]), (0, 0, 0, ids.shape[1] - LENGTH))

    def head(self, hidden, start=0, stop=None):
        return hidden[..., start:stop]


def drawn(seed: int = 0, sharp: float = 2.0) -> Tensor:
    return sharp * torch.randn(LENGTH, SIZE, generator=torch.Generator().manual_seed(seed))


def sure(seed: int = 0) -> Tensor:
    """Logits whose best token is all but certain, each by another margin."""
    logits = torch.zeros(LENGTH, SIZE)
    logits[torch.arange(LENGTH), torch.randperm(SIZE, generator=torch.Generator().manual_seed(seed))[:LENGTH]] = (
        12 + 0.2 * torch.randperm(LENGTH, generator=torch.Generator().manual_seed(seed + 1)).float()
    )
    return logits


def request(rows: int = 1) -> TokenBatch:
    return TokenBatch.from_spans([[Span.masked_text(LENGTH, VOCABULARY)]] * rows)


def ours(model: Known, scheduler, settings: ModalityDecoding, rows: int = 1) -> list[Tensor]:
    config, rules = with_scheduler(scheduler, SamplerConfig(text=settings))
    sampler = Sampler(model, VOCABULARY, config, rules=rules)
    return sampler(request(rows), torch.arange(rows) + 5, record=True).trajectory


def same(a: list[Tensor], b: list[Tensor]) -> None:
    assert len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("threshold, steps", [(0.5, 4), (0.2, 8), (0.95, 5), (2.0, 3)])
def test_block_refinement_commits_what_it_does_in_its_own_loop(threshold, steps):
    scheduler = scheduler_of("BlockRefinementScheduler", threshold=threshold, block_length=LENGTH)
    model = Known(drawn(sharp=3.0))
    theirs = [torch.full((1, LENGTH), MASK)]
    scheduler.set_timesteps(steps)
    for step in range(steps):
        if (theirs[-1] == MASK).any():
            theirs.append(scheduler.step(model(theirs[-1]), step, theirs[-1], mask_token_id=MASK).prev_sample)
    same(ours(model, scheduler, replace(GREEDY, steps=steps)), theirs)


@pytest.mark.parametrize("bound", [0.01, 0.5, 3.0])
def test_entropy_bound_accepts_what_it_does_of_the_same_logits(bound):
    logits = drawn(sharp=3.0)
    model, scheduler = Known(logits, moved=0.0), scheduler_of("EntropyBoundScheduler", entropy_bound=bound)
    states = ours(model, scheduler, replace(GREEDY, steps=6))
    scheduler.set_timesteps(6)
    for step, (before, after) in enumerate(itertools.pairwise(states)):
        hidden = before[0] == MASK
        out = scheduler.step(model(before)[:, hidden], step, before[:, hidden])
        wanted = out.accepted_index[0] if step < 5 else torch.ones(int(hidden.sum()), dtype=torch.bool)
        assert torch.equal((after[0] != MASK)[hidden], wanted) and wanted.any()
    assert not (states[-1] == MASK).any()


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_amused_unmasks_what_it_does_in_its_own_loop(schedule):
    model, steps = Known(sure(), moved=0.0), 5
    theirs, scheduler = [torch.full((1, LENGTH), MASK)], AmusedScheduler(MASK, schedule)
    scheduler.set_timesteps(steps, temperature=(0, 0))
    generator = torch.Generator().manual_seed(0)
    for t in scheduler.timesteps:
        theirs.append(scheduler.step(model(theirs[-1]), t, theirs[-1], generator=generator).prev_sample)
    same(ours(model, scheduler, replace(GREEDY, steps=steps)), theirs)


def test_discrete_ddim_settles_by_the_law_of_the_absorbing_process():
    rows, steps = 150, 4
    scheduler = scheduler_of("DiscreteDDIMScheduler", num_inference_steps=9)
    settings = replace(GREEDY, steps=steps, temperature=1.0)
    states = ours(Known(drawn(sharp=0.5), moved=0.0), scheduler, settings, rows)
    ancestral = replace(settings, rule="ancestral", schedule="linear")
    plain = Sampler(Known(drawn(sharp=0.5), moved=0.0), VOCABULARY, SamplerConfig(text=ancestral))
    reference = plain(request(rows), torch.arange(rows), record=True).trajectory
    for step in range(1, steps + 1):
        expected = 1 - step / steps
        wide = 4.5 * math.sqrt(expected * (1 - expected) / (rows * LENGTH)) + 1e-9
        assert abs((reference[step] == MASK).double().mean() - expected) <= wide
        # noise that happens to be the drawn token counts as drawn: 1 in V of what is renoised
        assert -wide - 1.5 / SIZE <= (states[step] == MASK).double().mean() - expected <= wide


@pytest.mark.parametrize("name", DISCRETE)
def test_rows_are_decoded_alone_as_in_a_batch(name):
    scheduler = scheduler_of(name, **({"mask_token_id": MASK} if name == "AmusedScheduler" else {}))
    config, rules = with_scheduler(scheduler, SamplerConfig(text=replace(GREEDY, temperature=1.0, block_length=6)))
    sampler, batch, seeds = (
        Sampler(Known(drawn()), VOCABULARY, config, rules=rules),
        request(3),
        torch.tensor([3, 4, 5]),
    )
    padded = batch.pad_to(LENGTH + 3)
    together = sampler(padded, seeds).batch.ids[:, :LENGTH]
    assert len(set(map(tuple, together.tolist()))) == 3
    for row in range(3):
        assert torch.equal(sampler(batch.rows([row]), seeds[row : row + 1]).batch.ids[0], together[row])


def looped(model: Known, scheduler, steps: int, **more) -> list[Tensor]:
    states = [torch.full((1, LENGTH), MASK)]
    for t in range(steps):
        if (states[-1] == MASK).any():
            states.append(scheduler.step(model(states[-1]), t, states[-1], **more).prev_sample)
    return states


@pytest.mark.parametrize(
    "rule, steps, threshold",
    [("quota", 5, 2.0), ("quota", 16, 2.0), ("threshold", 16, 0.3), ("threshold", 16, 0.05)],
)
def test_ours_steps_as_block_refinement_does(rule, steps, threshold):
    theirs = scheduler_of("BlockRefinementScheduler", threshold=threshold, block_length=LENGTH)
    theirs.set_timesteps(steps)
    own = UnmaskingScheduler(MASK, "text", SamplerConfig(text=replace(GREEDY, rule=rule, threshold=threshold)))
    own.set_timesteps(steps)
    model = Known(drawn(sharp=3.0))
    same(looped(model, own, steps), looped(model, theirs, steps, mask_token_id=MASK))


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_ours_steps_as_amused_does(schedule):
    own = UnmaskingScheduler(MASK, "image", SamplerConfig(image=replace(GREEDY, schedule=schedule)))
    theirs, steps, model = AmusedScheduler(MASK, schedule), 4, Known(sure(), moved=0.0)
    own.set_timesteps(steps)
    theirs.set_timesteps(steps, temperature=(0, 0))
    sample = [torch.full((1, LENGTH), MASK)] * 2
    for mine, other in zip(own.timesteps, theirs.timesteps, strict=True):
        generator = torch.Generator().manual_seed(1)
        sample = [
            own.step(model(sample[0]), mine, sample[0], generator=generator).prev_sample,
            theirs.step(model(sample[1]), other, sample[1], generator=generator).prev_sample,
        ]
        assert torch.equal(*sample)
    assert not (sample[0] == MASK).any()


@pytest.mark.parametrize("rule", ["quota", "threshold", "factor", "hierarchical", "credit"])
def test_ours_steps_as_our_sampler_does(rule):
    settings = replace(GREEDY, rule=rule, steps=LENGTH, threshold=0.2, low_threshold=0.1)
    model, config = Known(drawn(sharp=3.0)), SamplerConfig(text=settings)
    states = Sampler(model, VOCABULARY, config)(request(), torch.tensor([1]), record=True).trajectory
    own = UnmaskingScheduler(MASK, "text", config)
    same(looped(model, own, LENGTH), states)


def test_a_step_is_exact_row_by_row_and_draws_by_the_law():
    own = UnmaskingScheduler(MASK, "text", SamplerConfig(text=ModalityDecoding(steps=3, rule="ancestral")))
    model, sample = Known(drawn()), torch.full((3, LENGTH), MASK)
    seeded = lambda rows: [torch.Generator().manual_seed(row) for row in rows]  # noqa: E731
    out = own.step(model(sample), 0, sample, generator=seeded(range(3)))
    alone = own.step(model(sample[1:2]), 0, sample[1:2], generator=seeded([1]))
    assert torch.equal(out.prev_sample[1:2], alone.prev_sample) and torch.equal(out[1][1:2], alone.transfer_index)
    assert own.step(model(sample), 2, sample, return_dict=False)[1].all()  # the last step takes all
    many = torch.full((3000, LENGTH), MASK)
    tokens = own.step(model(many), 0, many, generator=torch.Generator().manual_seed(0)).sampled_tokens[:, 0]
    share, p = torch.bincount(tokens, minlength=SIZE) / 3000, model(many[:1])[0, 0].softmax(-1)
    assert (share - p).abs().max() < 5 * (p * (1 - p) / 3000).sqrt().max()


def test_what_a_step_refuses():
    sample, logits = torch.full((1, LENGTH), MASK), drawn()[None]
    remasking = SamplerConfig(image=ModalityDecoding(remask="confidence", remask_threshold=0.5, remask_budget=1))
    for scheduler, call, sentence in (
        (UnmaskingScheduler(), (logits, 0, sample), "mask_token_id is not known"),
        (UnmaskingScheduler(MASK), (logits[0], 0, sample), r"expected \[B, L, V\]"),
        (UnmaskingScheduler(MASK, sampler=remasking), (logits, 0, sample), "remask is 'confidence'"),
    ):
        with pytest.raises(ValueError, match=sentence):
            scheduler.step(*call)
    with pytest.raises(ValueError, match="generator lists 2 for 1 rows"):
        UnmaskingScheduler(MASK).step(logits, 0, sample, generator=[torch.Generator()] * 2)
    for wrong in ({"modality": "sound"}, {"num_inference_steps": 0}, {"threshold": "a"}, {"sampler": {"speed": 1}}):
        with pytest.raises(ValueError):
            UnmaskingScheduler(MASK, **wrong)


@pytest.fixture
def pipe():
    return tiny_pipeline()


@pytest.mark.parametrize("name", DISCRETE)
def test_a_scheduler_of_diffusers_is_put_in_saved_and_loaded(pipe, name, tmp_path):
    scheduler_of(name, **({"mask_token_id": 0} if name == "AmusedScheduler" else {}))
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path / "pipe")
    pipe.save_pretrained(tmp_path / "pipe")  # all that lies there is its own
    assert json.loads((tmp_path / "pipe" / "model_index.json").read_text())["scheduler"] == ["diffusers", name]
    again = UniDiffPipeline.from_pretrained(tmp_path / "pipe")
    again.set_progress_bar_config(disable=True)
    assert type(again.scheduler) is type(pipe.scheduler)
    calls = [("text_to_image", (["a dog", "two cats"],)), ("generate", ())]
    for task, given in calls:
        outs = [getattr(p, task)(*given, generator=3) for p in (pipe, again)]
        assert torch.equal(outs[0].ids, outs[1].ids) and not (outs[0].ids == pipe.vocabulary.mask_id).any()
    assert pipe.text_to_image("a dog", num_inference_steps=2, guidance_scale=1.0).nfe <= 2
    with pytest.raises(ValueError, match=f"threshold is {name}'s own"):
        pipe.text_to_image("a dog", threshold=0.5)
    ours = UnmaskingScheduler.from_config(again.scheduler.config, temperature=0.5)
    assert (ours.options.steps, ours.options.temperature) == (again.scheduler.config.get("num_inference_steps"), 0.5)


def test_ours_holds_settings_for_every_call_that_says_nothing_else(pipe, tmp_path):
    plain, own = pipe("a dog", generator=1), SamplerConfig(image=ModalityDecoding(steps=2, temperature=0.0))
    pipe.scheduler = UnmaskingScheduler.from_config(pipe.scheduler.config, sampler=own.to_dict())
    assert torch.equal(pipe("a dog", generator=1).ids, plain.ids) is False
    pipe.save_pretrained(tmp_path / "pipe")
    assert set(json.loads((tmp_path / "pipe" / "scheduler" / "scheduler_config.json").read_text())) == {
        *("_class_name", "_diffusers_version", "mask_token_id", "sampler")
    }
    again = UniDiffPipeline.from_pretrained(tmp_path / "pipe")
    again.set_progress_bar_config(disable=True)
    assert again.scheduler.sampler == own and again.components["scheduler"] is again.scheduler
    for call in ({}, {"steps": 3}, {"sampler": SamplerConfig()}):
        told = tiny_pipeline()("a dog", generator=1, **{"sampler": own, **call})
        assert torch.equal(again("a dog", generator=1, **call).ids, told.ids), call
    again.scheduler = UnmaskingScheduler.from_config(again.scheduler.config, sampler=None, num_inference_steps=3)
    assert torch.equal(again("a dog", generator=1).ids, tiny_pipeline()("a dog", generator=1, steps=3).ids)
    again.scheduler = UnmaskingScheduler()
    assert torch.equal(again("a dog", generator=1).ids, plain.ids)


def test_folders_without_a_scheduler_load(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "pipe")
    (tmp_path / "pipe" / "scheduler" / "scheduler_config.json").unlink()
    (tmp_path / "pipe" / "scheduler").rmdir()
    index = json.loads((tmp_path / "pipe" / "model_index.json").read_text())
    assert index.pop("scheduler") == ["unidiff.schedulers.unmasking", "UnmaskingScheduler"]
    (tmp_path / "pipe" / "model_index.json").write_text(json.dumps(index))
    loaded = UniDiffPipeline.from_pretrained(tmp_path / "pipe")
    assert isinstance(loaded.scheduler, UnmaskingScheduler) and not loaded.scheduler.changes


def test_schedulers_that_cannot_be_put_in_are_refused(pipe, tmp_path):
    cases = [(diffusers.DDIMScheduler(), "the scheduler is a DDIMScheduler; expected an UnmaskingScheduler or one of")]
    if "BlockRefinementScheduler" in INSTALLED:
        cases.append((diffusers.BlockRefinementScheduler(editing_threshold=0.9), "editing_threshold of .* is 0.9"))
    if "DiscreteDDIMScheduler" in INSTALLED:
        cases.append((diffusers.DiscreteDDIMScheduler(corrector_steps=2), "corrector_steps of .* is 2"))
    for scheduler, sentence in cases:
        pipe.scheduler = scheduler
        with pytest.raises(ValueError, match=sentence):
            pipe("a dog")
    pipe.scheduler = diffusers.DDIMScheduler()
    pipe.save_pretrained(tmp_path / "pipe")
    with pytest.raises(ValueError, match="names the scheduler 'DDIMScheduler'; expected one of UnmaskingScheduler"):
        UniDiffPipeline.from_pretrained(tmp_path / "pipe")
