"""Command lines of every recipe, right and wrong in every way: a small world of files, and a generator of lines."""

from __future__ import annotations

import contextlib
import io
import os
import random
import runpy
import shutil
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from emoji_fakes import vocabulary_words
from shard_samples import write_samples
from tiny_pipeline import tiny_pipeline
from train_fixtures import MIXED, TINY, tiny_table

from unidiff.config import all_keys
from unidiff.train.config import TrainConfig
from unidiff.train.data.source import TokenTable
from unidiff.train.image_tokenizer.config import ImageTokenizerConfig
from unidiff.worlds.emoji.demo import PROMPTS
from unidiff.worlds.emoji.scenes import get_profile

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 300
"""A run that takes longer hangs: all that are right take seconds."""

# what is never a good value of anything
BAD = ["", "[", "]", "{", "{a", "&a [*a]", "*x", "!!python/object:os.system", "${oops", "${oc.env:HOME}", "nan", "inf", "-inf", "1e999",
       "9" * 30, "-" + "9" * 30, "-1", "1.5.2", "x" * 3000, "🦊", "\udcff", "a\nb", "\x00", "[[[[[[", "[" * 3000, "{a: {b: {c: 1}}}", "~",
       "~/x", "~nobody/x", "null", "None", "on", "0x10", "12:30", "a=b", "=", "[1, 2", "'", '"', "# x", " ", "\t", "--", "١"]  # fmt: skip
MODEL = ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "ffn_size", "norm", "qk_norm", "activation", "rope", "dropout",
         "attention", "block_length", "tie_head", "time_conditioning", "vocab_size", "self", "nope", "cond_dim", "rope_theta")  # fmt: skip
SOMETIMES = [
    "0",
    "1",
    "2",
    "3",
    "-1",
    "-0.5",
    "0.5",
    "1e-30",
    "1.5",
    "1e-3",
    "true",
    "false",
    "[]",
    "{}",
    "[a, b]",
    "none",
    "auto",
    "cpu",
    "float32",
]
"""Good values of some settings, none of which makes a run long."""
DEVICES = ["cuda", "cuda:7", "mps", "meta", "tpu", "xla:0", "cpu:99", "CPU", "auto", "cpu", "vulkan", ""]
READ = ["nowhere", "nowhere.yaml", "empty", "latin.yaml", "broken.yaml", "list.yaml", "deep.yaml", "wide.yaml", "cut.tar", "picture.png",
        "cut.png", "folder", "fifo", "loop", "/dev/zero", "/dev/null", "/dev/full", "/proc/self/mem", "a\nb", "n" * 300, ".", "",
        "base/transformer", "base", "raw/00000.tar", "raw", "table.safetensors", "prompts.txt", "http://127.0.0.1:9/x.tar", "~/x",
        "file:///nowhere", "gone@2", "{0..99999999999}.tar", "{a", "[x", "words", "codes", "null.json", "s3://bucket/x.tar", "-"]  # fmt: skip
WRITE = ["/dev/full", "/dev/null", "/dev/full/x", "empty", "empty/x", "loop", "loop/x", "n" * 300, "/proc/x/y", "fifo", "\x00", "~/x",
         "out/a b", "out/🦊", "out/x/y/z", "out/\udcff", "out/link"]  # fmt: skip
JUNK = ["--nope", "-z", "--", "", "-", "--steps", "extra", "--help=3", "key", "=x", "a.b.c=1", "lr=1", "..=1"]


@dataclass(frozen=True)
class Recipe:
    """A right command.

    Args:
        path: of the script. words: those that may be changed, as (kind, word) with a kind "in", "out" or "word".
        fixed: kept as they are, behind the others: they bound the work. flags: with the kind of their values.
        schema: of its `key=value` words.
    """

    path: str
    words: tuple[tuple[str, str], ...] = ()
    fixed: tuple[str, ...] = ()
    flags: dict[str, str] = field(default_factory=dict)
    schema: type | None = None


