"""`docs/conventions.md` says the truth about us and about the installed packages: every row of its tables has a test here."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re

import diffusers
import pytest
import torch
from diffusers.callbacks import PipelineCallback
from diffusers.utils import BaseOutput
from doc_code import DOCS, blocks, run
from PIL import Image
from tiny_pipeline import SIZE, tiny_pipeline

from unidiff.pipelines.options import ALIASES, OPTIONS, CallKeywords, DecodeKeywords
from unidiff.schedulers import DISCRETE, UnmaskingScheduler

ROWS = {}
AMUSED = {
    "draw": inspect.signature(diffusers.AmusedPipeline.__call__).parameters,
    "redraw": inspect.signature(diffusers.AmusedImg2ImgPipeline.__call__).parameters,
    "inpaint": inspect.signature(diffusers.AmusedInpaintPipeline.__call__).parameters,
}
PICTURE = Image.linear_gradient("L").resize(SIZE[::-1]).convert("RGB")
MASK = Image.new("L", SIZE[::-1], 255)


def row(name: str):
    """The test of a row, by its first cell."""

    def note(test):
        ROWS[name] = test
        return test

    return note


def llada2() -> inspect.Signature:
    """Of diffusers' text pipeline, where it is installed."""
    if not hasattr(diffusers, "LLaDA2Pipeline"):
        pytest.skip("the installed diffusers has no LLaDA2Pipeline")
    return inspect.signature(diffusers.LLaDA2Pipeline.__call__)


