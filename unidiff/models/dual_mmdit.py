"""`DualMMDiT`: flow matching of image latents beside masked text in one MM-DiT (D-DiT, arXiv 2501.00289).

Its blocks are the two-stream blocks of `MMDiT`, without norms of queries and keys and without rotary positions: text has the
positions of its encoder, image tokens those of a table. Pictures are latents of an autoencoder, and what is predicted of them
is the velocity of flow matching; of the text it predicts the ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F

from unidiff.models.block import SINUSOID, Condition, Modulation, View, WholeView, modulate, sinusoid
from unidiff.models.denoiser import CachePlan, PartialHidden, Select
from unidiff.models.mmdit import TwoLayer
from unidiff.models.mmdit_blocks import DoubleBlock, plain_norm
from unidiff.models.partial import partial_pass
from unidiff.models.parts import gather_rows
from unidiff.models.store import FeatureStore, StoreLayout, StoreOptions, TokenIndex
from unidiff.schema import Depth, Layers, Rows, Width
from unidiff.weights.model import CheckedModel

NULL_TOKENS = 8  # of the image stream where there is no picture


class DualOutput(NamedTuple):
    """`text` `[B, L, D]`, features behind the last norm, ready for the head of the text. `image`: velocity
    `[B, C, H, W]`, or without a picture `[B, 8, D]`, the tokens that stood for it, behind the blocks."""

    text: Tensor
    image: Tensor


class DualMMDiT(CheckedModel):
    """Velocity of image latents and logits of text ids, from noisy latents and features of noisy text.

    Weights are drawn from torch's global generator: seed with `torch.manual_seed` before construction.

    Args:
        vocab_size: V, text ids that are predicted, [MASK] among them (the last one).
        sample_size: side of the latents that the model is made for, which gives new position tables their unit.
        patch_size: p, latent pixels per token along each side.
        in_channels, out_channels: of latents and of the velocity.
        num_layers: two-stream blocks.
        num_heads, head_dim: attention heads; the width D is their product.
        text_dim: features of the text encoder.
        position_side: M, side of the table of positions, in patches; a grid takes its centre.
    """

    _no_split_modules = _repeated_blocks = ("DoubleBlock",)
    _skip_layerwise_casting_patterns = ("embed", "norm", "condition", "patch", "text_out", "image_out")

    @register_to_config
    def __init__(
        self,
        vocab_size: Rows = 32100,
        sample_size: Width = 64,
        patch_size: Width = 2,
        in_channels: Width = 16,
        num_layers: Layers = 24,
        num_heads: Depth = 24,
        head_dim: Width = 64,
        text_dim: Width = 4096,
        out_channels: Width = 16,
        position_side: Width = 192,
    ) -> None:
        super().__init__()
        self.check_arguments()
        size = num_heads * head_dim
        if size % 4:
            raise ValueError(f"num_heads * head_dim = {size}; expected a multiple of 4, for positions on two axes")
        self.patch = nn.Conv2d(in_channels, size, patch_size, stride=patch_size)
        self.register_buffer("positions", position_table(size, position_side, sample_size // patch_size))
        self.condition_time = TwoLayer(SINUSOID, size)
        self.embed_text = nn.Linear(text_dim, size)
        self.null_image = nn.Parameter(torch.empty(1, NULL_TOKENS, size))
        self.double_blocks = nn.ModuleList(DoubleBlock(size, num_heads, "none") for _ in range(num_layers))
        self.image_norm = nn.Linear(size, 2 * size)  # scale, then shift
        self.image_out = nn.Linear(size, patch_size * patch_size * out_channels)
        self.text_out = nn.Linear(size, vocab_size)
        self._init_weights()

    def forward(self, latents: Tensor | None, text: Tensor, time: Tensor) -> DualOutput:
        """Both streams through all blocks.

        Args:
            latents: float `[B, C, H, W]`, sides multiples of p; None for no picture.
            text: float `[B, L, text_dim]`, features of the text encoder. All L are attended to.
            time: float `[B]`, 0 (a clean picture) to 1000 (noise).

        Raises:
            ValueError: latents of another shape, or larger than the table of positions.
        """
        vector = self.time_features(time)  # [B, D]
        image = self.null_image.expand(len(text), -1, -1) if latents is None else self.read(self.patches(latents))
        words, image = self.run_blocks(self.read_text(text), image, Condition(F.silu(vector)))  # [B, L, D], [B, N, D]
        if latents is None:
            return DualOutput(plain_norm(words), image)
        return DualOutput(plain_norm(words), self.velocity(image, vector, latents.shape[2:]))

    def text_head(self, features: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Logits of the text ids `[start, stop)`: `[..., D]` to float32 `[..., stop - start]`."""
        logits = F.linear(features, self.text_out.weight[start:stop], self.text_out.bias[start:stop])
        return logits if logits.dtype == torch.float64 else logits.float()

    def head_parameters(self) -> tuple[Tensor, Tensor | None]:
        """See `LinearHead`."""
        return self.text_out.weight, self.text_out.bias

    @property
    def num_blocks(self) -> int:
        return len(self.double_blocks)

    def time_features(self, time: Tensor) -> Tensor:
        """`[B, D]` of times `[B]`, before the SiLU of the modulations."""
        return self.condition_time(sinusoid(time))

    def read_text(self, text: Tensor) -> Tensor:
        """Features of the text encoder to the width of the model, token by token."""
        return self.embed_text(text.to(self.embed_text.weight.dtype))

    def patches(self, latents: Tensor) -> Tensor:
        """Latents `[B, C, H, W]` to what their tokens are made of, `[B, h, w, C p p]`; `ValueError` for another shape."""
        channels, p = self.config.in_channels, self.config.patch_size
        if latents.ndim != 4 or latents.shape[1] != channels or any(side % p or not side for side in latents.shape[2:]):
            found = f"latents have shape {tuple(latents.shape)}"
            raise ValueError(f"{found}; expected [B, {channels}, H, W] with sides that are multiples of {p}")
        cut = latents.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # [B, C, h, p, w, p]
        return cut.permute(0, 2, 4, 1, 3, 5).flatten(3)

    def read(self, patches: Tensor) -> Tensor:
        """Patches `[B, h, w, C p p]` to tokens `[B, N, D]`, row by row, with their positions."""
        weight = self.patch.weight.flatten(1)
        tokens = F.linear(patches.to(weight.dtype), weight, self.patch.bias).flatten(1, 2)  # [B, N, D]
        return tokens + self.cropped(*patches.shape[1:3]).to(tokens.dtype)

    def cropped(self, height: int, width: int) -> Tensor:
        """`[1, N, D]`: positions of a grid of patches, from the centre of the table; `ValueError` for a larger grid."""
        side = self.config.position_side
        if max(height, width) > side:
            raise ValueError(f"a grid of {height}x{width} patches is larger than the table of {side}x{side} positions")
        top, left = (side - height) // 2, (side - width) // 2
        table = self.positions.unflatten(1, (side, side))
        return table[:, top : top + height, left : left + width].flatten(1, 2)

    def velocity(self, image: Tensor, vector: Tensor, size: Sequence[int]) -> Tensor:
        """Image tokens `[B, N, D]` behind the blocks to the velocity `[B, C, H, W]` of latents of that size (H, W)."""
        scale, shift = self.image_norm(F.silu(vector))[:, None].chunk(2, dim=-1)
        out = self.image_out(
            modulate(plain_norm(image), Modulation(shift, scale, torch.ones_like(scale)))
        )  # [B, N, p p C]
        p = self.config.patch_size
        out = out.unflatten(1, (size[0] // p, size[1] // p)).unflatten(3, (p, p, -1))  # [B, h, w, p, p, C]
        return out.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def run_blocks(
        self, text: Tensor, image: Tensor, condition: Condition, views: Sequence[View] | None = None
    ) -> tuple[Tensor, Tensor]:
        """All blocks, with a view for each (None: of all tokens): `[B, l, D]` and `[B, n, D]` to the same."""
        views = [WholeView(None)] * self.num_blocks if views is None else views
        for block, view in zip(self.double_blocks, views, strict=True):
            text, image = block(text, image, condition, view)
        return text, image

    def make_store(self, rows: int, length: int, tokens: int, options: StoreOptions | None = None) -> FeatureStore:
        """Empty features for rows of `length` text tokens and, behind them, so many image tokens."""
        heads, width = self.config.num_heads, self.config.num_heads * self.config.head_dim
        layout = StoreLayout(heads, self.config.head_dim, width, (2,) * self.num_blocks, border=length)
        like = self.embed_text.weight.new_empty(0, device=self.device)
        return FeatureStore(layout, (rows, length + tokens), like, options)

    def partial(
        self,
        text: Tensor,
        image: Tensor,
        vector: Tensor,
        plan: CachePlan,
        store: FeatureStore,
        select: Select | None = None,
    ) -> PartialHidden:
        """Recompute the tokens of a plan over `[B, L + N]`, see `PartialDenoiser.partial`. What is kept at the end of the
        blocks is normed, as the head of the text takes it.

        Args:
            text: float `[B, L, text_dim]`. image: `[B, N, D]`, see `read`. vector: `[B, D]`, see `time_features`.
        """

        def run(rows: Tensor | None, store: FeatureStore, index: TokenIndex, views: Sequence[View]) -> Tensor:
            words, tokens, of_time = (x if rows is None else x[rows] for x in (text, image, vector))
            if not index.whole:
                words = gather_rows(words, index.at[:, : index.split])
                tokens = gather_rows(tokens, index.at[:, index.split :] - store.layout.border)
            parts = self.run_blocks(self.read_text(words), tokens, Condition(F.silu(of_time)), views)
            return plain_norm(torch.cat(parts, dim=1))

        return partial_pass(run, plan, store, select)

    @torch.no_grad()
    def _init_weights(self) -> None:
        """Fan-in scaled normals; gates and both heads start at zero, so blocks start as identities."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
                assert module.bias is not None
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.null_image, std=0.02)
        for block in self.double_blocks:
            assert isinstance(block, DoubleBlock)
            for stream in (block.text, block.image):
                nn.init.zeros_(stream.ada_ln.linear.weight)
        for layer in (self.image_norm, self.image_out, self.text_out):
            nn.init.zeros_(layer.weight)


def position_table(size: int, side: int, base: int) -> Tensor:
    """float32 `[1, M M, D]`, sines and cosines of a grid's columns (first half of the features), then rows.

    Coordinates are index * base / M; each half holds the sines, then the cosines of coordinate * 10000^(-k / (D / 4)).

    Args:
        size: D. side: M. base: patches along the side that the model is made for.
    """
    coordinates = torch.arange(side, dtype=torch.float64) * (base / side)
    frequencies = 10000.0 ** -(torch.arange(size // 4, dtype=torch.float64) / (size // 4))
    angles = coordinates[:, None] * frequencies  # [M, D / 4]
    waves = torch.cat((angles.sin(), angles.cos()), dim=1)  # [M, D / 2]
    columns, rows = waves.repeat(side, 1), waves.repeat_interleave(side, 0)  # [M M, D / 2] each
    return torch.cat((columns, rows), dim=1).float()[None]
