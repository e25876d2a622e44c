"""The command line as a person meets it. Processes that import torch take seconds, so most tests run in this one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_pipeline import tiny_parts, tiny_pipeline

NO_TORCH = "import sys; sys.modules['torch'] = None; from unidiff.cli import main; sys.argv[0] = 'unidiff'; main()"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("cli") / "model"
    tiny_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def picture(tmp_path) -> str:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "in.png")
    return str(tmp_path / "in.png")


def process(*arguments: object, code: str | None = None) -> subprocess.CompletedProcess[str]:
    start = [sys.executable, "-c", code] if code else [sys.executable, "-m", "unidiff"]
    return subprocess.run([*start, *map(str, arguments)], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("arguments", [[], ["generate"], ["eval", "emoji"]], ids=" ".join)
def test_help_works_where_torch_cannot_be_imported(arguments):
    done = process(*arguments, "--help", code=NO_TORCH)
    assert done.returncode == 0, done.stderr
    words = {"generate": "--guidance", "eval": "--json", "": "caption"}
    assert words[arguments[0] if arguments else ""] in done.stdout


def test_mistakes_in_files_are_found_before_torch_is_imported(tmp_path):
    done = process("caption", tmp_path / "none.png", code=NO_TORCH)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == f"unidiff: image file {str(tmp_path / 'none.png')!r} does not exist\n"


def test_a_real_process_draws_a_picture(model, tmp_path):
    out = tmp_path / "made" / "dog.png"
    done = process("generate", "a dog", "-o", out, "--model", model, "--seed", 3, "--steps", 2)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{out}: a dog\n" and "4 forward passes" in done.stderr
    expected = tiny_pipeline().text_to_image("a dog", generator=3, steps=2).images[0]
    with Image.open(out) as image:
        assert image.format == "PNG" and image.tobytes() == expected.tobytes()
    assert [p.name for p in out.parent.iterdir()] == ["dog.png"]


def test_generate_options(run, model, tmp_path):
    out, gif, strip = tmp_path / "a.webp", tmp_path / "a.gif", tmp_path / "strip.png"
    status, text, _ = run(
        *("generate", "a dog", "an owl", "-n", 2, "-o", out, "--model", model, "--guidance", 1),
        *("--gif", gif, "--filmstrip", strip, "--temperature", 0.5, "--dtype", "bfloat16", "--device", "cpu"),
    )
    assert status == 0
    names = [f"a-{i}.webp" for i in range(1, 5)]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*names, "a.gif", "strip.png"])
    lines = text.splitlines()
    assert lines == [f"{tmp_path / n}: {t}" for n, t in zip(names, ["a dog"] * 2 + ["an owl"] * 2, strict=True)]


def test_generate_takes_candidates_a_cache_and_a_negative_prompt(run, model, tmp_path):
    out = tmp_path / "a.png"
    options = ("--candidates", 2, "--negative", "two cats", "--cache", "dual", "--guidance", 3)
    status, text, _ = run("generate", "a dog", "-o", out, "--model", model, *options)
    assert status == 0 and text == f"{out}: a dog\n" and out.is_file()


def test_generate_makes_words_up_too(run, model, tmp_path):
    assert run("generate", "--model", model, "-o", tmp_path / "a.png")[0] == 0
    status, text, _ = run("generate", "two <mask> on", "--model", model, "-o", tmp_path / "b.png")
    assert status == 0 and ": two" in text and text.endswith(" on\n")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_caption_answer_and_inpaint_agree_with_the_pipeline(run, model, picture, tmp_path):
    pipe = tiny_pipeline()
    with Image.open(picture) as image:
        image.load()
    words = pipe.caption(image, generator=1, temperature=1.0).texts[0]
    assert run("caption", picture, "--model", model, "--seed", 1, "--temperature", 1)[1] == words + "\n"
    both = run("caption", picture, picture, "--model", model)[1].splitlines()
    assert len(both) == 2 and all(line.startswith(f"{picture}: ") for line in both)
    words = pipe.answer(image, "what?", generator=1, temperature=1.0).texts[0]
    assert run("answer", picture, "what?", "--model", model, "--seed", 1, "--temperature", 1)[1] == words + "\n"
    mask = Image.new("L", (24, 16))
    mask.paste(255, (0, 0, 8, 8))
    mask.save(tmp_path / "mask.png")
    options = ("--text", "a <mask>", "--seed", 1, "--paste-back", "-o", tmp_path / "out.png", "--model", model)
    status, text, _ = run("inpaint", picture, "--mask", tmp_path / "mask.png", *options)
    expected = pipe.inpaint(image, mask, "a <mask>", generator=1, paste_back=True)
    assert status == 0 and text == f"{tmp_path / 'out.png'}: {expected.texts[0]}\n"
    with Image.open(tmp_path / "out.png") as out:
        assert out.tobytes() == expected.images[0].tobytes()


def test_one_bad_picture_does_not_stop_the_others(run, model, picture, tmp_path):
    (tmp_path / "words.png").write_text("no picture")
    Image.new("RGB", (30, 30)).save(tmp_path / "large.png")
    pictures = [tmp_path / "none.png", picture, tmp_path / "words.png", tmp_path / "large.png", picture]
    options = ("--model", model, "--temperature", 1, "--seed", 4)
    status, out, error = run("caption", *pictures, *options)
    with Image.open(picture) as image:
        image.load()
    alone = tiny_pipeline().caption([image] * 5, generator=4, temperature=1.0).texts
    assert status == 1 and out.splitlines() == [f"{picture}: {alone[1]}", f"{picture}: {alone[4]}"]
    named = [line for line in error.splitlines() if line.startswith("unidiff: ")]
    assert (
        len(named) == 3
        and "none.png" in named[0]
        and "words.png" in named[1]
        and "large.png': image is 30x30 pixels" in named[2]
    )
    status, out, error = run("caption", tmp_path / "none.png", tmp_path / "words.png", *options)
    assert status == 1 and out == "" and len(error.splitlines()) == 2
    assert run("caption", tmp_path / "large.png", picture, "--resize", *options)[0] == 0


def test_pictures_are_read_as_from_python(run, model, picture, tmp_path):
    with Image.open(picture) as image:
        image.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
        exif = Image.Exif()
        exif[274] = 6
        image.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    for name in ("cmyk.jpg", "turned.png"):
        words = tiny_pipeline().caption(tmp_path / name, generator=0, temperature=1.0).texts[0]
        assert run("caption", tmp_path / name, "--model", model, "--temperature", 1)[1] == words + "\n"
        address = (tmp_path / name).as_uri()
        assert run("caption", address, "--model", model, "--temperature", 1)[1] == words + "\n"
    (tmp_path / "script.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n")
    status, _, error = run("caption", tmp_path / "script.png", "--model", model)
    assert status == 1 and "PostScript" in error


def test_flags_are_the_options_of_a_decode(run):
    from unidiff.pipelines.options import FLAGS

    status, out, _ = run("generate", "--help")
    assert status == 0 and all(flag.name in out for flag in FLAGS.values())
    status, _, error = run("generate", "a", "--cache", "autoo")
    assert status == 1 and "expected one of auto, " in error and "did you mean 'auto'?" in error


def test_a_fault_of_ours_shows_where_it_is(run, model, monkeypatch):
    monkeypatch.setattr("unidiff.pipeline.UniDiffPipeline.caption", lambda *_: {}["no"])
    status, _, error = run("caption", "none.png", "--model", model)
    assert status == 1  # a missing picture is no fault
    monkeypatch.setattr(sys.modules["unidiff.cli.app"], "open_image", lambda path: Image.new("RGB", (24, 16)))
    status, _, error = run("caption", "a.png", "--model", model)
    assert status == 70 and "Traceback" in error and "Please report it" in error


def test_resize_accepts_any_picture(run, model, tmp_path):
    Image.new("L", (100, 90), 30).save(tmp_path / "large.jpg")
    status, _, error = run("caption", tmp_path / "large.jpg", "--model", model)
    assert status == 1 and "100x90 pixels but this model takes 24x16" in error
    assert run("caption", tmp_path / "large.jpg", "--model", model, "--resize", "--max-text-tokens", 2)[0] == 0


def test_info_and_pack(run, tmp_path):
    transformer, image, text, _ = tiny_parts()
    for part, name in ((transformer, "t"), (image, "i"), (text, "x")):
        part.save_pretrained(tmp_path / name)
    parts = [tmp_path / "t", tmp_path / "i", tmp_path / "x", tmp_path / "model"]
    status, out, _ = run("pack", *parts, "--text-length", 10, "--image-size", "24x16")
    assert status == 0 and out == f"{tmp_path / 'model'}\n"
    status, out, _ = run("info", "--model", tmp_path / "model")
    assert status == 0 and "24 x 16 pixels, 6 codes" in out and "16 codes, factor 8" in out
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "UniDiffPipeline"] and index["settings"]["grid"] == [2, 3]


def test_eval_emoji_writes_its_numbers(run, model, tmp_path, monkeypatch):
    from unidiff.evaluation.report import Estimate, EvaluationReport

    def evaluate(pipe, seed, n, tick, **options):
        tick(0, 4, "captions")
        report = EvaluationReport(about={"seed": seed, "n": n, **options})
        report.add("categories.single_object", Estimate.share([True] * 3 + [False]))
        return report

    monkeypatch.setattr("unidiff.worlds.emoji.evaluation.run_emoji_eval", evaluate)
    options = ("--seed", 5, "--n", 7, "--candidates", 4, "--json", tmp_path / "made" / "r.json", "--model", model)
    status, out, _ = run("eval", "emoji", *options, "--guidance", 1, "--steps", 3)
    data = json.loads((tmp_path / "made" / "r.json").read_text())
    assert status == 0 and "0.750" in out
    asked = {"num_candidates": 4, "guidance_scale": 1.0, "steps": 3}
    about = {"seed": 5, "n": 7, "batch_size": 64, "suite": "emoji", "model": model, "dtype": "float32"}
    assert data["about"] == {**about, **asked} and data["categories"]["single_object"] == 0.75
    assert "outcomes" not in data

    first, second, changes = (tmp_path / f"{name}.json" for name in ("first", "second", "changes"))
    assert run("eval", model, "--suite", "emoji", "--outcomes", "--json", first)[0] == 0
    monkeypatch.setattr(Estimate, "share", classmethod(lambda cls, x, f=Estimate.share: f(not v for v in x)))
    status, out, _ = run("eval", "emoji", "--outcomes", "--json", second, "--against", first, "--model", model)
    assert status == 0 and "-0.500" in out
    status, out, _ = run("eval", "compare", first, second, "--json", changes)
    assert status == 0 and "-0.500" in out
    assert json.loads(changes.read_text())["differences"]["categories.single_object"]["n"] == 4
    status, _, error = run("eval", "emoji", "--against", tmp_path / "made" / "r.json", "--model", model)
    assert status == 1 and "differ in seed (5 and 0)" in error
    (tmp_path / "text.json").write_text("{")
    status, _, error = run("eval", "compare", first, tmp_path / "text.json")
    assert status == 1 and "text.json' cannot be read as an evaluation" in error


MISTAKES = {
    "empty prompt": (["generate", " ", "-o", "OUT"], "prompt is empty"),
    "long prompt": (["generate", "a picture of a dog, a cat, an owl and a fox", "-o", "OUT"], "at most 9"),
    "steps 0": (["generate", "a", "--steps", 0, "-o", "OUT"], "steps is 0"),
    "negative guidance": (["generate", "a", "--guidance", -1, "-o", "OUT"], "guidance scale is -1"),
    "texts with and without holes": (["generate", "a", "a <mask>", "-o", "OUT"], "run them apart"),
    "negative without a prompt": (["generate", "a <mask>", "--negative", "b", "-o", "OUT"], "--negative goes with"),
    "unknown cache": (["generate", "a", "--cache", "huge", "-o", "OUT"], "huge"),
    "missing model": (["generate", "a", "--model", "NEW", "-o", "OUT"], "new' does not exist"),
    "device": (["generate", "a", "--device", "abacus", "-o", "OUT"], "device 'abacus' cannot be used"),
    "dtype": (["generate", "a", "--dtype", "int4", "-o", "OUT"], "dtype is 'int4'"),
    "ending": (["generate", "a", "-o", "x.gif"], "must end in .png or"),
    "gif ending": (["generate", "a", "--gif", "x.png"], "must end in .gif"),
    "folder as output": (["generate", "a", "-o", "FOLDER"], "is a folder"),
    "two outputs in one file": (["generate", "a", "-o", "OUT", "--filmstrip", "OUT"], "are the same file"),
    "input as output": (["inpaint", "IN", "--text", "a <mask>", "-o", "IN"], "would overwrite the input"),
    "mask as output": (["inpaint", "IN", "--mask", "SMALL", "--filmstrip", "SMALL"], "would overwrite the input"),
    "count": (["generate", "a", "--steps", 10**8, "-o", "OUT"], "steps is 100000000"),
    "meta": (["generate", "a", "--device", "meta", "-o", "OUT"], "device 'meta' cannot be used"),
    "seed": (["generate", "a", "--seed", 2**64, "-o", "OUT"], "does not fit into 64 bits"),
    "holes": (["generate", "a <mask:x>", "-o", "OUT"], "'<mask:x>' is no hole"),
    "json over its input": (["eval", "emoji", "--json", "a.json", "--against", "a.json"], "would overwrite the input"),
    "compare over its input": (
        ["eval", "compare", "a.json", "b.json", "--json", "b.json"],
        "would overwrite the input",
    ),
    "output under a file": (["generate", "a", "-o", "IN/x.png"], "which is a file"),
    "missing picture": (["caption", "none.png"], "'none.png' does not exist"),
    "no picture": (["caption", "TEXT"], "cannot be read as a picture"),
    "empty question": (["answer", "IN", ""], "question is empty"),
    "mask of another size": (["inpaint", "IN", "--mask", "SMALL", "-o", "OUT"], "8x8 pixels but the image is 24x16"),
    "all known": (["inpaint", "IN", "--text", "a dog", "-o", "OUT"], "nothing is left to decode"),
    "missing mask": (["inpaint", "IN", "--mask", "none.png", "-o", "OUT"], "'none.png' does not exist"),
    "unknown suite": (["eval", "emoji", "--suite", "emojy"], "did you mean 'emoji'?"),
    "suite without prompts": (["eval", "emoji", "--suite", "geneval"], "geneval needs --prompts"),
    "public suite with cases": (
        ["eval", "emoji", "--suite", "pope", "--prompts", "IN", "-o", "NEW", "--n", 3],
        "--n does not go with pope",
    ),
    "prompts for a world": (["eval", "emoji", "--prompts", "IN"], "go with a public benchmark"),
    "two counts of cases": (["eval", "emoji", "--n", 3, "--per-task", 3], "give one of them"),
    "old model option": (["eval", "NEW", "--model", "emoji"], "write `unidiff eval emoji --suite NAME`"),
    "json ending": (["eval", "emoji", "--json", "x.txt"], "must end in .json"),
    "outcomes without a file": (["eval", "emoji", "--outcomes"], "--outcomes goes with --json"),
    "demo into a file": (["demo", "-o", "IN"], "is a file"),
    "demo of other pictures": (["demo", "-o", "NEW"], "needs square pictures"),
    "pack without parts": (["pack", "none", "none", "none", "NEW"], "does not exist"),
    "pack size": (["pack", "none", "none", "none", "NEW", "--image-size", "big"], "--image-size is 'big'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_sentence_and_write_nothing(run, model, picture, tmp_path, name):
    arguments, words = MISTAKES[name]
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "text.png").write_text("no picture")
    Image.new("L", (8, 8), 255).save(tmp_path / "small.png")
    places = {"OUT": "out.png", "FOLDER": "folder.png", "TEXT": "text.png", "SMALL": "small.png", "NEW": "new"}
    filled = [str(tmp_path / places[str(a)]) if str(a) in places else str(a).replace("IN", picture) for a in arguments]
    before = sorted(tmp_path.rglob("*"))
    takes_model = arguments[0] != "pack" and arguments[1] != "compare" and not {"--model", "--suite"} & set(arguments)
    status, _, error = run(*filled, *(["--model", model] if takes_model else []))
    message = error.strip().splitlines()[-1]
    assert status == 1 and message.startswith("unidiff: ") and words in message
    assert "Traceback" not in error and sorted(tmp_path.rglob("*")) == before
    assert not Path("x.gif").exists()


def test_usage_mistakes_exit_with_2(run):
    assert run("caption")[0] == 2
    assert run("generate", "a", "--count", 0)[0] == 2
    assert run("generate", "a", "--count", 10**8)[0] == 2
    assert run("eval", "emoji", "--per-task", 2**63)[0] == 2
    assert run("paint")[0] == 2
