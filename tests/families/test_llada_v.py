"""LLaDA-V: configs, tiles, places of pictures, rows of any pictures in batches, and what upstream does wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from golden import golden_cases
from golden_pipelines import write_golden_llada_v
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from released_pipelines import write_chat
from safetensors.torch import load_file

from unidiff import UniDiffPipeline
from unidiff.decoding import NoCache
from unidiff.decoding.cache import AdaptiveCache, IntervalCache, SegmentCache
from unidiff.families.checkpoint.convert import convert
from unidiff.families.checkpoint.load import load_released
from unidiff.families.checkpoint.small_memory import offload, quantise
from unidiff.families.checkpoint.verify import answer, describe, formula_weights, verify
from unidiff.families.family import recognise
from unidiff.families.layout import TaskInputs
from unidiff.families.llada_v import LLADA_V, llada_v_settings
from unidiff.families.llada_v.rows import PICTURE, SYSTEM
from unidiff.families.llada_v.tiles import Tiling
from unidiff.tokens import Modality
from unidiff.tokens.batch import CONTINUOUS

TINY = LLADA_V.tiny.config
SIZES = [(9, 5), (4, 16), (7, 7), (30, 2), (1, 40)]
TALK = [
    {"role": "user", "content": "this <image> is a fox"},
    {"role": "assistant", "content": "two owls"},
    {"role": "user", "content": "and <image> on a hill?"},
]


def picture(width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(width * 100 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


PICTURES = [picture(*size) for size in SIZES]


@pytest.fixture(scope="module")
def pipe(tmp_path_factory) -> UniDiffPipeline:
    folder = tmp_path_factory.mktemp("llada-v")
    write_chat(folder, "llada-v")
    made = UniDiffPipeline.from_pretrained(folder)
    for value in made.transformer.parameters():  # as lively as the trained ones are, so that rows differ
        if value.ndim > 1:
            value.data.mul_(2.5)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mm_projector_type": "linear"}, "mm_projector_type = 'linear'; only 'mlp2x_gelu'"),
        ({"mm_patch_merge_type": "flat"}, "mm_patch_merge_type"),
        ({"mm_vision_tower": "openai/clip-vit"}, "only SigLIP towers"),
        ({"mm_hidden_size": 12}, "mm_hidden_size = 12 and a tower of width 8"),
        ({"image_aspect_ratio": "pad"}, "image_aspect_ratio = 'pad'"),
        ({"image_grid_pinpoints": "(1x1),...,(2x3)"}, "expected anyres_max_N"),
        ({"image_grid_pinpoints": [[7, 7]]}, "expected anyres_max_N"),
        ({"mm_vision_select_layer": -3}, "0 layers of the tower"),
        ({"vision_config": {**TINY["vision_config"], "hidden_act": "quick_gelu"}}, "hidden_act = 'quick_gelu'"),
        (
            {"vision_config": {**TINY["vision_config"], "num_attention_heads": 3}},
            "vision_size = 8 has to be a multiple",
        ),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"mask_token_id": None}, "no mask_token_id"),
    ],
)
def test_other_configurations_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        config = {**TINY, **change}
        LLADA_V.make(config)
        LLADA_V.vocabulary(config)


def test_what_a_config_leaves_out():
    """The tower is the released one, with one layer less than published; positions are not reduced without a number."""
    bare = {k: v for k, v in TINY.items() if k not in ("vision_config", "mm_hidden_size", "image_aspect_ratio")}
    found = llada_v_settings(bare)
    assert (found["vision_size"], found["vision_layers"], found["tile_side"]) == (1152, 26, 384)
    assert found["most_tiles"] is None and llada_v_settings(TINY)["most_tiles"] == 2


def test_found_by_keys_and_sizes():
    names = list(formula_weights(LLADA_V))
    assert recognise({}, names) is LLADA_V and recognise({**TINY, "model_type": "other"}, names) is LLADA_V


@given(st.integers(1, 700), st.integers(1, 700), st.integers(1, 4), st.integers(1, 5), st.sampled_from([None, 1, 2, 4]))
@settings(max_examples=60, deadline=None)
def test_tiles_of_any_picture(width: int, height: int, largest: int, patches: int, most: int | None):
    """No pixel of a picture smaller than the largest canvas is thrown away, and what is left of the map has its proportions."""
    tiling = Tiling(patches * 3 + 1, patches, largest, most)
    rows, columns = tiling.grid(width, height)
    assert 1 <= rows <= largest and 1 <= columns <= largest
    tiles = tiling.tiles(Image.new("RGB", (width, height), "white"))
    assert tiles.shape == (1 + rows * columns, 3, tiling.side, tiling.side) and bool((tiles[0] == 255).all())
    kept = tiling.joined(torch.zeros(rows * columns, patches**2, 2), width, height)
    assert kept.shape[2] == 2
    if most is not None:
        assert kept.shape[0] * kept.shape[1] <= most * patches**2 * 1.21 or min(kept.shape[:2]) <= 1


def test_the_map_is_that_of_the_canvas():
    """Every patch at its place: numbers of patches on a canvas that the picture fills come back in order."""
    tiling = Tiling(8, 4, 3)
    numbers = torch.arange(8 * 12).view(2, 4, 3, 4).transpose(1, 2).reshape(6, 16, 1).float()
    assert torch.equal(tiling.joined(numbers, 24, 16)[..., 0], torch.arange(96).view(8, 12).float())
    cut = tiling.joined(numbers, 24, 9)[..., 0]  # a picture of 24 x 9 has black above and below
    assert torch.equal(cut, torch.arange(96).view(8, 12).float()[8 // 2 - len(cut) // 2 :][: len(cut)])


def test_places_of_pictures(pipe):
    layout = pipe.layout
    marks = layout.template.marks

    def without(turn: Any, count: int) -> list[int]:
        """Ids of a prompt, a run of vectors as one."""
        batch_ids = [span.ids.flatten().tolist() for span in layout.prompt(turn, PICTURES[:count])]
        flat = [i for ids in batch_ids for i in (ids if CONTINUOUS not in ids else [CONTINUOUS])]
        return [i for n, i in enumerate(flat) if i != CONTINUOUS or flat[n - 1 : n] != [CONTINUOUS]]

    e = layout.encode
    head = lambda role: [marks["start_header"], *e(role), marks["end_header"]]  # noqa: E731
    front = [marks["bos"], *head("system"), *e(f"\n\n{SYSTEM}"), marks["eot"], *head("user"), *e("\n\n")]
    back = [marks["eot"], *head("assistant"), *e("\n\n")]
    assert without("a fox", 1) == [*front, CONTINUOUS, *e("\na fox"), *back]
    assert without("a fox", 2) == [*front, CONTINUOUS, *e("\n"), CONTINUOUS, *e("\na fox"), *back]
    inside = [*front[: -len(e("\n\n"))], *e("\n\na "), CONTINUOUS, *e(" fox"), *back]
    assert without([{"role": "user", "content": "a <image> fox"}], 1) == inside
    assert without([3, PICTURE, 4], 1) == [3, CONTINUOUS, 4]
    said = without(TALK, 2)
    assert said.count(CONTINUOUS) == 2 and said.count(marks["eot"]) == 4
    with pytest.raises(ValueError, match="2 places for 1 pictures; write <image> once for each"):
        layout.prompt(TALK, PICTURES[:1])
    with pytest.raises(ValueError, match="nothing that the user says"):
        layout.prompt([{"role": "system", "content": "a"}], PICTURES[:1])
    spans = layout.prompt("a <image> fox")  # without pictures it is a word
    assert len(spans) == 1 and spans[0].modality == Modality.TEXT


def test_several_pictures_are_squares_unless_told_otherwise(pipe):
    """As in training: one tile each. A picture is looked at once, however often it is asked about."""
    layout, looks = pipe.layout, []
    hook = pipe.transformer.vision.encoder.register_forward_hook(lambda *_: looks.append(1))
    n = pipe.transformer.settings.tiling.patches**2
    sizes = lambda made: [s.size for s in made.prompt("a", PICTURES[:2]) if s.modality == Modality.IMAGE]  # noqa: E731
    assert sizes(layout) == [n, 1, n, 1]
    tiled = sizes(replace(layout, squares=False))
    assert tiled[0] == tiled[2] == n and min(tiled[1], tiled[3]) > 1
    assert [s.size for s in replace(layout, squares=True).prompt("a", PICTURES[:1])][1:3] == [n, 1]
    looks.clear()
    layout.prompt("a", [PICTURES[0], PICTURES[0], PICTURES[1]])
    assert len(looks) == 2
    pipe.answer(PICTURES[0], ["a fox?", "owls?", "a hill?"], 2, generator=0)
    hook.remove()
    assert len(looks) == 3


CACHES: dict[str, Any] = {
    "none": NoCache,
    "adaptive": lambda: AdaptiveCache(4, 3, 0.4),
    "interval": lambda: IntervalCache(3),
    "prompt kept": lambda: SegmentCache(NoCache(), NoCache(), IntervalCache(100), IntervalCache(100)),
}


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("name", CACHES)
def test_rows_of_a_batch_are_the_rows_alone(pipe, name: str, guidance: float):
    """Of other pictures, numbers of pictures, words and turns."""
    images = [PICTURES[:1], PICTURES[1:3], PICTURES[2:3], PICTURES[3:5]]
    turns = ["a red fox?", "two owls", "on a hill", TALK]
    options = {"policy": CACHES[name](), "guidance_scale": guidance, "steps": 4}
    together = pipe.chat(turns, 6, image=images, generator=0, **options)
    assert len({tuple(ids) for ids in together.text_ids}) > 1
    for row, (turn, own) in enumerate(zip(turns, images, strict=True)):
        alone = pipe.chat([turn], 6, image=[own], generator=[int(together.seeds[row])], **options)
        assert alone.text_ids == [together.text_ids[row]]


def test_answers_and_captions_are_conversations(pipe):
    asked = pipe.answer([PICTURES[:2], PICTURES[2]], ["a fox?", "an owl?"], 5, generator=3)
    chat = pipe.chat(["a fox?", "an owl?"], 5, image=[PICTURES[:2], PICTURES[2]], generator=3)
    assert asked.text_ids == chat.text_ids and asked.images is None
    one = pipe.answer(PICTURES[0], ["a fox?", "an owl?"], 5, generator=3)  # a picture for all questions
    two = pipe.answer(PICTURES[:2], "a fox?", 5, generator=3)  # a question about every picture
    assert len(one.texts) == len(two.texts) == 2 and one.text_ids[0] == two.text_ids[0]
    array = np.asarray(PICTURES[0])
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    for given_ in (array, tensor, tensor.float() / 255):
        assert (
            pipe.answer(given_, "a fox?", 5, generator=3).text_ids
            == pipe.answer(PICTURES[0], "a fox?", 5, generator=3).text_ids
        )
    assert pipe.caption(PICTURES[:2], max_text_tokens=4, generator=0).nfe == 4
    by_call = pipe("a fox?", image=PICTURES[0], max_text_tokens=5, generator=3)
    assert by_call.text_ids == pipe.chat("a fox?", 5, image=PICTURES[0], generator=3).text_ids
    assert pipe.infill("a <mask> fox", generator=0).texts[0]


def test_the_prompt_is_computed_once_for_the_whole_answer(pipe):
    """Nearly all of a row is picture: what the passes compute falls as the reference's bound says."""
    big = picture(60, 60)
    plain = pipe.answer(big, "a fox?", 8, generator=0)
    kept = pipe.answer(big, "a fox?", 8, generator=0, policy=CACHES["prompt kept"]())
    length, passes = plain.ids.shape[1], plain.nfe
    assert plain.stats.model_tokens == passes * length and passes == 8
    assert kept.nfe == passes and kept.stats.model_tokens <= length + (passes - 1) * 2 * 8
    upstream = AdaptiveCache(25, 7, 0.25, full_layers=(), compat="upstream")
    assert pipe.answer(big, "a fox?", 8, generator=0, policy=upstream).stats.value_tokens < 0.5 * passes * 2 * length


