"""What a person sees of a decode: picture, words with open places, confidence, and what the cache computed anew, as HTML.

Everything is in the page itself, as data addresses; all words are escaped.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from unidiff.studio.runs import Finished, Moment

_SHARP = 256  # pixels; smaller pictures are sent and shown with sharp pixels
_FRESH, _KEPT, _GIVEN = (234, 115, 23, 255), (120, 124, 138, 70), (120, 124, 138, 28)


class Piece(NamedTuple):
    """A token of a text: what it adds to it, and what is known of it."""

    text: str  # "" where it is open
    open: bool
    confidence: float | None  # None where it was given
    recomputed: bool
    new: bool  # written in this pass


def data_address(image: Image.Image, small: bool = False) -> str:
    """A picture as `data:`; `small` ones of more than a few pixels lose a little."""
    file = io.BytesIO()
    if small and max(image.size) > _SHARP:
        image.save(file, "WEBP", quality=80)
    else:
        image.save(file, "PNG")
    kind = "webp" if small and max(image.size) > _SHARP else "png"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


def pieces(pipe: Any, moment: Moment, before: Moment | None = None) -> list[Piece]:
    """The tokens of a text, up to its first end."""
    start, end = pipe.vocabulary.text[0], pipe.vocabulary.specials.get("eos")
    places, shown, run = moment.words.nonzero()[:, 0].tolist(), list[Piece](), list[int]()
    said, cut = "", None
    for place in places:
        confidence = float(moment.confidence[place]) if bool(moment.targets[place]) else None
        fresh = bool(moment.recomputed[place])
        if bool(moment.open[place]):
            shown += [*filter(None, [cut]), Piece("", True, None, fresh, False)]
            run, said, cut = [], "", None
            continue
        token = int(moment.ids[place])
        if token == end:
            break
        run.append(token - start)
        whole = pipe.texts.decode([i for i in run if i < pipe.texts.size])
        text = whole.removeprefix(said) if whole.startswith(said) else pipe.texts.decode(run[-1:])
        if text:
            new = before is not None and bool(before.open[place])
            piece = Piece(text, False, confidence, fresh, new)
            if text.endswith("\ufffd"):  # a character of several tokens is shown with its last one
                cut = piece
                continue
            shown.append(piece)
        said, cut = whole, None
    return [*shown, *filter(None, [cut])]


def confidence_map(moment: Moment) -> Image.Image | None:
    """RGBA, a pixel per code: how sure the model was of each; clear where it is open or given. None without a picture."""
    if not moment.picture.numel():
        return None
    sure, targets = _cells(moment.confidence, moment), _cells(moment.targets, moment)
    colours = _colours()[(np.clip(sure, 0, 1) * 255).round().astype(np.uint8)]  # [h, w, 4]
    colours[~targets] = _GIVEN
    colours[_cells(moment.open, moment)] = (0, 0, 0, 0)
    return Image.fromarray(colours)


def recomputed_map(moment: Moment) -> Image.Image | None:
    """RGBA, a pixel per code: bright where the pass computed it anew. None without a picture."""
    if not moment.picture.numel():
        return None
    fresh = _cells(moment.recomputed, moment)
    return Image.fromarray(np.where(fresh[..., None], _FRESH, _KEPT).astype(np.uint8))


def stage(pipe: Any, moment: Moment, total: int | None = None, before: Moment | None = None, note: str = "") -> str:
    """A moment as HTML.

    Args:
        total: passes in all, once that is known. before: the moment before, to mark what is new. note: below the bar.
    """
    figures = []
    if moment.frame is not None:
        figures.append(_figure("ud-picture", Image.fromarray(moment.frame), "Picture", "the picture so far"))
    heat, fresh = confidence_map(moment), recomputed_map(moment)
    if heat is not None and fresh is not None:
        figures.append(_figure("ud-map", heat, "Confidence", "how sure the model was of each code"))
        figures.append(_figure("ud-map", fresh, "Computed in this pass", "which codes this pass computed anew"))
    words = "".join(_chips(pieces(pipe, moment, before)))
    left, wanted = int(moment.open.sum()), max(1, int(moment.targets.sum()))
    computed = f"{int(moment.recomputed.sum())} of {len(moment.recomputed)} positions computed"
    where = f"pass {moment.number}" + ("" if total is None else f" of {total}")
    facts = [where, f"{wanted - left} of {wanted} tokens", computed if moment.number else "nothing computed yet"]
    said = f'<p class="ud-words" aria-label="the words so far">{words}</p>' if words else ""
    return (
        f'<div class="ud-stage" data-pass="{moment.number}" data-open="{left}">'
        f'<div class="ud-figures">{"".join(figures)}</div>{said}{_LEGEND}'
        f'<div class="ud-bar"><i style="width:{100 * (wanted - left) / wanted:.0f}%"></i></div>'
        f'<p class="ud-facts">{" &middot; ".join(facts)}</p>{_note(note)}</div>'
    )


def cost(done: Finished) -> str:
    """Passes, seconds and tokens per pass of a run, as HTML."""
    out, passes = done.out, max(0, len(done.moments) - 1)
    numbers = [
        (f"{passes}", "passes"),
        (f"{out.seconds:.2f} s", "of decoding"),
        (f"{float(out.tokens_per_forward[0]):.1f}", "tokens per pass"),
        (f"{out.nfe}", "network evaluations"),
    ]
    if done.count > 1:
        numbers.append((f"{done.candidate + 1} of {done.count}", "candidate that was kept"))
    cells = "".join(f"<div><b>{value}</b><span>{name}</span></div>" for value, name in numbers)
    cache = "" if out.cache is None else f"cache: {html.escape(out.cache_note or out.cache.policy)}"
    return f'<div class="ud-cost">{cells}</div><p class="ud-facts">{cache}</p>'


def escaped(text: str) -> str:
    """Words inside of HTML."""
    return html.escape(text)


def says(text: str, kind: str = "note") -> str:
    """One sentence as HTML; kind: note, busy or error."""
    role = ' role="alert"' if kind == "error" else ' role="status"'
    return f'<p class="ud-says ud-{kind}"{role}>{html.escape(text)}</p>' if text else ""


def empty_stage(text: str) -> str:
    """Before anything was made."""
    return f'<div class="ud-stage ud-empty"><p>{html.escape(text)}</p></div>'


def links(files: dict[str, bytes]) -> str:
    """Files to download, by name, as HTML; they are in the page itself."""
    kinds = {"png": "image/png", "gif": "image/gif"}
    made = []
    for name, data in files.items():
        address = f"data:{kinds[name.rpartition('.')[2]]};base64,{base64.b64encode(data).decode('ascii')}"
        made.append(f'<a class="ud-file" download="{html.escape(name)}" href="{address}">{html.escape(name)}</a>')
    return f'<div class="ud-files">{"".join(made)}</div>' if made else ""


_LEGEND = (
    '<p class="ud-legend"><span class="ud-scale"></span> unsure to sure <span class="ud-swatch ud-fresh"></span> computed in '
    'this pass <span class="ud-swatch ud-open"></span> still open</p>'
)


def _note(text: str) -> str:
    return f'<p class="ud-facts">{html.escape(text)}</p>' if text else ""


def _figure(kind: str, image: Image.Image, title: str, alt: str) -> str:
    sharp = " ud-sharp" if max(image.size) <= _SHARP else ""
    address = data_address(image, small=True)
    return f'<figure class="{kind}{sharp}"><img alt="{alt}" src="{address}"><figcaption>{title}</figcaption></figure>'


def _chips(shown: list[Piece]) -> Iterator[str]:
    for piece in shown:
        kinds = ["ud-chip"] + ["ud-open"] * piece.open + ["ud-new"] * piece.new + ["ud-fresh"] * piece.recomputed
        style, title = "", "open" if piece.open else "given"
        if piece.confidence is not None:
            red, green, blue, _ = _colours()[round(min(max(piece.confidence, 0), 1) * 255)]
            style, title = f' style="--sure:rgb({red},{green},{blue})"', f"confidence {piece.confidence:.2f}"
        text = "&nbsp;&nbsp;" if piece.open else html.escape(piece.text)
        yield f'<span class="{" ".join(kinds)}" title="{title}"{style}>{text}</span>'


def _cells(values: Tensor, moment: Moment) -> np.ndarray:
    """`[h, w]` of a value per token."""
    return values[moment.picture].numpy()


@cache
def _colours() -> np.ndarray:
    """uint8 `[256, 4]`: colours of confidences from 0 to 1."""
    import matplotlib

    return (matplotlib.colormaps["viridis"](np.linspace(0, 1, 256)) * 255).round().astype(np.uint8)