_TRAIN = (*TINY, *MIXED, "steps=2", "checkpoint.every=1", "logging.progress=false", "logging.every=1")
_REWARD = ("--steps", "1", "--prompts-per-step", "1", "--group", "2", "--masks", "1")
_NUMBERS = dict.fromkeys(("--seed", "--count"), "number")
RECIPES = (
    Recipe("training/pretrain.py", (("in", "run.yaml"), ("out", "output=out/run"), ("in", "data.train=table.safetensors")), schema=TrainConfig),
    Recipe("training/finetune.py", (("in", "base"), ("in", "tune.yaml"), ("out", "output=out/tuned"), ("in", "data.train=own.safetensors")),
           schema=TrainConfig),
    Recipe("training/plan.py", (("in", "plan.yaml"),), (), {"--gpus": "number", "--memory": "number", "--tflops": "number"}, TrainConfig),
    Recipe("training/benchmark.py", (("in", "plan.yaml"), ("out", "--json=out/r.json")), ("--head-only", "device=cpu", "batch_size=1"), {"--json": "out"}, TrainConfig),
    Recipe("training/change_tokens.py", (("word", "image"), ("in", "base"), ("in", "base/image_tokenizer"), ("out", "out/new"),
           ("in", "--shards=raw/00000.tar")), ("--count", "8"), {"--seed": "number", "--shards": "in"}),
    Recipe("training/change_tokens.py", (("word", "text"), ("in", "base"), ("out", "out/new"), ("word", "--add= axolotl")), (), {"--add": "number"}),
    Recipe("training/make_emoji_atlas.py", (), ("--out", "out/atlas"), {"--font": "in", "--names": "in"}),
    Recipe("training/make_emoji_shards.py", (("word", "shards"), ("out", "out/shards")), ("--count", "2"),
           {"--profile": "number", "--split": "number", "--seed": "number", "--per-shard": "number"}),
    Recipe("training/make_emoji_shards.py", (("word", "text"), ("out", "out/text")), ("--count", "30", "--vocab-size", "300"), {"--profile": "number"}),
    Recipe("training/make_emoji_shards.py", (("word", "table"), ("out", "out/t.safetensors"), ("in", "--image-tokenizer=base/image_tokenizer"),
           ("in", "--text-tokenizer=base/text_tokenizer"), ("word", "--text-length=40")), ("--count", "2"),
           {"--captions": "number", "--kinds": "number", "--split": "number", "--yes-no": "number"}),
    Recipe("training/reward_tuning.py", (("in", "base"), ("out", "out/rewarded"), ("in", "--prompts=prompts.txt"), ("word", "--reward=a_reward:bright")),
           _REWARD, {"--lr": "number", "--lora": "number", "--keep": "number", "--beta": "number", "--kinds": "number", "--states": "number",
                     "--rows": "number", "--cache": "number", "--seed": "number", "--reward": "number", "--passes": "number", "--track": "number",
                     "--guidance-scale": "number", "--prompts": "in", "--checkpoint-every": "number", "--device": "device"}),
    Recipe("tokenizers/train_image_tokenizer.py", (("in", "codes.yaml"), ("out", "out=out/codes"), ("in", "data.shards=[raw/00000.tar]")),
           schema=ImageTokenizerConfig),
    Recipe("tokenizers/train_text_tokenizer.py", (("out", "out/words"), ("in", "--text=prompts.txt"), ("in", "--shards=raw/00000.tar")), (),
           {"--config": "in", "--vocab-size": "number", "--limit": "number", "--text": "in", "--shards": "in"}),
    Recipe("tokenizers/encode_shards.py", (("out", "out/tokens"), ("in", "--shards=raw/00000.tar"), ("in", "--image-tokenizer=base/image_tokenizer"),
           ("in", "--text-tokenizer=base/text_tokenizer"), ("word", "--image-size=16"), ("word", "--text-length=40")), ("--workers", "0"),
           {"--batch-size": "number", "--samples-per-shard": "number", "--device": "device", "--image-size": "number", "--text-length": "number"}),
    Recipe("inference/benchmark.py", (("word", "--suite=smoke"), ("out", "--json=out/b.json")), ("--runs", "1", "--blocks", "1", "--only", "dual"),
           {"--shape": "number", "--threads": "number", "--device": "device", "--seed": "number", "--cells": "out", "--only": "number",
            "--task": "number", "--batch": "number", "--dtype": "number", "--setting": "number"}),
    Recipe("inference/caption.py", (("in", "picture.png"),)),
    Recipe("inference/joint_inpaint.py"),
    Recipe("inference/text_to_image.py", (("word", "a fox on a green background"),)),
)  # fmt: skip


