"""Render the layers of faces that ship in `unidiff/assets/faces`: parts of DiceBear's Pixel Art (CC0 1.0) in chosen colours.

Needs node, two npm packages and `resvg-py` only when the layers are made anew:

    npm install --prefix FOLDER @dicebear/core@9.4.3 @dicebear/pixel-art@9.4.3
    python training/make_face_layers.py FOLDER
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from PIL import Image

from unidiff.errors import exit_status
from unidiff.files import check_writable, replace_text, replacing

SIDE = 16  # pixels of the artwork
COLUMNS = 16  # of the sheet
OUT = Path(__file__).resolve().parents[1] / "unidiff" / "assets" / "faces"
BACKGROUNDS = {
    "blue": "#9fd3ee", "pink": "#ffc2d1", "purple": "#c0aede", "green": "#b5e8b5", "yellow": "#fff3b0", "gray": "#c8ccd0",
}  # fmt: skip
SKINS = {"light": "#ffdbac", "tan": "#e0a070", "brown": "#a26d3d", "dark": "#6b4226"}
HAIR_COLOURS = {"black": "#1c1a1a", "brown": "#7a4a24", "blond": "#e6c35c", "red": "#bd3a00", "blue": "#0a7fbd"}
EYE_COLOURS = {"brown": "#6b3e1e", "blue": "#2f6fd6", "green": "#2f9e44"}
CLOTHING_COLOURS = {
    "red": "#d11141", "blue": "#2f6fb5", "green": "#00a152", "orange": "#ff9a1f", "purple": "#7b4fb0",
}  # fmt: skip
HAIRS = {
    "short": "short17", "spiky": "short13", "curly": "long15", "bob": "long21", "long": "long09", "braids": "long18",
    "buns": "long14",
}  # fmt: skip
EYES = {"big": "variant09", "ahead": "variant06", "left": "variant08", "right": "variant07"}
MOUTHS = {"smile": "happy09", "frown": "sad01", "open": "happy01", "straight": "sad06", "grin": "happy12"}
BEARDS = {"full": "variant05", "goatee": "variant02", "long": "variant03"}
GLASSES = {"black": ("light05", "#323232"), "red": ("light07", "#b0344e"), "sunglasses": ("dark07", "#191919")}
HATS = {"cap": ("variant02", "#c02818"), "beanie": ("variant03", "#2f8a62"), "top hat": ("variant06", "#191919")}
CLOTHES = {
    "plain": "variant11", "striped": "variant13", "checked": "variant06", "overalls": "variant10", "turtleneck": "variant12",
}  # fmt: skip
MOUTH, BEARD = "#b0433f", "#4a2f1b"


def wanted() -> list[tuple[dict[str, str], dict[str, Any]]]:
    """Every layer: what it is called, and the part of the artwork that it shows."""
    layers: list[tuple[dict[str, str], dict[str, Any]]] = []

    def add(layer: str, value: str, colour: str, group: str, variant: str, colors: dict[str, str]) -> None:
        named = {"layer": layer, "value": value, "colour": colour}
        layers.append((named, {"group": group, "variant": variant, "colors": colors}))

    for name, skin in SKINS.items():
        add("skin", name, "", "head", "", {"skin": skin})
    for layer, group, values, colours in (
        ("clothing", "clothing", CLOTHES, CLOTHING_COLOURS),
        ("eyes", "eyes", EYES, EYE_COLOURS),
        ("hair", "hair", HAIRS, HAIR_COLOURS),
    ):
        for value, variant in values.items():
            for name, colour in colours.items():
                add(layer, value, name, group, variant, {group: colour})
    for layer, worn in (("glasses", GLASSES), ("hat", HATS)):
        for value, (variant, colour) in worn.items():
            add(layer, value, "", layer, variant, {layer: colour})
    for value, variant in BEARDS.items():
        add("beard", value, "", "beard", variant, {"hair": "#ffffff"})
    for value, variant in MOUTHS.items():
        add("mouth", value, "", "mouth", variant, {"mouth": MOUTH})
    return layers


def pixels(body: str) -> Image.Image:
    """RGBA, SIDE x SIDE pixels."""
    import resvg_py

    size = f'viewBox="0 0 {SIDE} {SIDE}" width="{SIDE}" height="{SIDE}" shape-rendering="crispEdges" fill="none"'
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{body}</svg>'
    return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg)))).convert("RGBA")


def flat(image: Image.Image, colour: str) -> Image.Image:
    """The shape of an image in one opaque colour: beards are masks in the artwork, too faint on some skins."""
    shape = image.getchannel("A").point(lambda a: 255 if a > 127 else 0)
    made = Image.new("RGBA", image.size, (0, 0, 0, 0))
    made.paste(Image.new("RGBA", image.size, colour), mask=shape)
    return made


def main(
    packages: Annotated[Path, typer.Argument(help="Folder with the two npm packages in its node_modules")],
    out: Annotated[Path, typer.Option(help="Folder for layers.png and layers.json")] = OUT,
) -> None:
    """Write the sheet of layers and its index."""
    for name in ("layers.png", "layers.json"):
        check_writable(out / name)
    named, asked = zip(*wanted(), strict=True)
    script = Path(__file__).with_name("face_layers.mjs")
    answer = subprocess.run(
        ["node", str(script), str(packages)], input=json.dumps(asked), capture_output=True, text=True, check=False
    )
    if answer.returncode:
        raise ValueError(f"node could not print the artwork: {answer.stderr.strip()[-400:]}")
    images = [pixels(body) for body in json.loads(answer.stdout)]
    images = [flat(i, BEARD) if n["layer"] == "beard" else i for n, i in zip(named, images, strict=True)]
    sheet = Image.new("RGBA", (COLUMNS * SIDE, -(-len(images) // COLUMNS) * SIDE), (0, 0, 0, 0))
    for number, image in enumerate(images):
        sheet.paste(image, (number % COLUMNS * SIDE, number // COLUMNS * SIDE))
    with replacing(out / "layers.png") as path:
        sheet.save(path, "PNG", optimize=True)
    index = {"side": SIDE, "columns": COLUMNS, "backgrounds": BACKGROUNDS, "layers": named}
    replace_text(out / "layers.json", json.dumps(index, indent=1) + "\n")
    typer.echo(f"{len(images)} layers -> {out}")


if __name__ == "__main__":
    sys.exit(exit_status(lambda: typer.run(main), failed=2))