def test_end_of_text_ends_an_answer_but_for_upstream(pipe):
    """Upstream never writes it; here it may end an answer, as the end of a turn may."""
    layout, eos = pipe.layout, pipe.vocabulary.specials["eos"]
    assert eos not in layout.never and eos in replace(layout, compat="upstream").never
    assert layout.ends == (layout.template.marks["eot"],) == replace(layout, compat="upstream").ends
    forbidden = {layout.template.marks[n] for n in ("bos", "start_header", "end_header")}
    assert forbidden <= set(layout.never)
    head = pipe.transformer.output_weight
    kept = head.data.clone()
    try:
        head.data.zero_()  # all ids alike, so that the first one that may be written is: end-of-text, id 0
        ours = pipe.answer(PICTURES[0], "a", 4, generator=0)
        assert eos == 0 and ours.text_ids == [[]] and int(ours.ids[0, -4]) == eos
        upstream = pipe.from_pipe(pipe, layout=replace(layout, compat="upstream"))
        upstream.set_progress_bar_config(disable=True)
        assert int(upstream.answer(PICTURES[0], "a", 4, generator=0).ids[0, -4]) == layout.ends[0]
    finally:
        head.data.copy_(kept)
    with pytest.raises(ValueError, match="compat = 'other'; expected None or 'upstream'"):
        replace(layout, compat="other")


