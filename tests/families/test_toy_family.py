"""A family is one package: nothing of unidiff names it; info, verify, convert, loading and the pipeline find it."""

from __future__ import annotations

from toy_packages import run_with

PACKAGE = """
from unidiff.decoding.config import ModalityDecoding, SamplerConfig
from unidiff.families.chat import TextLayout
from unidiff.families.checkpoint.keymap import KeyMap
from unidiff.families.family import Family, Release, Tiny
from unidiff.tokens import Vocabulary


def settings(config):
    shape = {"hidden_size": config["toy_width"], "num_layers": 1, "num_heads": 2, "modality_embedding": False}
    return {**shape, "vocab_size": config["toy_words"] + 1, "rope": "1d"}


def vocabulary(config):
    words = config["toy_words"]
    return Vocabulary(words + 1, (0, words), (words, words), words, specials={"eos": 0})


TOY = Family(
    name="toy",
    keys=(r"^toy_embed_tokens",),
    fits=lambda config: "toy_width" in config,
    settings=settings,
    keymap=lambda model, spelling: KeyMap.of(model, lambda name: f"toy_{name}"),
    vocabulary=vocabulary,
    releases=(Release("toy-1", {"toy_width": 8, "toy_words": 300}),),
    tiny=Tiny({"toy_width": 8, "toy_words": 300}, (0.0, 1.0, 0.0, 0.0)),
    layout=lambda released, texts: TextLayout(
        released.vocabulary, texts.encode, SamplerConfig(ModalityDecoding(schedule="linear")), family="toy"
    ),
)
"""
RUN = """
import json, sys
from pathlib import Path

from safetensors.torch import load_file, save_file

from unidiff import UniDiffPipeline
from unidiff.cli.app import app
from unidiff.families import FAMILIES, load_released
from unidiff.families.checkpoint.convert import convert
from unidiff.families.checkpoint.verify import formula_weights
from unidiff.families.checkpoint.verify import verify
from unidiff.tokens.text import TextTokenizer

here, toy = Path(sys.argv[1]), FAMILIES["toy"]
released = here / "released"
released.mkdir()
save_file(formula_weights(toy), released / "model.safetensors")
(released / "config.json").write_text(json.dumps(toy.tiny.config))
assert load_released(released).family is toy
found = verify(released)
assert (found.family, found.release) == ("toy", "toy-1")
assert [check.name for check in found.checks if not check.passed] == ["known answer"]  # which was made up
convert(released, here / "own")
convert(here / "own", here / "back")
one, two = (load_file(here / name / "model.safetensors") for name in ("released", "back"))
assert one.keys() == two.keys() and all((one[name] == two[name]).all() for name in one)
texts = TextTokenizer.train(["a red fox on a hill", "two owls"], 300)
texts.save_pretrained(released)
pipe = UniDiffPipeline.from_pretrained(released)
out = pipe.complete("a red", 4, generator=0)
assert len(out.texts) == 1 and out.nfe <= 4
assert pipe.infill("a <mask> fox", generator=0, cache="prefix").texts[0].endswith("fox")
app(["info", str(released)], standalone_mode=False)
"""


def test_a_family_of_another_package(tmp_path):
    run_with(tmp_path, "families", PACKAGE, RUN)
