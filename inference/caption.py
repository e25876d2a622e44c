"""Describe pictures and answer a question about each: python inference/caption.py picture.png ..."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from PIL import Image

from unidiff.cli.common import open_image
from unidiff.errors import exit_status
from unidiff.pipeline import UniDiffPipeline
from unidiff.process import parsed
from unidiff.worlds.emoji.scenes import SceneGenerator, get_profile, render


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("paths", nargs="*", type=Path)
    paths = parsed(parser).paths
    if paths:
        pictures = [open_image(path) for path in paths]
    else:  # scenes of the generator, of compositions that training never saw
        profile = get_profile("cpu")
        scenes = SceneGenerator(profile, seed=1, split="held_out")
        pictures = [Image.fromarray(render(scenes.scene(i), profile)) for i in range(4)]
    pipe = UniDiffPipeline.from_pretrained("emoji")
    captions = pipe.caption(pictures, resize=True, generator=0).texts
    question = "what colour is the background?"
    answers = pipe.answer(pictures, question, resize=True, generator=0).texts
    for number, (caption, answer) in enumerate(zip(captions, answers, strict=True)):
        print(f"{paths[number] if paths else number}: {caption}\n    {question} {answer}")


if __name__ == "__main__" and (status := exit_status(main, failed=2)):
    sys.exit(status)
