"""Complete a picture and its caption together: each says what the other lacks."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from unidiff.errors import exit_status
from unidiff.pipeline import UniDiffPipeline
from unidiff.pipelines.sheet import save_image
from unidiff.process import parsed
from unidiff.worlds.emoji.scenes import Scene, SceneObject, get_profile, render


def main(out: Path = Path("out/joint_inpaint")) -> None:
    parsed(argparse.ArgumentParser(description=__doc__))
    pipe = UniDiffPipeline.from_pretrained("emoji")
    # An owl left of a cactus. The cactus is painted over, and the word "owl" is hidden.
    scene = Scene((SceneObject("owl", 2, 0, 4), SceneObject("cactus", 2, 4, 4)), "yellow")
    picture = Image.fromarray(render(scene, get_profile("cpu")))
    hole = np.zeros((64, 64), dtype=bool)
    hole[16:48, 32:64] = True
    tokens = len(pipe.texts.encode(" owl"))
    text = f"an <mask:{tokens}> to the left of a cactus on a yellow background"
    out.mkdir(parents=True, exist_ok=True)
    result = pipe.inpaint(picture, hole, text, generator=0, record_trajectory=True)
    save_image(picture, out / "before.png")
    save_image(result.images[0], out / "after.png")
    result.save_filmstrip(out / "filmstrip.png")
    print(f"{text}\n{result.texts[0]}\n{result.nfe} forward passes, {result.seconds:.2f} s: {out}")


if __name__ == "__main__" and (status := exit_status(main, failed=2)):
    sys.exit(status)
