"""Draw pictures from sentences: python inference/text_to_image.py "a fox on a green background" "two tulips" """

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from unidiff.errors import exit_status
from unidiff.pipeline import UniDiffPipeline
from unidiff.pipelines.sheet import save_image
from unidiff.process import parsed

EXAMPLES = ["a fox on a green background", "three red apples on a white background"]


def main(out: Path = Path("out/text_to_image")) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompts", nargs="*", default=EXAMPLES)
    prompts = parsed(parser).prompts
    pipe = UniDiffPipeline.from_pretrained("emoji")
    out.mkdir(parents=True, exist_ok=True)
    result = pipe.text_to_image(prompts, num_images_per_prompt=2, generator=0, record_trajectory=True)
    for number, image in enumerate(result.images):
        save_image(image, out / f"{number}.png")
    result.save_filmstrip(out / "filmstrip.png")
    result.save_gif(out / "decode.gif")
    print(f"{len(result.images)} pictures, {result.nfe} forward passes, {result.seconds:.2f} s: {out}")


if __name__ == "__main__" and (status := exit_status(main, failed=2)):
    sys.exit(status)
