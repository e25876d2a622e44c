"""Training data from the emoji scene generator. Torch is imported inside."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import track

from unidiff.files import check_writable

emoji_app = typer.Typer(
    name="emoji",
    help="Training data of emoji scenes. `table` is the fast way to train the embedded model: pictures are tokenised "
    "once and held in memory.",
    no_args_is_help=True,
)
ProfileName = Annotated[str, typer.Option(help="Cpu (64 px, 64 objects) or gpu (128 px, the whole atlas)")]
Seed = Annotated[int, typer.Option(help="Other seeds give other scenes")]
Split = Annotated[str, typer.Option(help="Train, held_out or all")]
Count = Annotated[int, typer.Option(min=1, max=10**9)]
Length = Annotated[int, typer.Option(min=2, max=2**20)]


@emoji_app.command()
def shards(
    out: Annotated[Path, typer.Argument(help="Folder for the tars")],
    count: Count = 10_000,
    profile: ProfileName = "cpu",
    seed: Seed = 0,
    split: Split = "train",
    per_shard: Count = 1000,
) -> None:
    """Write raw webdataset shards."""
    from unidiff.data.collect import write_note
    from unidiff.data.tar import ShardWriter
    from unidiff.worlds.emoji.scenes import SceneGenerator, get_profile
    from unidiff.worlds.emoji.table import raw_samples

    check_writable(out / "00000.tar")
    if any(out.glob("*.tar")):
        raise ValueError(f"{str(out)!r} holds shards already; name another folder")
    scenes = SceneGenerator(get_profile(profile), seed, split)
    with ShardWriter(out, per_shard) as writer:
        for key, members in track(raw_samples(scenes, count), "scenes", total=count):
            writer.write(key, members)
    side = scenes.profile.image_size
    write_note(out, (side, side), writer.written)


@emoji_app.command()
def text(
    out: Annotated[Path, typer.Argument(help="Folder for the tokenizer")],
    profile: ProfileName = "cpu",
    vocab_size: Count = 1024,
    count: Count = 20_000,
    seed: Seed = 0,
) -> None:
    """Train the byte-level BPE on the generator's own captions, questions and answers."""
    from unidiff.tokens.text import TextTokenizer, words_of
    from unidiff.worlds.emoji.phrasing import normaliser, understood_words
    from unidiff.worlds.emoji.scenes import SceneGenerator, default_atlas, get_profile
    from unidiff.worlds.emoji.table import corpus

    texts = list(corpus(SceneGenerator(get_profile(profile), seed), count))
    tokenizer = TextTokenizer.train(texts, vocab_size)
    tokenizer.known_words = {word for line in texts for word in words_of(line)} | understood_words()
    names = get_profile(profile).names
    phrases = normaliser(names, default_atlas().characters[: len(names)])
    tokenizer.tokenizer.backend_tokenizer.normalizer = phrases  # type: ignore[attr-defined]
    tokenizer.save_pretrained(out)
    typer.echo(f"{tokenizer.size} ids -> {out}")


@emoji_app.command()
def table(
    out: Annotated[Path, typer.Argument(help="File to write, .safetensors")],
    image_tokenizer: Annotated[Path, typer.Option(help="Folder of the image tokenizer")],
    text_tokenizer: Annotated[Path, typer.Option(help="Folder of the text tokenizer")],
    count: Count = 200_000,
    profile: ProfileName = "cpu",
    seed: Seed = 0,
    split: Split = "train",
    text_length: Length = 24,
    captions: Annotated[int, typer.Option(min=1, max=1000)] = 4,
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
) -> None:
    """Write a token table for `unidiff train`."""
    import torch

    from unidiff.tokens.image.vq import VQImageTokenizer
    from unidiff.tokens.text import TextTokenizer
    from unidiff.train.data.source import TokenTable
    from unidiff.worlds.emoji.scenes import SceneGenerator, get_profile
    from unidiff.worlds.emoji.table import QuestionMix, emoji_vocabulary, token_rows

    check_writable(out)
    image, words = VQImageTokenizer.from_pretrained(image_tokenizer), TextTokenizer.from_pretrained(text_tokenizer)
    mix, step = QuestionMix(questions, yes_no, lookup), 2048
    scenes = SceneGenerator(get_profile(profile, kinds=kinds), seed, split)
    parts = [
        token_rows(scenes, start, min(step, count - start), image, words, text_length, captions, mix)
        for start in track(range(0, count, step), "scenes")
    ]
    tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    TokenTable(tensors, emoji_vocabulary(words, image.codebook_size)).save(out)
    typer.echo(f"{count} rows -> {out}")