def test_features_go_through_forward_in_batches(pipe):
    """Upstream's `forward` with embeddings raises, and so do two rows."""
    inputs = TaskInputs(2, turns=["a fox", "two owls on a hill"], pictures=[PICTURES[:1], PICTURES[3:]], longest=3)
    with torch.no_grad():
        batch = pipe.layout.chat(inputs).batch
        logits = pipe.transformer(batch)
        for row in range(2):
            own = batch.rows([row]).each(lambda x, row=row: x[:, batch.valid[row]])
            torch.testing.assert_close(pipe.transformer(own)[0], logits[row][batch.valid[row]], atol=1e-4, rtol=1e-4)


def test_a_folder_is_described_verified_and_converted_both_ways(tmp_path):
    write_chat(tmp_path / "theirs", "llada-v")
    found = describe(tmp_path / "theirs")
    assert found.family == "llada-v" and found.settings["vision_layers"] == 1
    checks = {check.name: check.passed for check in verify(tmp_path / "theirs").checks}
    assert checks["weights"] and checks["known answer"] and checks["a pass of this checkpoint"]
    convert(tmp_path / "theirs", tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back")
    first, again = (load_file(tmp_path / n / "model.safetensors") for n in ("theirs", "back"))
    assert set(first) == set(again) and all(torch.equal(first[n], again[n]) for n in first)
    asked = ([PICTURES[:2]], "a fox?", 5)
    answers = []
    for name in ("theirs", "ours"):
        made = UniDiffPipeline.from_pretrained(tmp_path / name, text_tokenizer=tmp_path / "theirs")
        made.set_progress_bar_config(disable=True)
        answers.append(made.answer(*asked, generator=0).text_ids)
    assert answers[0] == answers[1]


@pytest.fixture
def wide():
    torch.manual_seed(0)
    model = LLADA_V.make({**TINY, "hidden_size": 64, "intermediate_size": 64}).bfloat16().eval()
    for value in model.parameters():
        torch.nn.init.normal_(value, std=0.1)
    return model, LLADA_V.vocabulary(TINY)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_few_bits_change_answers_little(wide, kind):
    pytest.importorskip("torchao", reason="the extra `quantise` (torchao) is not installed")
    model, vocabulary = wide
    before = answer(model, vocabulary)
    after = answer(quantise(model, kind), vocabulary)
    assert 0 < float((before - after).norm() / before.norm()) < (0.1 if kind == "int8" else 0.35)


def test_layers_may_stay_off_the_device(wide):
    pytest.importorskip("accelerate", reason="the extra `offload` (accelerate) is not installed")
    model, vocabulary = wide
    before = answer(model, vocabulary)
    torch.testing.assert_close(answer(offload(model, "cpu"), vocabulary), before)


@pytest.mark.golden
@pytest.mark.parametrize("folder", golden_cases("llada_v", having="weights.safetensors"))
def test_commands_on_a_checkpoint_of_golden_size(folder, tmp_path, run):
    place = tmp_path / "released"
    write_golden_llada_v(place, folder)
    files = []
    for number, shown in enumerate(PICTURES[:2]):
        files.append(tmp_path / f"{number}.png")
        shown.save(files[-1])
    options = ("--model", place, "--max-text-tokens", 4, "--seed", 1, "--device", "cpu")
    status, out, error = run("answer", files[0], "w3 w4", "--image", files[1], *options)
    assert status == 0 and out.strip(), error
    pipe = UniDiffPipeline.from_pretrained(place)
    pipe.set_progress_bar_config(disable=True)
    assert out.strip() == pipe.answer([PICTURES[:2]], ["w3 w4"], 4, generator=1).texts[0]
    status, single, error = run("answer", files[0], "w3 w4", *options)
    assert status == 0 and single != out, error
    status, out, error = run("caption", *files, *options)
    assert status == 0 and out.count("\n") == 2, error
    status, out, _ = run("info", place)
    assert status == 0 and "llada-v" in out
    status, out, _ = run("convert", place, tmp_path / "ours")
    assert status == 0 and load_released(tmp_path / "ours").family is LLADA_V


def test_other_models_take_one_picture(tmp_path, run):
    PICTURES[0].save(tmp_path / "a.png")
    status, _, error = run("answer", tmp_path / "a.png", "what?", "--image", tmp_path / "a.png", "--device", "cpu")
    assert status == 1 and "reads one picture at a time; leave --image out" in error
