"""The network of LLaDA-V: a masked transformer, and beside it what turns pictures into vectors of its width."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from unidiff.families.llada_v.tiles import Tiling
from unidiff.models.config import TransformerConfig
from unidiff.models.transformer import MaskedTransformer
from unidiff.schema import Depth, Rows, Width
from unidiff.tokens import Modality, Span
from unidiff.weights.model import built_from

_TILES_AT_ONCE = 8


@dataclass(frozen=True)
class VisionLanguageConfig(TransformerConfig):
    """A `TransformerConfig`, and the SigLIP tower (Zhai et al. 2023, arXiv 2303.15343) that sees pictures.

    Args:
        vision_size, vision_layers, vision_heads, vision_ffn_size: of the tower.
        tile_side: pixels of a tile. patch_side: of a patch, of which there are floor(tile_side / patch_side) along a side.
        largest_grid, most_tiles: see `Tiling`.
    """

    vision_size: Width = 1152
    vision_layers: Depth = 26
    vision_heads: Depth = 16
    vision_ffn_size: Width = 4304
    tile_side: Rows = 384
    patch_side: Rows = 14
    largest_grid: Depth = 6
    most_tiles: Depth | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vision_size % self.vision_heads or self.patch_side > self.tile_side:
            raise ValueError(
                f"vision_size = {self.vision_size} has to be a multiple of vision_heads = {self.vision_heads}, and patch_side = "
                f"{self.patch_side} no more than tile_side = {self.tile_side}"
            )

    @property
    def tiling(self) -> Tiling:
        return Tiling(self.tile_side, self.tile_side // self.patch_side, self.largest_grid, self.most_tiles)


class VisionLanguageTransformer(MaskedTransformer):
    """A `MaskedTransformer` with a SigLIP tower, a projector, and a vector that ends the rows of a picture.

    Arguments are the fields of `VisionLanguageConfig`.
    """

    settings: VisionLanguageConfig

    @built_from(VisionLanguageConfig)
    def __init__(self, config: VisionLanguageConfig) -> None:
        super(MaskedTransformer, self).__init__()
        self.build(config)
        self.vision = _tower(config)
        sizes = (config.vision_size, config.hidden_size, config.hidden_size)
        self.projector = nn.Sequential(nn.Linear(*sizes[:2]), nn.GELU(), nn.Linear(*sizes[1:]))
        self.newline = nn.Parameter(torch.randn(config.hidden_size) * config.hidden_size**-0.5)

    def tower(self, pixels: Tensor) -> Tensor:
        """Features `[T, patches^2, vision_size]` of tiles `[T, 3, side, side]` with values in [-1, 1]: the output of the last
        layer, without the norm behind it."""
        embeddings: Any = self.vision.embeddings
        weight = embeddings.position_embedding.weight
        patches = embeddings.patch_embedding(pixels.to(weight.dtype)).flatten(2).transpose(1, 2)
        encoder: Any = self.vision.encoder
        seen: Tensor = encoder(inputs_embeds=patches + weight).last_hidden_state
        return seen

    def see(self, picture: Image.Image, square: bool = False) -> list[Tensor]:
        """What a picture in RGB is to the network: `[patches, patches, D]` of all of it, then `[h, w + 1, D]` of its parts.

        Args:
            square: a tile of the picture in a grey square and no parts, but one vector that ends it.
        """
        tiling = self.settings.tiling
        tiles = tiling.square(picture) if square else tiling.tiles(picture)
        return self.seen(tiles, None if square else picture.size)

    def seen(self, tiles: Tensor, size: tuple[int, int] | None) -> list[Tensor]:
        """The same of tiles uint8 `[T, 3, side, side]` of a picture of `size`, (width, height); None for a square."""
        tiling, place, width = self.settings.tiling, self.newline.device, self.settings.hidden_size
        found = []
        for some in tiles.split(_TILES_AT_ONCE):
            pixels = (some.to(place).float() / 255 - 0.5) / 0.5
            found.append(self.projector(self.tower(pixels)))
        first, *parts = torch.cat(found)  # [patches^2, D] each
        whole = first.view(tiling.patches, tiling.patches, width)
        if size is None:
            return [whole, self.newline.view(1, 1, width)]
        places = tiling.joined(torch.stack(parts), *size)  # [h, w, D]
        return [whole, torch.cat([places, self.newline.expand(len(places), 1, width)], 1)]

    def spans(self, picture: Image.Image, square: bool = False) -> list[Span]:
        """`see` as spans of a row."""
        return [Span.continuous(grid, Modality.IMAGE) for grid in self.see(picture, square)]


def _tower(config: VisionLanguageConfig) -> nn.Module:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    c = config
    made: Any = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=c.vision_size,
            intermediate_size=c.vision_ffn_size,
            num_hidden_layers=c.vision_layers,
            num_attention_heads=c.vision_heads,
            image_size=c.tile_side,
            patch_size=c.patch_side,
            vision_use_head=False,
        )
    )
    tower: Any = dict(made.named_children()).get("vision_model", made)  # inside of it in some versions
    del tower.embeddings.position_ids  # all positions, in order: no weight, so that nothing would fill it
    return tower  # type: ignore[no-any-return]
