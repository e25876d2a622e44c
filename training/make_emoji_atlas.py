"""Render the sprite atlas that ships in `unidiff/assets`: Noto Color Emoji artwork with Unicode CLDR short names.

Needs the font and the names only when the atlas is made anew (Debian: `fonts-noto-color-emoji`, `unicode-cldr-core`):

    python training/make_emoji_atlas.py
"""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image, ImageDraw, ImageFont

from unidiff.errors import exit_status, reading
from unidiff.files import check_writable, replace_text, replacing

# Everyday things. The first 64 are the `cpu` profile; the whole list is the `gpu` profile.
EMOJI = (
    "🐶🐱🦊🐻🐼🐨🐯🦁🐮🐷🐸🐵🐔🐧🦉🐝🦋🐞🐢🐙🦀🐠🐳🌵🌲🍄🌹🌻🌷🍎🍐🍋"
    "🍌🍉🍇🍓🍒🍍🥕🌽🥐🧀🍔🍕🍩🎂🍦☕⚽🏀🚗🚌🚀⛵🏠⏰🔑💡🎁🎈👑🎸🔔🧸"
    "🐭🐹🐰🐴🦄🐺🦝🐗🐤🦆🦅🦇🐛🐌🐜🦂🦞🦐🦑🐬🦈🐊🐘🦒🦘🐫🐑🐐🦌🐓🦃🦜"
    "🌴🍀🍁🌺🌸🍊🍑🥭🥥🥝🍅🥑🍆🥔🥦🧄🧅🥜🍞🥨🥞🧇🥓🍟🌭🌮🍿🍣🍪🍫🍬🍭"
    "🍯🥛🍵⚾🎾🏐🏈🎳🏓🚕🚓🚑🚒🚜🚲🛴🚂✈🚁⛺🏰🌋🧭⌚📷📺📻🔦🕯📚💎🔧🔨"
    "🧲🧪🔭🧹🧺🧻🧼🛒🪑🚪🛁🎩👒👟👗👓☂🎒🎀🎨🎺🎻🥁🎲🧩🎯🪁🏆🥇🌍🌙☀⭐🌈⚡❄🔥💧❤"
)
FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
NAMES = Path("/usr/share/unicode/cldr/common/annotations/en.xml")
OUT = Path(__file__).resolve().parents[1] / "unidiff" / "assets" / "emoji"
SPRITE = 64  # pixels; profiles scale down from here
COLUMNS = 16
NOTO_SIZE = 109  # the one size the bitmap font holds


def short_names(path: Path) -> dict[str, str]:
    """CLDR text-to-speech names, for instance `{"🐶": "dog face"}`."""
    with reading(path, "CLDR annotations (XML)"):
        root = ElementTree.parse(path).getroot()
    return {a.get("cp", ""): a.text or "" for a in root.iter("annotation") if a.get("type") == "tts"}


def draw(character: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """One sprite: the glyph cropped to its ink and scaled into a square of SPRITE pixels, RGBA."""
    canvas = Image.new("RGBA", (192, 192), (0, 0, 0, 0))
    with reading(getattr(font, "path", "the font"), "a colour font"):
        ImageDraw.Draw(canvas).text((24, 24), character, font=font, embedded_color=True)
    box = canvas.getbbox()
    if box is None:
        raise ValueError(f"the font has no glyph for {character!r}; name Noto Color Emoji")
    glyph = canvas.crop(box)
    scale = SPRITE / max(glyph.size)
    size = (max(1, round(glyph.width * scale)), max(1, round(glyph.height * scale)))
    sprite = Image.new("RGBA", (SPRITE, SPRITE), (0, 0, 0, 0))
    glyph = glyph.convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA")
    sprite.paste(glyph, ((SPRITE - size[0]) // 2, (SPRITE - size[1]) // 2))
    return sprite


def main(
    font: Annotated[Path, typer.Option(help="NotoColorEmoji.ttf")] = FONT,
    names: Annotated[Path, typer.Option(help="CLDR annotations, English")] = NAMES,
    out: Annotated[Path, typer.Option(help="Folder for atlas.png and atlas.json")] = OUT,
) -> None:
    for path in (font, names):
        if not path.is_file():
            raise FileNotFoundError(
                f"{str(path)!r} does not exist; install fonts-noto-color-emoji and unicode-cldr-core, or name it"
            )
    check_writable(out / "atlas.png")
    characters = list(dict.fromkeys(EMOJI))
    known = short_names(names)
    if missing := [c for c in characters if c not in known]:
        raise ValueError(f"{str(names)!r} has no name for {missing[0]!r}; name the English CLDR annotations")
    with reading(font, "a colour font"):
        face = ImageFont.truetype(str(font), NOTO_SIZE)
    rows = -(-len(characters) // COLUMNS)
    atlas = Image.new("RGBA", (COLUMNS * SPRITE, rows * SPRITE), (0, 0, 0, 0))
    for i, character in enumerate(characters):
        atlas.paste(draw(character, face), (i % COLUMNS * SPRITE, i // COLUMNS * SPRITE))
    index = {
        "sprite_size": SPRITE,
        "columns": COLUMNS,
        "artwork": "Noto Color Emoji, Copyright Google LLC, SIL Open Font License 1.1",
        "names": "Unicode CLDR English short names, Copyright Unicode, Inc., Unicode License v3",
        "sprites": [{"name": known[c], "character": c} for c in characters],
    }
    with replacing(out / "atlas.png") as temporary:
        atlas.save(temporary, format="PNG", optimize=True)
    replace_text(out / "atlas.json", json.dumps(index, ensure_ascii=False, indent=1) + "\n")
    typer.echo(f"{len(characters)} sprites -> {out}")


if __name__ == "__main__":
    sys.exit(exit_status(lambda: typer.run(main), failed=2))
