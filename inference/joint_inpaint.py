"""Complete a picture and its caption together: each says what the other lacks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from unidiff.data.emoji_scenes import Scene, SceneObject, get_profile, render
from unidiff.pipeline import UniDiffPipeline


def main(out: Path = Path("out/joint_inpaint")) -> None:
    pipe = UniDiffPipeline.from_pretrained("emoji")
    # An owl left of a cactus. The cactus is painted over, and the word "owl" is hidden.
    scene = Scene((SceneObject("owl", 2, 0, 4), SceneObject("cactus", 2, 4, 4)), "yellow")
    picture = Image.fromarray(render(scene, get_profile("cpu")))
    hole = np.zeros((64, 64), dtype=bool)
    hole[16:48, 32:64] = True
    tokens = len(pipe.texts.encode(" owl"))
    text = f"an <mask:{tokens}> to the left of a cactus on a yellow background"
    result = pipe.inpaint(picture, hole, text, generator=0, record_trajectory=True)
    out.mkdir(parents=True, exist_ok=True)
    picture.save(out / "before.png")
    result.images[0].save(out / "after.png")
    result.save_filmstrip(out / "filmstrip.png")
    print(f"{text}\n{result.texts[0]}\n{result.nfe} forward passes, {result.seconds:.2f} s: {out}")


if __name__ == "__main__":
    main()
