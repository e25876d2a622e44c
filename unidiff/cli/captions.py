"""Captions of several pictures: those that cannot be taken are named, and the others are described as if they were alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from unidiff.cli.common import DecodeFlags, call, open_image, say_notes


def sort_pictures(paths: Sequence[str]) -> tuple[dict[int, Any], dict[int, Exception]]:
    """Pictures by their numbers, and what is wrong with the others."""
    pictures: dict[int, Any] = {}
    refused: dict[int, Exception] = {}
    for number, path in enumerate(paths):
        try:
            pictures[number] = open_image(path)
        except (ValueError, OSError) as error:
            refused[number] = error
    return pictures, refused


def refused_sizes(pipe: Any, pictures: Mapping[int, Any], paths: Sequence[str], resize: bool) -> dict[int, Exception]:
    """Pictures, by their numbers in `paths`, that the model does not take, where it takes one size."""
    refused: dict[int, Exception] = {}
    inputs = pipe.image_inputs  # refuses once for all where the model knows no pictures
    if pipe.layout.any_size:
        return refused
    for number, picture in pictures.items():
        try:
            inputs.images(picture, resize)
        except ValueError as error:
            refused[number] = ValueError(f"{paths[number]!r}: {error}")
    return refused


def describe(
    pipe: Any, pictures: Mapping[int, Any], count: int, flags: DecodeFlags, longest: int | None, resize: bool
) -> dict[int, str]:
    """Captions by number. A picture's caption does not depend on which of the others could be read.

    Args:
        count: pictures that were asked for, those that cannot be taken included.
    """
    if not pictures:
        return {}
    from unidiff.pipelines.decode import row_seeds

    seeds = row_seeds(flags.options["generator"], count).tolist()
    groups: dict[object, list[int]] = {}
    for number, picture in pictures.items():  # a model for pictures of any size takes one size at a time
        groups.setdefault(picture.size if pipe.layout.any_size else None, []).append(number)
    words: dict[int, str] = {}
    for numbers in groups.values():
        asked = {**flags.options, "generator": [seeds[n] for n in numbers]}
        shown = [pictures[n] for n in numbers]
        result = call(pipe.caption, shown, max_text_tokens=longest, resize=resize, **asked)
        say_notes(result)
        words |= dict(zip(numbers, result.texts, strict=True))
    return dict(sorted(words.items()))