def refuses(call, *sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        call()
    assert all(part in str(caught.value) for part in sentence)


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def test_every_row_has_a_test_and_every_test_a_row():
    page = (DOCS / "conventions.md").read_text(encoding="utf-8")
    named = [cells[0] for cells in re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", page, re.M)]
    named = [name for name in named if name != "convention"]
    assert sorted(named) == sorted(ROWS)


@row("number of passes")
def passes(pipe):
    assert "num_inference_steps" in AMUSED["draw"] and "num_inference_steps" in llada2().parameters
    assert pipe("a dog", num_inference_steps=2, generator=1).ids.equal(pipe("a dog", steps=2, generator=1).ids)
    refuses(lambda: pipe("a dog", steps=2, num_inference_steps=2), "steps and num_inference_steps mean the same")
    refuses(lambda: pipe.text_to_image("a dog", num_inference_steps=0), "steps is 0")


@row("longest text")
def longest(pipe):
    from transformers import GenerationConfig

    assert "gen_length" in llada2().parameters and GenerationConfig(max_new_tokens=3).max_new_tokens == 3
    told = pipe.caption(PICTURE, max_text_tokens=2, generator=1)
    for name in ("gen_length", "max_new_tokens"):
        assert ALIASES[name].name == "max_text_tokens"
        assert pipe.caption(PICTURE, **{name: 2}, generator=1).ids.equal(told.ids)
    refuses(lambda: pipe.caption(PICTURE, gen_length=2, max_new_tokens=2), "mean the same; give one of them")


@row("conversation")
def conversation(pipe):
    assert "messages" in llada2().parameters
    said = [{"role": "user", "content": "a dog?"}]
    refuses(lambda: pipe(messages=said), "cannot do 'chat'")  # what a text model does is in test_calls
    refuses(lambda: pipe("a dog", messages=said), "messages are all that chat is given")


@row("guidance off")
def no_guidance(pipe):
    assert AMUSED["draw"]["guidance_scale"].default > 1  # pipelines of diffusers guide above 1
    off, on = (pipe("a dog", steps=3, guidance_scale=s, generator=1) for s in (1.0, 3.0))
    assert (off.nfe, on.nfe) == (3, 6)


@row("guidance weight")
def weight(pipe):
    for w in (0.0, 1.5):
        told = pipe("a dog", cfg_scale=w, generator=1)
        assert told.ids.equal(pipe("a dog", guidance_scale=1 + w, generator=1).ids)
    refuses(lambda: pipe("a dog", cfg_scale=1.0, guidance_scale=2.0), "mean the same")


@row("guidance of a paper")
def convention(pipe):
    above_one = ("mmada", "dynin-omni", "unidisc", "lumina-dimoo", "llada")
    for name in (*above_one, "muddit", "diffusers"):
        told = pipe("a dog", guidance_scale=1.5, guidance_convention=name, generator=1)
        assert told.ids.equal(pipe("a dog", guidance_scale=1.5 + (name in above_one), generator=1).ids)
    refuses(lambda: pipe("a dog", guidance_convention="mmad"), "did you mean 'mmada'")


@row("negative prompt")
def negative(pipe):
    assert "negative_prompt" in AMUSED["draw"]
    plain, away = (
        pipe("a dog", negative_prompt=words, guidance_scale=4.0, generator=1) for words in (None, "two cats")
    )
    assert not plain.ids.equal(away.ids)


@row("pictures per prompt")
def several(pipe):
    assert "num_images_per_prompt" in AMUSED["draw"]
    assert pipe(["a dog", "two cats"], num_images_per_prompt=2).texts == ["a dog", "a dog", "two cats", "two cats"]


@row("size")
def size(pipe):
    assert {"height", "width"} <= set(AMUSED["draw"])
    out = pipe("a dog", height=SIZE[0], width=SIZE[1], steps=2)
    assert out.images[0].size == SIZE[::-1]
    refuses(lambda: pipe("a dog", height=32), "height is 32 and width 24", "16x24 pixels only")
    refuses(lambda: pipe("a dog", image=PICTURE, mask_image=MASK, width=8), "not the picture's 16x24 pixels")


@row("inpainting")
def inpainting(pipe):
    assert list(AMUSED["inpaint"])[1:4] == ["prompt", "image", "mask_image"]
    half = Image.new("L", SIZE[::-1])
    half.paste(255, (0, 0, 8, 16))
    out = pipe("a dog", image=PICTURE, mask_image=half, generator=1)
    assert out.ids.equal(pipe.inpaint(PICTURE, half, "a dog", generator=1).ids)
    assert out.codes[0, :, 1:].equal(pipe.images.encode(pipe.image_inputs.images(PICTURE))[0, :, 1:])
    refuses(lambda: pipe("a dog", image=PICTURE, mask_image=half, text="b"), "prompt and text both hold words")


@row("image to image")
def redrawing(pipe):
    assert list(AMUSED["redraw"])[1:4] == ["prompt", "image", "strength"]
    out = pipe("a dog", image=PICTURE, strength=1.0, generator=1)
    assert out.ids.equal(pipe.inpaint(PICTURE, MASK, "a dog", generator=1).ids)  # the whole picture
    for bad in (0.0, 1.5):
        refuses(lambda bad=bad: pipe("a dog", image=PICTURE, strength=bad), f"strength is {bad}")
    refuses(lambda: pipe("a dog", image=PICTURE), "a prompt with an image needs mask_image, strength or")


@row("seeds")
def seeds(pipe):
    assert "generator" in AMUSED["draw"]
    made = lambda: [torch.Generator().manual_seed(seed) for seed in (3, 4)]  # noqa: E731
    both = pipe(["a dog", "two cats"], generator=made())
    assert both.ids[1:].equal(pipe("two cats", generator=made()[1]).ids)
    assert both.ids[1:].equal(pipe("two cats", generator=[int(both.seeds[1])]).ids)


@row("kind of pictures")
def kinds(pipe):
    theirs = diffusers.image_processor.VaeImageProcessor(do_normalize=False)
    pt = pipe("a dog", generator=1, output_type="pt").images
    arrays = pipe("a dog", generator=1, output_type="np").images
    pictures = pipe("a dog", generator=1).images
    assert (theirs.postprocess(pt, "np", [False]) == arrays).all()
    assert theirs.postprocess(pt, "pil", [False])[0].tobytes() == pictures[0].tobytes()


@row("latents")
def latents(pipe):
    assert '"latent"' in inspect.getsource(diffusers.AmusedPipeline.__call__)
    out = pipe("a dog", generator=1, output_type="latent")
    assert out.images.equal(out.codes) and out.codes.dtype == torch.int64
    assert pipe("a dog", generator=1, output_type="codes").images.equal(out.images)


def watched(pipe, answer=None, **more):
    seen = []

    def look(own, step, timestep, tensors):
        assert own is pipe
        seen.append((step, timestep, tensors))
        return answer(step, tensors) if answer else None

    return seen, pipe("a dog", steps=3, generator=1, callback_on_step_end=look, **more)


@row("step callback")
def callback(pipe):
    names = list(inspect.signature(PipelineCallback.callback_fn).parameters)
    assert names[1:] == ["pipeline", "step_index", "timesteps", "callback_kwargs"] or len(names) == 5
    seen, _ = watched(pipe)
    assert [step for step, _, _ in seen] == [0, 1, 2] and [t for _, t, _ in seen][-1] == 0
    assert set(seen[0][2]) == {"ids", "open", "confidence"}


@row("tensors of the callback")
def tensors(pipe):
    assert "callback_on_step_end_tensor_inputs" in llada2().parameters
    seen, _ = watched(pipe, callback_on_step_end_tensor_inputs=["open"])
    assert set(seen[0][2]) == {"open"}

    class Theirs(PipelineCallback):
        tensor_inputs = ["ids"]  # noqa: RUF012

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            assert set(callback_kwargs) == {"ids"}
            return callback_kwargs

    out = pipe("a dog", steps=3, generator=1, callback_on_step_end=Theirs(cutoff_step_ratio=None, cutoff_step_index=1))
    assert out.ids.equal(pipe("a dog", steps=3, generator=1).ids)
    refuses(
        lambda: watched(pipe, callback_on_step_end_tensor_inputs=["latents"]), "expected a list of some of ids, open"
    )


@row("changes by the callback")
def changes(pipe):
    assert "callback_outputs.pop(" in str(llada2()) + inspect.getsource(diffusers.LLaDA2Pipeline.__call__)
    code = pipe.vocabulary.image[0] + 3

    def paint(step, tensors):
        ids = tensors["ids"]
        ids[:, -6:] = code  # the whole picture
        return {**tensors, "ids": ids}

    seen, out = watched(pipe, paint)
    assert (out.codes == 3).all() and len(seen) == 1
    refuses(
        lambda: watched(pipe, lambda step, tensors: {"ids": tensors["ids"] * 0}), "the callback changed a given token"
    )


@row("stopping early")
def stopping(pipe):
    assert "interrupt" in dir(diffusers.StableDiffusionPipeline)

    def interrupt(step, tensors):
        pipe.interrupt = True

    for answer in (lambda step, tensors: False, interrupt):
        seen, out = watched(pipe, answer)
        assert len(seen) == 2 and not (out.ids == pipe.vocabulary.mask_id).any()


@row("output class")
def output(pipe):
    out = pipe("a dog", generator=1)
    assert isinstance(out, BaseOutput) and out.images is out["images"] is out[0] and out["texts"] is out[1]
    assert [f.name for f in dataclasses.fields(out)][:2] == ["images", "texts"]
    assert list(out) == [f.name for f in dataclasses.fields(out) if getattr(out, f.name) is not None]


@row("tuples")
def tuples(pipe):
    assert AMUSED["draw"]["return_dict"].default is True
    given = pipe("a dog", generator=1, return_dict=False)
    whole = pipe("a dog", generator=1)
    assert isinstance(given, tuple) and len(given) == len(whole.to_tuple()) and given[1] == whole.texts


@row("first entry")
def first(pipe):
    fields = [f.name for f in dataclasses.fields(diffusers.pipelines.ImagePipelineOutput)]
    assert fields == ["images"] and pipe("a dog")[0][0].size == SIZE[::-1]
    given = pipe.caption(PICTURE)
    assert given[0][0].size == PICTURE.size and given[1] == given.texts  # the pictures come back with their captions


@row("sequences")
def sequences(pipe):
    out = pipe("a dog", generator=1)
    assert out.sequences is out.ids and out.sequences.shape == (1, 16)
    assert "including the prompt" in transformers_output().__doc__


def transformers_output():
    module = pytest.importorskip("transformers.models.diffusion_gemma.generation_diffusion_gemma")
    return module.DiffusionGemmaGenerationOutput


@row("tokens per forward")
def tokens_per_forward(pipe):
    assert "tokens_per_forward" in [f.name for f in dataclasses.fields(transformers_output())]
    out = pipe(["a dog", "two cats"], steps=3, guidance_scale=3.0, generator=1)
    assert out.tokens_per_forward.tolist() == [2.0, 2.0] and out.nfe == 6  # six codes in three passes, two streams each
    words = pipe.caption([PICTURE, PICTURE], generator=[1, 2], steps=4)
    for number, seed in enumerate((1, 2)):
        assert (
            pipe.caption(PICTURE, generator=[seed], steps=4).tokens_per_forward[0] == words.tokens_per_forward[number]
        )


@row("component")
def component(pipe, tmp_path):
    assert isinstance(pipe.scheduler, UnmaskingScheduler)
    assert isinstance(pipe.scheduler, diffusers.SchedulerMixin) and isinstance(pipe.scheduler, diffusers.ConfigMixin)
    pipe.save_pretrained(tmp_path / "pipe")
    index = json.loads((tmp_path / "pipe" / "model_index.json").read_text())
    assert index["scheduler"] == ["unidiff.schedulers.unmasking", "UnmaskingScheduler"]


def swapped(name: str):
    """A tiny pipeline that draws by a scheduler of diffusers; what it commits is compared in `test_schedulers`."""
    if not hasattr(diffusers, name):
        pytest.skip(f"the installed diffusers has no {name}")
    assert name in DISCRETE
    own = tiny_pipeline()
    own.scheduler = getattr(diffusers, name).from_config(own.scheduler.config)
    out = own("a dog", generator=1)
    assert not (out.ids == own.vocabulary.mask_id).any()
    return own


@row("swapping")
def swapping(pipe):
    own = swapped("AmusedScheduler")
    assert own.scheduler.config.mask_token_id == own.vocabulary.image_mask
    own.scheduler = UnmaskingScheduler.from_config(own.scheduler.config)
    assert own("a dog", generator=1).ids.equal(tiny_pipeline()("a dog", generator=1).ids)


@row("block refinement")
def block_refinement(pipe):
    own = swapped("BlockRefinementScheduler")
    own.scheduler = type(own.scheduler)(editing_threshold=0.5)
    refuses(lambda: own("a dog"), "editing_threshold of BlockRefinementScheduler is 0.5")


@row("entropy bound")
def entropy_bound(pipe):
    own = swapped("EntropyBoundScheduler")
    own.scheduler = type(own.scheduler)(num_inference_steps=2, entropy_bound=0.0)
    assert own("a dog", guidance_scale=1.0).nfe == 2


@row("discrete DDIM")
def discrete_ddim(pipe):
    own = swapped("DiscreteDDIMScheduler")
    own.scheduler = type(own.scheduler)(corrector_steps=1)
    refuses(lambda: own("a dog"), "corrector_steps of DiscreteDDIMScheduler is 1")


@row("aMUSEd")
def amused(pipe):
    own = swapped("AmusedScheduler")
    assert own("a dog", num_inference_steps=4, guidance_scale=1.0).nfe == 4
    assert "temperature" in inspect.signature(own.scheduler.set_timesteps).parameters


@row("own loop")
def own_loop(pipe):
    scheduler = UnmaskingScheduler(5)
    assert {"model_output", "timestep", "sample"} <= set(inspect.signature(diffusers.AmusedScheduler.step).parameters)
    sample, logits = torch.full((2, 6), 5), torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))
    scheduler.set_timesteps(3)
    left = []
    for t in scheduler.timesteps:
        sample = scheduler.step(logits, t, sample, generator=torch.Generator().manual_seed(1)).prev_sample
        left.append(int((sample == 5).sum()))
    assert left == sorted(left, reverse=True) and left[-1] == 0 and len(left) == 3


@pytest.mark.parametrize("name", sorted(ROWS))
def test_a_row_is_true(name, pipe, tmp_path):
    given = {"pipe": pipe, "tmp_path": tmp_path}
    test = ROWS[name]
    test(**{argument: given[argument] for argument in inspect.signature(test).parameters})


def test_keywords_for_type_checkers_are_all_arguments(pipe):
    assert set(DecodeKeywords.__annotations__) == {*OPTIONS, *ALIASES, "guidance_convention"}
    tasks = [
        getattr(pipe, task) for task in ("text_to_image", "caption", "answer", "inpaint", "edit", "generate", "chat")
    ]
    named = {name for task in tasks for name in inspect.signature(task).parameters} - {"options", "prompt"}
    assert set(CallKeywords.__annotations__) - set(DecodeKeywords.__annotations__) == named


def test_the_snippet_runs():
    (block,) = blocks("conventions.md")
    names: dict = {}
    run(block, "conventions.md", names)
    assert names["drawn"].texts == ["a fox"] and names["pipe"].scheduler.options.steps == 8
