"""Make the pictures and animations of the README and of these pages again, with the embedded model: about two minutes.

python docs/scripts/pictures.py          # into docs/assets
python docs/scripts/pictures.py FOLDER
"""

from __future__ import annotations

import argparse
import sys
import tomllib
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from unidiff import UniDiffPipeline
from unidiff.decoding.cache import IntervalCache
from unidiff.errors import exit_status
from unidiff.files import replace_text
from unidiff.pipelines.output import UniDiffOutput
from unidiff.pipelines.sheet import Cell, draw_sheet, save_gif, save_image, stack
from unidiff.process import parsed
from unidiff.worlds.emoji.cases import inpaint_cases
from unidiff.worlds.emoji.demo import completions, descriptions, drawings, picture_of
from unidiff.worlds.emoji.scenes import Scene, SceneObject, get_profile

ASSETS = Path(__file__).resolve().parents[1] / "assets"
PROFILE = get_profile("cpu")
DRAWN = ["three penguins against a red background", "an owl to the left of a cactus on a red background"]
COMPUTED, KEPT = (240, 140, 30), (60, 70, 90)


def demo_rows(pipe: UniDiffPipeline, path: Path) -> None:
    """The first rows of three parts of `unidiff demo`."""
    parts = [(drawings, 2), (descriptions, 1), (completions, 2)]
    sections = [(make(pipe, PROFILE, 0), count) for make, count in parts]
    sheets = [draw_sheet(section.lines(4)[:count], title=section.title) for section, count in sections]
    sheet = stack(sheets)
    save_image(sheet.quantize(192, dither=Image.Dither.NONE), path, optimize=True)


def joint(pipe: UniDiffPipeline, path: Path) -> None:
    """Holes in pictures and in their captions, completed together in 8 passes."""
    cases = [case for case in inpaint_cases(16, 0, PROFILE) if case.name][:4]
    pictures = [picture_of(case.scene, PROFILE) for case in cases]
    masks = [PROFILE.boxes([case.hole]).numpy() for case in cases]
    templates = [case.template(pipe.texts.encode) for case in cases]
    done = pipe.inpaint(pictures, masks, templates, steps=8, generator=0, record_trajectory=True)
    done.save_gif(path, 400)


def passes(pipe: UniDiffPipeline, path: Path) -> None:
    """Pictures by confidence, 12 passes of a cosine quota."""
    pipe.text_to_image(DRAWN, steps=12, generator=0, record_trajectory=True).save_gif(path, 300)


def blocks(pipe: UniDiffPipeline, path: Path) -> None:
    """The same in blocks of 16 codes, which are two rows of cells."""
    drawn = pipe.text_to_image(DRAWN, steps=12, block_length={"image": 16}, generator=0, record_trajectory=True)
    drawn.save_gif(path, 300)


def captions(pipe: UniDiffPipeline, path: Path) -> None:
    """Words by confidence: what is sure comes first."""
    pairs = (("owl", "cactus", "yellow"), ("rocket", "house", "black"))
    scenes = [Scene((SceneObject(a, 2, 0, 4), SceneObject(b, 2, 4, 4)), ground) for a, b, ground in pairs]
    shown = pipe.caption([picture_of(scene, PROFILE) for scene in scenes], generator=0, record_trajectory=True)
    shown.save_gif(path, 700)


class Watched(IntervalCache):
    """The interval cache, and a note of what each pass computed."""

    computed: list[torch.Tensor]  # bool [L] of the first row, one for each pass

    def start(self, batch: Any, model: Any) -> Watched:
        request = super().start(batch, model)
        request.computed = self.computed
        return request

    def observe(self, state: Any, plan: Any) -> None:
        super().observe(state, plan)
        everything = state.batch.valid[0]
        self.computed.append(everything if plan.query is None else plan.query[0])


def cache(pipe: UniDiffPipeline, path: Path) -> None:
    """A picture as it appears, and beside it the cells that each pass computes."""
    policy = Watched(interval=8)
    policy.computed = []
    drawn: UniDiffOutput = pipe.text_to_image(
        DRAWN[0], policy=policy, guidance_scale=1.0, generator=0, record_trajectory=True
    )
    assert drawn.trajectory is not None and drawn.trajectory.frames is not None
    height, width = drawn.codes.shape[1:]
    frames = []
    for number, (picture, computed) in enumerate(zip(drawn.trajectory.frames[1:, 0], policy.computed, strict=True), 1):
        cells = computed[-height * width :].view(height, width)
        colours = torch.where(cells[..., None], torch.tensor(COMPUTED), torch.tensor(KEPT)).byte().numpy()
        seen = Image.fromarray(picture.numpy()), Image.fromarray(colours)
        words = f"pass {number}: {int(computed.sum())} of {len(computed)} tokens computed"
        frames.append(draw_sheet([[Cell(seen, words)]], side=192))
    save_gif(frames, path, [400] * (len(frames) - 1) + [2000])


def badge(name: str, said: str, path: Path) -> None:
    """Two words in a row, as a small SVG that needs no other server."""
    left, right = (10 + round(6.6 * len(word)) for word in (name, said))
    replace_text(
        path,
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + right}" height="20" role="img" aria-label="{name}: {said}">'
        f'<rect width="{left + right}" height="20" rx="4" fill="#3949ab"/><rect width="{left}" height="20" rx="4" fill="#4a4f5c"/>'
        f'<g fill="#fff" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11" text-anchor="middle">'
        f'<text x="{left / 2}" y="14">{name}</text><text x="{left + right / 2}" y="14">{said}</text></g></svg>\n',
    )


def badges(folder: Path) -> None:
    """What pyproject.toml says: Python, PyTorch, licence, types."""
    project = tomllib.loads((ASSETS.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    torch_floor = next(entry for entry in project["dependencies"] if entry.startswith("torch>="))
    said = {
        "python": project["requires-python"].removeprefix(">=") + "+",
        "pytorch": torch_floor.removeprefix("torch>=") + "+",
        "licence": project["license"],
    }
    if "Typing :: Typed" in project["classifiers"]:
        said["typing"] = "typed"
    for name, what in said.items():
        badge(name, what, folder / f"badge-{name}.svg")


MADE = {
    "demo.png": demo_rows,
    "joint.gif": joint,
    "passes.gif": passes,
    "blocks.gif": blocks,
    "captions.gif": captions,
    "cache.gif": cache,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=ASSETS)
    folder = parsed(parser).folder
    badges(folder)
    pipe = UniDiffPipeline.from_pretrained("emoji")
    for name, make in MADE.items():
        make(pipe, folder / name)
        print(f"{folder / name}: {(folder / name).stat().st_size // 1000} kB")


if __name__ == "__main__" and (status := exit_status(main, failed=2)):
    sys.exit(status)
