"""What the pipeline hands back: pictures, texts, tokens, numbers, and the way there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.utils import BaseOutput
from PIL import Image, ImageOps
from torch import Tensor

from unidiff.decoding import CacheConfig, DecodeStats
from unidiff.families.layout import DecodeRequest
from unidiff.pipelines.options import whole
from unidiff.pipelines.sheet import Cell, draw_sheet, save_gif, save_image


@dataclass(frozen=True)
class Trajectory:
    """The decode as it went: all hidden first, then after each pass."""

    ids: Tensor  # int64 [S, B, L], [MASK] where still open
    frames: Tensor | None  # uint8 [S, B, H, W, 3], open cells in grey; None without pictures
    texts: list[list[str]]  # [S][B], open tokens as underscores


@dataclass(frozen=True, eq=False, repr=False)
class UniDiffOutput(BaseOutput):
    """Results of B rows, by attribute, by name, or by number among those that are not None: `out.images`, `out["images"]`,
    `out[0]`; `out[0]` are the texts where there are no pictures.

    Attributes:
        images: PIL images, a float tensor `[B, 3, H, W]`, a float array `[B, H, W, 3]` or int64 codes `[B, h, w]`, as
            `output_type` says. For captions and answers, the pictures that were given, at the model's size. None where
            there are no pictures (chat and other text alone), or a row may have several (LLaDA-V).
        texts: the caption, answer or prompt of each row, up to its first end-of-text.
        codes: int64 `[B, h, w]`, image codes; float `[B, C, H, W]` of a family whose pictures are latents of an autoencoder.
        text_ids: the text ids behind `texts`.
        ids: int64 `[B, L]`, the whole rows in the shared vocabulary.
        confidences: float32 `[B, L]`, probability of each decoded token when it was committed; 1 where known.
        nfe: network evaluations per row; a guided pass counts twice.
        tokens_per_forward: float64 `[B]`, decoded tokens (up to the end of a text) per pass of the network over the row.
        seconds: wall-clock time of the decode.
        seeds: int64 `[B]`; `generator=[seed]` repeats a row alone.
        trajectory: when asked for.
        stats: what the decode cost.
        cache: the cache that was used; None where the caller brought a policy object.
        cache_note: why that one, where `cache="auto"` chose it.
        notes: sentences about what the model cannot know, words that it was never taught for instance.
    """

    images: Any
    texts: list[str]
    codes: Tensor
    text_ids: list[list[int]]
    ids: Tensor
    confidences: Tensor
    nfe: int
    tokens_per_forward: Tensor
    seconds: float
    seeds: Tensor
    trajectory: Trajectory | None = None
    stats: DecodeStats = field(default_factory=DecodeStats)
    cache: CacheConfig | None = None
    cache_note: str = ""
    notes: list[str] = field(default_factory=list)

    if TYPE_CHECKING:  # what `return_dict=False` gives is read as a tuple

        def __iter__(self) -> Iterator[Any]: ...

    def __repr__(self) -> str:
        """One line; `vars` and the attributes have all."""
        said = {
            "images": _brief(self.images),
            "texts": repr(self.texts),
            "nfe": self.nfe,
            "seconds": f"{self.seconds:.2f}",
        }
        said |= {"notes": repr(self.notes)} if self.notes else {}
        return f"UniDiffOutput({', '.join(f'{name}={value}' for name, value in said.items())})"

    @property
    def sequences(self) -> Tensor:
        """int64 `[B, L]`: `ids`, as transformers calls whole rows."""
        return self.ids

    def save_gif(self, path: str | Path, milliseconds: int = 180) -> None:
        """Animate the trajectory, rows side by side; the end stays for two seconds. `ValueError` where none was recorded."""
        whole(milliseconds, "milliseconds", 1, 600_000)
        moments = [[self._cell(s, b) for b in range(len(self.texts))] for s in range(self._steps())]
        frames = [draw_sheet([cells[i : i + 4] for i in range(0, len(cells), 4)]) for cells in moments]
        size = (max(f.width for f in frames), max(f.height for f in frames))  # texts wrap to more or fewer lines
        frames = [ImageOps.pad(f, size, color="white", centering=(0, 0)) if f.size != size else f for f in frames]
        save_gif(frames, path, [milliseconds] * (len(frames) - 1) + [2000])

    def save_filmstrip(self, path: str | Path, count: int = 8) -> None:
        """One picture: `count` moments of the trajectory from left to right, one line per row; errors as of `save_gif`."""
        whole(count, "count", 2, 1000, " pictures in a line")
        last = self._steps() - 1
        moments = sorted({round(last * i / (count - 1)) for i in range(count)})
        save_image(draw_sheet([[self._cell(s, b) for s in moments] for b in range(len(self.texts))]), path)

    def _steps(self) -> int:
        if self.trajectory is None:
            raise ValueError("this result has no trajectory; call the pipeline with record_trajectory=True")
        return len(self.trajectory.ids)

    def _cell(self, step: int, row: int) -> Cell:
        assert self.trajectory is not None
        frames, words = self.trajectory.frames, self.trajectory.texts[step][row]
        return Cell(() if frames is None else (Image.fromarray(frames[step, row].numpy()),), words)


def _brief(images: Any) -> str:
    if isinstance(images, list):
        return f"[{len(images)} of {'x'.join(map(str, images[0].size))}]" if images else "[]"
    return "None" if images is None else f"{type(images).__name__}{list(images.shape)}"


def to_frames(images: Tensor, open_cells: Tensor) -> Tensor:
    """uint8 `[B, H, W, 3]` of float images `[B, 3, H, W]`, with open cells (bool `[B, h, w]`) in grey."""
    factor = images.shape[-1] // open_cells.shape[-1]
    covered = open_cells.repeat_interleave(factor, 1).repeat_interleave(factor, 2)[:, None]  # [B, 1, H, W]
    checks = (torch.arange(images.shape[-2])[:, None] // factor + torch.arange(images.shape[-1]) // factor) % 2
    images = torch.where(covered, 0.55 + 0.07 * checks, images.cpu())
    return (images * 255 + 0.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def trajectory_of(
    pipe: Any, done: DecodeRequest, states: Sequence[Tensor], ends: Sequence[int], seeds: Tensor
) -> Trajectory:
    """Pictures and words of every recorded state `[B, L]`; `ends`: ids that end a text. `seeds`: of the rows."""
    vocabulary = pipe.layout.vocabulary
    ids = torch.stack(list(states)).cpu()  # [S, B, L]
    pictures = done.picture_ids(ids)  # [S, B, h, w]
    hidden, frames, seen = pictures == vocabulary.image_mask, [], None
    # Open cells show the final codes under their cover, so that the decoder does not bleed wrong colours around them.
    codes = torch.where(hidden, pictures[-1:], pictures) - vocabulary.image[0]
    for now, cover in zip(codes, hidden, strict=True) if codes.numel() else ():
        if seen is None or not torch.equal(now, seen[0]):
            draw = pipe.images.decode if torch.equal(now, codes[-1]) else pipe.images.preview
            seen = (now, draw(now, seeds).cpu())
        frames.append(to_frames(seen[1], cover))
    texts = [[_shown_words(pipe, row) for row in done.text_ids(s, vocabulary, ends, masks=True)] for s in ids]
    return Trajectory(ids, torch.stack(frames) if frames else None, texts)


def _shown_words(pipe: Any, ids: Sequence[int]) -> str:
    """Words of an unfinished text, one ` _` per open token."""
    hidden, parts, run = pipe.layout.vocabulary.mask_id - pipe.layout.vocabulary.text[0], list[str](), list[int]()
    for i in ids:
        if i == hidden:
            parts += [pipe.texts.decode(run), " _"]
            run.clear()
        elif i < pipe.texts.size:
            run.append(i)
    return "".join([*parts, pipe.texts.decode(run)]).strip()
