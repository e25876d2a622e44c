"""Training data from the emoji scene generator. Torch is imported inside."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from unidiff.cli.recipes.scenes import Seed, Split, world_commands

if TYPE_CHECKING:
    from unidiff.tokens.text import TextTokenizer
    from unidiff.worlds.scene_rows import SceneSource

ProfileName = Annotated[str, typer.Option(help="Cpu (64 px, 64 objects) or gpu (128 px, the whole atlas)")]


def _scenes(
    profile: ProfileName = "cpu",
    seed: Seed = 0,
    split: Split = "train",
    questions: Annotated[int, typer.Option(min=0, max=1000, help="Per scene, as EmojiEval asks")] = 2,
    yes_no: Annotated[
        int, typer.Option(min=0, max=1000, help="More questions per scene, all answered by yes or no")
    ] = 0,
    lookup: Annotated[
        int, typer.Option(min=0, max=1000, help="More questions per scene: where is it, how many are there")
    ] = 0,
    kinds: Annotated[
        tuple[float, float, float, float],
        typer.Option(help="Relative frequency of single, count, pair and group scenes"),
    ] = (0.45, 0.2, 0.2, 0.15),
) -> SceneSource:
    from unidiff.worlds.emoji.scenes import SceneGenerator, get_profile
    from unidiff.worlds.emoji.table import EmojiScenes, QuestionMix

    scenes = SceneGenerator(get_profile(profile, kinds=kinds), seed, split)
    return EmojiScenes(scenes, QuestionMix(questions, yes_no, lookup))


def _with_phrasings(tokenizer: TextTokenizer, profile: str, **options: Any) -> None:
    """Give the tokenizer the words that people use, and the normaliser that puts them into the grammar."""
    from unidiff.worlds.emoji.phrasing import normaliser, understood_words
    from unidiff.worlds.emoji.scenes import default_atlas, get_profile

    names = get_profile(profile).names
    tokenizer.known_words = (tokenizer.known_words or set()) | understood_words()
    phrases = normaliser(names, default_atlas().characters[: len(names)])
    tokenizer.tokenizer.backend_tokenizer.normalizer = phrases  # type: ignore[attr-defined]


emoji_app = world_commands(
    "emoji",
    "Training data of emoji scenes. `table` is the fast way to train the embedded model: pictures are tokenised "
    "once and held in memory.",
    _scenes,
    text_length=24,
    finish=_with_phrasings,
)
