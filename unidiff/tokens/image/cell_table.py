"""`CellTableModel`: an image tokenizer that is a list of cells of pixels; nothing is learned, and pictures of these cells are exact."""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from unidiff.schema import Between, Rows
from unidiff.tokens.image.protocols import ImageTokenizerModel
from unidiff.weights.model import CheckedModel

_SPREAD = 0.02  # of a colour that counts as the ground's own, in units of full intensity


class CellTableModel(CheckedModel, ImageTokenizerModel):
    """Images `[B, 3, H, W]` in [0, 1] to the nearest cells of a table, and back; for flat artwork such as pixel art.

    The ground of a picture is one of the first `grounds` cells. Other cells may leave pixels clear, where the ground shows
    through, so that the edge of a thing has the same code on every ground. A picture's ground is the one whose colour most of
    its pixels have; a decoded picture's, the flat cell that occurs most often in it.

    The weights are `cells`, float `[codebook_size, 4, detail, detail]`: red, green, blue, and whether a pixel is opaque (above
    .5); each pixel of the table is a square of `factor / detail` pixels in a picture.

    Args:
        factor: pixels per code along each side. codebook_size: number of cells. detail: pixels of a cell along each side in the
            table, a divisor of `factor`. grounds: number of flat cells, which come first.
    """

    @register_to_config
    def __init__(
        self,
        factor: Annotated[int, Between(1, 1024)] = 8,
        codebook_size: Rows = 2048,
        detail: Annotated[int, Between(1, 1024)] = 2,
        grounds: Rows = 1,
    ) -> None:
        super().__init__()
        self.check_arguments()
        if factor % detail:
            raise ValueError(f"detail {detail} must divide factor {factor}")
        if grounds > codebook_size:
            raise ValueError(f"grounds is {grounds}; expected at most codebook_size = {codebook_size}")
        self.cells = nn.Parameter(torch.rand(codebook_size, 4, detail, detail), requires_grad=False)

    @classmethod
    def of_cells(cls, cells: Tensor, factor: int, grounds: int) -> CellTableModel:
        """A tokenizer of these cells, float `[K, 4, d, d]`, the flat ones first."""
        made = cls(factor, len(cells), cells.shape[-1], grounds)
        made.cells.data.copy_(cells)
        return made

    @property
    def factor(self) -> int:
        return int(self.config.factor)

    @property
    def codebook_size(self) -> int:
        return int(self.config.codebook_size)

    def encode(self, images: Tensor) -> Tensor:
        detail = int(self.config.detail)
        small = F.avg_pool2d(images.float(), self.factor // detail)  # [B, 3, h d, w d]
        height, width = small.shape[2] // detail, small.shape[3] // detail
        parts = F.unfold(small, detail, stride=detail).movedim(1, 2)  # [B, h w, 3 d d]
        colours = self._ground_colours()  # [G, 3]
        squared = (small.movedim(1, -1).flatten(1, 2)[:, :, None] - colours).square().sum(-1)  # [B, pixels, G]
        nearest = (-squared / (2 * _SPREAD**2)).logsumexp(1).argmax(1)  # [B]
        codes = torch.empty(parts.shape[:2], dtype=torch.int64, device=images.device)
        for ground in nearest.unique().tolist():
            rows = nearest == ground
            table = self._on(colours[ground]).flatten(1)  # [K, 3 d d]
            apart = table.square().sum(1) - 2 * parts[rows] @ table.T
            codes[rows] = apart.argmin(-1)
        return codes.view(-1, height, width)

    def decode(self, codes: Tensor) -> Tensor:
        colours, count = self._ground_colours(), int(self.config.grounds)
        votes = (codes.flatten(1)[..., None] == torch.arange(count, device=codes.device)).sum(1)  # [B, G]
        cells = self.cells.float()[codes]  # [B, h, w, 4, d, d]
        ground = colours[votes.argmax(1)][:, None, None, :, None, None]
        shown = torch.where(cells[:, :, :, 3:] > 0.5, cells[:, :, :, :3], ground)
        small = shown.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)  # [B, 3, h d, w d]
        step = self.factor // int(self.config.detail)
        return small.repeat_interleave(step, 2).repeat_interleave(step, 3)

    def _ground_colours(self) -> Tensor:
        return self.cells.float()[: int(self.config.grounds), :3].mean((-1, -2))

    def _on(self, ground: Tensor) -> Tensor:
        """All cells on a ground: float32 `[K, 3, d, d]`."""
        cells = self.cells.float()
        return torch.where(cells[:, 3:] > 0.5, cells[:, :3], ground[:, None, None])