def build(folder: Path) -> None:
    """Everything that the lines name, right or damaged, in `folder`."""
    corpus = [p for p, _ in PROMPTS] * 2 + vocabulary_words(get_profile("cpu")) * 2
    pipe = tiny_pipeline(text_length=40, grid=(8, 8), corpus=corpus)
    pipe.save_pretrained(folder / "base")
    rows = {"codes": torch.randint(0, 16, (24, 8, 8)), "captions": torch.full((24, 1, 40), 9)}
    TokenTable(rows, pipe.settings.vocabulary).save(folder / "own.safetensors")
    tiny_table(72).save(folder / "table.safetensors")
    write_samples(folder / "raw", 12)
    (folder / "prompts.txt").write_text("a dog\ntwo cats\n" * 20)
    (folder / "a_reward.py").write_text("def bright(prompts, pictures):\n    return pictures.flatten(1).mean(1)\n")
    bare = tuple(word for word in _TRAIN if not word.startswith(("model", "tasks")))
    nested = {
        "tune.yaml": bare,
        "run.yaml": _TRAIN,
        "plan.yaml": (*_TRAIN, "data.vocabulary=unidisc-magvit", "data.grid=4", "data.text_length=16"),
    }
    for name, words in nested.items():
        from unidiff.config import dump_config
        from unidiff.train.config import read_config

        (folder / name).write_text(dump_config(read_config(None, list(words))))
    codes = "steps: 2\nbatch_size: 2\nwarmup_steps: 1\ndata: {image_size: 16}\nthreads: 1\n"
    codes += (
        "model: {codebook_size: 16, encoder_width: 8, encoder_depth: 1, decoder_widths: [8], decoder_depths: [1]}\n"
    )
    (folder / "codes.yaml").write_text(codes)
    (folder / "empty").write_bytes(b"")
    (folder / "latin.yaml").write_bytes("output: é\n".encode("latin-1"))
    (folder / "broken.yaml").write_text("steps: [1\n")
    (folder / "list.yaml").write_text("- 1\n")
    (folder / "null.json").write_text("null")
    (folder / "deep.yaml").write_text("model: " + "[" * 4000)
    (folder / "wide.yaml").write_bytes("steps: 1".encode("utf-16"))
    tar = (folder / "raw" / "00000.tar").read_bytes()
    (folder / "cut.tar").write_bytes(tar[: len(tar) // 2 + 77])
    from PIL import Image

    Image.new("RGB", (64, 64), "red").save(folder / "picture.png")
    (folder / "cut.png").write_bytes((folder / "picture.png").read_bytes()[:60])
    (folder / "folder").mkdir()
    os.mkfifo(folder / "fifo")
    (folder / "loop").symlink_to("loop")


def snapshot(folder: Path) -> dict[str, tuple]:
    """What lies outside of `out`: names, kinds, sizes and times of change."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name.split("/")[0] == "out" or "__pycache__" in name:
            continue
        status = path.lstat()
        found[name] = (status.st_mode, 0, 0) if path.is_dir() else (status.st_mode, status.st_size, status.st_mtime_ns)
    return found


def lines(seed: int, count: int) -> Iterator[tuple[str, list[str], bool]]:
    """(script, words, whether `out` is emptied before), every recipe in turn."""
    chance = random.Random(seed)
    for number in range(count):
        recipe = RECIPES[number % len(RECIPES)]
        words, fixed = list(recipe.words), list(recipe.fixed)
        for _ in range(chance.choice((0, 1, 1, 1, 2, 3) if number >= len(RECIPES) else (0,))):
            _change(chance, recipe, words, fixed)
        yield recipe.path, [word for _, word in words] + fixed, chance.random() < 0.85


def _change(chance: random.Random, recipe: Recipe, words: list[tuple[str, str]], fixed: list[str]) -> None:
    """One thing less right. In place."""
    ways = (
        ["place"] * (3 * bool(words))
        + ["flag"] * (3 * bool(recipe.flags))
        + ["setting"] * (6 * bool(recipe.schema))
        + ["junk"]
    )
    way = chance.choice(ways)
    if way == "place":
        at = chance.randrange(len(words))
        kind, word = words[at]
        key, equals, _ = word.partition("=")
        value = chance.choice({"in": READ, "out": WRITE}.get(kind, BAD))
        if key == "data.shards" and chance.random() < 0.7:
            value = f"[{value}]"
        words[at] = (kind, f"{key}={value}" if equals else value)
        if kind == "word" and chance.random() < 0.3:
            del words[at]
    elif way == "flag":
        flag, kind = chance.choice(list(recipe.flags.items()))
        values = {"in": READ, "out": WRITE, "device": DEVICES}.get(kind, BAD + SOMETIMES)
        words += [("word", flag), ("word", chance.choice(values))]
    elif way == "setting":
        assert recipe.schema is not None
        model = [f"model.{name}" for name in MODEL] if recipe.schema is TrainConfig else []
        key = chance.choice([*all_keys(recipe.schema), *model])
        last, values = key.rpartition(".")[2], BAD if chance.random() < 0.4 else SOMETIMES
        if last in ("output", "out"):
            values = WRITE
        elif last == "device":
            values = DEVICES
        elif last in ("train", "validation", "documents", "image", "text", "init_from", "shards"):
            values = READ + BAD
        elif last in ("steps", "batch_size"):
            values = [*BAD, "0", "1", "2", "1000000000", "1e12"] if last == "batch_size" else [*BAD, "0", "1"]
        words.append(("word", f"{key}={chance.choice(values)}"))
    else:
        words.insert(chance.randrange(len(words) + 1), ("word", chance.choice(JUNK)))


class Hung(BaseException):
    """A run took longer than `SECONDS`."""


def run(path: str, words: list[str]) -> tuple[object, str, str]:
    """A recipe in this process, as `python path words`: (exit status or the exception that escaped, stdout, stderr)."""

    def alarm(number, frame):
        raise Hung

    out, err, before = io.StringIO(), io.StringIO(), (sys.argv, list(sys.path), torch.get_num_threads())
    old = signal.signal(signal.SIGALRM, alarm)
    signal.alarm(SECONDS)
    sys.argv = [path, *words]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(str(ROOT / path), run_name="__main__")
        status: object = 0
    except SystemExit as left:
        status = 0 if left.code is None else left.code
    except BaseException as error:
        status = error
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
        sys.argv, sys.path[:] = before[0], before[1]
        torch.set_num_threads(before[2])
    return status, out.getvalue(), err.getvalue()


def fresh(folder: Path, empty: bool) -> None:
    """The folder `out`, empty or as the run before left it."""
    if empty:
        shutil.rmtree(folder / "out", ignore_errors=True)
    (folder / "out").mkdir(exist_ok=True)
