"""A family."""

from unidiff.decoding import ModalityDecoding, SamplerConfig
from unidiff.families.chat import TextLayout
from unidiff.families.checkpoint.keymap import KeyMap
from unidiff.families.family import Family, Release, Tiny
from unidiff.tokens import Vocabulary

PUBLISHED = {"lab_width": 8, "lab_words": 60}


def settings(config):
    shape = {"hidden_size": config["lab_width"], "num_layers": 1, "num_heads": 2, "modality_embedding": False}
    return {**shape, "vocab_size": config["lab_words"] + 1, "rope": "1d"}


def vocabulary(config):
    words = config["lab_words"]
    return Vocabulary(words + 1, (0, words), (words, words), mask_id=words, specials={"eos": 0})


def layout(released, texts):
    sampler = SamplerConfig(ModalityDecoding(rule="quota", steps=8))
    return TextLayout(released.vocabulary, texts.encode, sampler, paced=True, left=False, family="lab")


LAB = Family(
    name="lab",
    keys=(r"^lab_embed_tokens",),
    fits=lambda config: "lab_width" in config,
    settings=settings,
    keymap=lambda model, spelling: KeyMap.of(model, lambda name: f"lab_{name}"),
    vocabulary=vocabulary,
    releases=(Release("lab-1", PUBLISHED),),
    tiny=Tiny(PUBLISHED, (0.0, 1.0, 0.0, 0.0)),
    layout=layout,
)
