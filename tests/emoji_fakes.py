"""Models for tests of the evaluation: always right, moved to the next case, or small and untrained."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from unidiff.models.transformer import MaskedTransformer
from unidiff.pipeline import UniDiffPipeline
from unidiff.pipelines.settings import PipelineSettings
from unidiff.tokens.image.vq import CellVQModel
from unidiff.tokens.text import TextTokenizer
from unidiff.worlds.asked import Drawn
from unidiff.worlds.emoji.cases import CATEGORIES, HELD_OUT, InpaintCase, inpaint_cases, prompt_cases, question_cases
from unidiff.worlds.emoji.language import NUMBERS, ZONES, article, caption_distribution, draw_caption, plural
from unidiff.worlds.emoji.oracle import Oracle
from unidiff.worlds.emoji.scenes import BACKGROUNDS, Profile, SceneGenerator, get_profile, render_batch
from unidiff.worlds.emoji.table import EmojiScenes
from unidiff.worlds.scene_rows import corpus, scene_vocabulary


def vocabulary_words(profile: Profile) -> list[str]:
    """Every phrase the grammar is made of."""
    return [*BACKGROUNDS, *NUMBERS.values(), *ZONES.values(), *(f(n) for n in profile.names for f in (article, plural))]


class PerfectModel:
    """Knows the cases of one seed, and reads pictures with the oracle."""

    def __init__(self, profile: Profile, seed: int, n: int) -> None:
        self.profile, self.oracle = profile, Oracle(profile)
        categories = (*CATEGORIES, HELD_OUT)
        self.drawings = {c.prompt: c.scene for k in categories for c in prompt_cases(k, n, seed, profile)}
        self.answers = {(c.scene, c.question): c.answer for c in question_cases(n, seed, profile)}
        self.holes = {c.caption: c.scene for c in inpaint_cases(n, seed, profile)}

    def reconstruct(self, images: Tensor) -> Tensor:
        return images

    def text_to_image(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        return render_batch([self.drawings[p] for p in prompts], self.profile)

    def caption(self, images: Tensor, seeds: Sequence[int]) -> list[str]:
        scenes = [r.scene for r in self.oracle.read(images)]
        return [draw_caption(scene, random.Random(seed)) for scene, seed in zip(scenes, seeds) if scene]

    def answer(self, images: Tensor, questions: Sequence[str], seeds: Sequence[int]) -> list[str]:
        return [self.answers[r.scene, q] for r, q in zip(self.oracle.read(images), questions) if r.scene]

    def inpaint(self, images: Tensor, masks: Tensor, texts: Sequence[InpaintCase], seeds: Sequence[int]) -> Drawn:
        pictures = render_batch([self.holes[hole.before + hole.name + hole.after] for hole in texts], self.profile)
        return Drawn(pictures, [h.before + h.name + h.after for h in texts], [True] * len(texts))

    def generate(self, seeds: Sequence[int]) -> Drawn:
        scenes = [SceneGenerator(self.profile, seed=1).scene(seed % 100_000) for seed in seeds]
        captions = [next(iter(caption_distribution(scene))) for scene in scenes]
        return Drawn(render_batch(scenes, self.profile), captions, [True] * len(scenes))


class ShuffledModel(PerfectModel):
    """Every result belongs to the case before."""

    def text_to_image(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        return super().text_to_image(prompts, seeds).roll(1, 0)

    def caption(self, images: Tensor, seeds: Sequence[int]) -> list[str]:
        return super().caption(images.roll(1, 0), seeds)

    def inpaint(self, images: Tensor, masks: Tensor, texts: Sequence[InpaintCase], seeds: Sequence[int]) -> Drawn:
        out = super().inpaint(images, masks, texts, seeds)
        return Drawn(out.images.roll(1, 0), out.texts, [False] * len(texts))

    def generate(self, seeds: Sequence[int]) -> Drawn:
        out = super().generate(seeds)
        return Drawn(out.images[:1].expand(len(seeds), -1, -1, -1), out.texts, out.untouched)


class BlurredModel(PerfectModel):
    """Draws the right things, hardly recognisable."""

    def reconstruct(self, images: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(images, 11, 1, 5, count_include_pad=False)


def tiny_emoji_pipeline(image_size: int = 64) -> UniDiffPipeline:
    """Untrained weights, and words of the emoji grammar."""
    torch.manual_seed(0)
    words = TextTokenizer.train(corpus(EmojiScenes(SceneGenerator(get_profile("cpu"), 0)), 300), 400)
    vocabulary = scene_vocabulary(words, 64)
    model = MaskedTransformer(vocab_size=vocabulary.size, hidden_size=32, num_layers=1, num_heads=2)
    image = CellVQModel(codebook_size=64, encoder_width=16, encoder_depth=1, decoder_widths=(16,), decoder_depths=(1,))
    grid = (image_size // 8, image_size // 8)
    return UniDiffPipeline(model, image, words.tokenizer, PipelineSettings(vocabulary, text_length=40, grid=grid))
