"""`MMDiT`: the multimodal diffusion transformer of Meissonic and Muddit, with a head per modality.

Unlike `MaskedTransformer` it takes text as features of a separate text encoder and images as a grid of codes, and text
and image ids have tables of their own. Meissonic: arXiv 2410.08261; Muddit: arXiv 2505.23606.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F

from unidiff.models.block import SINUSOID, AdaLN, Condition, View, WholeView, sinusoid
from unidiff.models.denoiser import CachePlan, PartialHidden, Select
from unidiff.models.mmdit_blocks import NORM_EPS, DoubleBlock, SingleBlock, axis_tables, plain_norm
from unidiff.models.partial import partial_pass
from unidiff.models.parts import Norm, RotaryTables, gather_rows
from unidiff.models.store import FeatureStore, StoreLayout, StoreOptions, TokenIndex
from unidiff.schema import Depth, Index, Layers, Positive, Rows, Width
from unidiff.weights.model import CheckedModel

MICRO_CONDITIONS = 5  # original width, original height, crop top, crop left (pixels), aesthetic score
TIME_FACTOR = 1000.0


class MMDiTFeatures(NamedTuple):
    """Features behind the last norms: text `[B, T, D]`, image `[B, H, W, D]` on the grid of the codes. The heads are linear in
    them, so that those of several passes may be mixed before."""

    text: Tensor
    image: Tensor


class MMDiTOutput(NamedTuple):
    """Logits over text ids `[B, T, text_vocab_size]` (None without a text head) and codes `[B, H, W, codebook_size]`."""

    text: Tensor | None
    image: Tensor


class TwoLayer(nn.Module):
    """Linear, SiLU, Linear."""

    def __init__(self, inputs: int, size: int, bias: bool = True) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(inputs, size, bias=bias), nn.Linear(size, size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.silu(self.first(x.to(self.first.weight.dtype))))


class CellConv(nn.Conv2d):
    """A convolution whose stride is the side of its kernel, on the codes of cells: `[B, n, c, D]` to `[B, n, D]`."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.flatten(2), self.weight.permute(0, 2, 3, 1).flatten(1))


class CellSpread(nn.ConvTranspose2d):
    """The transposed form: `[B, n, D]` to `[B, n, c, D]`."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return F.linear(x, self.weight.permute(2, 3, 1, 0).flatten(0, 2)).unflatten(-1, (-1, self.weight.shape[1]))


class MMDiT(CheckedModel):
    """Masked denoiser over text features and a grid of image codes.

    Weights are drawn from torch's global generator: seed with `torch.manual_seed` before construction.

    Args:
        vocab_size: rows of the image embedding (codes, unused rows, [MASK] last).
        codebook_size: codes that the image head predicts.
        text_vocab_size: ids that the text head predicts; None for a model without one (Meissonic).
        num_layers, num_single_layers: double (two-stream) and single (joined) blocks.
        num_heads, head_dim: attention heads; the width D is their product.
        text_dim: features of the text encoder as they enter the model, after the adapter if there is one.
        pooled_dim: size of the text encoder's pooled vector.
        rope_axes: head features that turn with (text index, row, column); even, summing to `head_dim`.
        rope_theta: base of the rotary frequencies.
        adapter_dim: width of another text encoder that an adapter maps to `text_dim`; None without.
        downsample: halve the code grid before the blocks and double it after them.
    """

    _no_split_modules = _repeated_blocks = ("DoubleBlock", "SingleBlock")
    _skip_layerwise_casting_patterns = (
        "embed",
        "norm",
        "condition",
        "image_",
        "text_out",
    )  # read outside of a `forward`

    @register_to_config
    def __init__(
        self,
        vocab_size: Rows = 8256,
        codebook_size: Rows = 8192,
        text_vocab_size: Rows | None = 49408,
        num_layers: Layers = 14,
        num_single_layers: Layers = 28,
        num_heads: Depth = 8,
        head_dim: Width = 128,
        text_dim: Width = 1024,
        pooled_dim: Width = 1024,
        rope_axes: Sequence[Index] = (16, 56, 56),
        rope_theta: Positive = 1e4,
        adapter_dim: Width | None = None,
        downsample: bool = True,
    ) -> None:
        super().__init__()
        self.check_arguments()
        _check_config(self.config)
        size = num_heads * head_dim
        self.embed_codes = nn.Embedding(vocab_size, size)
        self.embed_norm = Norm(size, "rms", NORM_EPS)
        self.embed_out = nn.Conv2d(size, size, 1, bias=False)
        self.down_norm = Norm(size, "rms", NORM_EPS) if downsample else None
        self.down = CellConv(size, size, 2, stride=2, bias=False) if downsample else None
        self.enter_norm = Norm(size, "rms", NORM_EPS)
        self.enter = nn.Linear(size, size, bias=False)
        self.adapter = None if adapter_dim is None else nn.Linear(adapter_dim, text_dim, bias=False)
        self.embed_text = nn.Linear(text_dim, size)
        self.text_norm = Norm(size, "rms", NORM_EPS)
        self.embed_pooled = TwoLayer(pooled_dim + MICRO_CONDITIONS * SINUSOID, size, bias=False)
        self.condition_time = TwoLayer(SINUSOID, size)
        self.condition_pooled = TwoLayer(size, size)
        self.double_blocks = nn.ModuleList(DoubleBlock(size, num_heads) for _ in range(num_layers))
        self.single_blocks = nn.ModuleList(SingleBlock(size, num_heads) for _ in range(num_single_layers))
        self.text_out = None if text_vocab_size is None else nn.Linear(size, text_vocab_size, bias=False)
        self.leave_norm = Norm(size, "rms", NORM_EPS)
        self.leave = nn.Linear(size, size, bias=False)
        self.up_norm = Norm(size, "rms", NORM_EPS) if downsample else None
        self.up = CellSpread(size, size, 2, stride=2, bias=False) if downsample else None
        self.image_in = nn.Conv2d(size, size, 1, bias=False)
        self.image_norm = Norm(size, "rms", NORM_EPS)
        self.image_out = nn.Conv2d(size, codebook_size, 1, bias=False)
        self._init_weights()

    def features(self, codes: Tensor, text: Tensor, pooled: Tensor, micro: Tensor, time: Tensor) -> MMDiTFeatures:
        """Everything up to the heads.

        Args:
            codes: int64 `[B, H, W]`, image codes, or `vocab_size - 1` where hidden. H and W even with `downsample`.
            text: float `[B, T, text_dim]` (or `adapter_dim`), features of the text encoder. All T are attended to.
            pooled: float `[B, pooled_dim]`, the encoder's pooled vector.
            micro: float `[B, 5]` or `[1, 5]`: original width and height, crop top and left in pixels, aesthetic score.
            time: `[B]` or `[1]`, in the checkpoint's convention; multiplied by 1000 here, in float32.

        Raises:
            ValueError: a grid that cannot be halved, or batch sizes that do not fit.
        """
        joined, length = self._tokens(codes, text, pooled, micro, time), text.shape[1]
        words, image = joined[:, :length], joined[:, length:]
        return MMDiTFeatures(plain_norm(words), self.grid(self.leave_cells(image), codes.shape[1:]))

    def features_of_cells(
        self, codes: Tensor, text: Tensor, pooled: Tensor, micro: Tensor, time: Tensor, cells: Tensor
    ) -> Tensor:
        """Features of the codes of some cells alone, int64 `[B, n]`: `[B, n, c, D]`. Of all other tokens the last block,
        which has to be a single one, computes keys and values alone. N or more is padding, for any cell."""
        left = cells.clamp_max(codes.shape[1] * codes.shape[2] // self.cell_side**2 - 1) + text.shape[1]
        return self.leave_cells(self._tokens(codes, text, pooled, micro, time, left))

    def _tokens(
        self, codes: Tensor, text: Tensor, pooled: Tensor, micro: Tensor, time: Tensor, left: Tensor | None = None
    ) -> Tensor:
        """Tokens behind the blocks, all or those `left`, int64 `[B, n]`."""
        self._check_inputs(codes, text, pooled)
        # 1. the condition of all blocks, and both streams
        condition = self.condition(pooled, micro, time)  # vector [B, D]
        words, image = self.read_text(text), self.read_codes(self.cells(codes))  # [B, T, D], [B, N, D]
        # 2. blocks
        rotary = self.rotary(words.shape[1], codes.shape[1:], image.device)
        views = [WholeView(rotary)] * self.num_blocks
        if left is not None:
            cos, sin = (x.expand(len(codes), -1, -1, -1) for x in (rotary.cos, rotary.signed_sin))
            views[-1] = WholeView(rotary._replace(cos=cos, signed_sin=sin), left=left)
        return self.run_blocks(words, image, condition, views)

    def make_store(
        self, rows: int, text_length: int, size: Sequence[int], options: StoreOptions | None = None
    ) -> FeatureStore:
        """Empty features for rows of a text and a grid of codes. Positions are the tokens that the blocks see: T of text,
        then N cells of the image. What is kept at the end of the blocks is ready for the heads: the text's features, and
        behind a cell those of each of its codes."""
        heads, width = self.config.num_heads, self.config.num_heads * self.config.head_dim
        tables = self.rotary(text_length, size, self.device)
        inputs = {"cos": tables.cos, "signed_sin": tables.signed_sin}
        inputs = {name: x.expand(rows, -1, -1, -1).contiguous() for name, x in inputs.items()}
        branches = (2,) * len(self.double_blocks) + (1,) * len(self.single_blocks)
        kept = width * self.cell_side**2
        layout = StoreLayout(heads, self.config.head_dim, width, branches, kept, text_length, interleaved=True)
        like = self.embed_text.weight.new_empty(0, device=self.device)
        return FeatureStore(layout, (rows, len(tables.cos)), like, options, inputs=inputs)

    def partial(
        self,
        text: Tensor,
        cells: Tensor,
        condition: Condition,
        plan: CachePlan,
        store: FeatureStore,
        select: Select | None = None,
    ) -> PartialHidden:
        """Recompute the tokens of a plan over `[B, T + N]`, see `PartialDenoiser.partial`; cells are computed whole.

        Args:
            text: float `[B, T, text_dim]`, features of the text encoder. cells: int64 `[B, N, c]`, see `cells`.
            condition: of the rows.
        """

        def run(rows: Tensor | None, store: FeatureStore, index: TokenIndex, views: Sequence[View]) -> Tensor:
            own, length = (text, cells, condition.vector), store.layout.border
            words, codes, vector = own if rows is None else (x[rows] for x in own)
            if not index.whole:
                words = gather_rows(words, index.at[:, : index.split])
                codes = gather_rows(codes, index.at[:, index.split :] - length)
            x = self.run_blocks(self.read_text(words), self.read_codes(codes), Condition(vector), views)
            words, image = plain_norm(x[:, : index.split]), self.leave_cells(x[:, index.split :]).flatten(2)
            return torch.cat((F.pad(words, (0, image.shape[2] - words.shape[2])), image), dim=1)  # [B, n, c D]

        return partial_pass(run, plan, store, select)

    def run_blocks(self, text: Tensor, image: Tensor, condition: Condition, views: Sequence[View]) -> Tensor:
        """All blocks, with a view for each: `[B, t, D]` and `[B, n, D]` to `[B, t + n, D]`."""
        count = len(self.double_blocks)
        for block, view in zip(self.double_blocks, views[:count], strict=True):
            text, image = block(text, image, condition, view)
        joined = torch.cat((text, image), dim=1)
        for block, view in zip(self.single_blocks, views[count:], strict=True):
            joined = block(joined, condition, view)
        return joined

    @property
    def num_blocks(self) -> int:
        return len(self.double_blocks) + len(self.single_blocks)

    @property
    def cell_side(self) -> int:
        """Rows and columns of codes that share a token in the blocks. Cells do not overlap, so each can be computed alone."""
        return 2 if self.config.downsample else 1

    def cells(self, codes: Tensor) -> Tensor:
        """`[B, H, W]` to `[B, N, c]`, the codes of each cell; both in raster order. `ValueError`: no whole cells."""
        side, (height, width) = self.cell_side, codes.shape[1:]
        if height % side or width % side:
            raise ValueError(f"a grid of {height}x{width} codes cannot be halved; use even sides")
        return codes.unfold(1, side, side).unfold(2, side, side).flatten(3).flatten(1, 2)

    def grid(self, of_cells: Tensor, size: Sequence[int]) -> Tensor:
        """`[B, N, c, ...]` to `[B, H, W, ...]`: the inverse of `cells`."""
        side, (height, width) = self.cell_side, size
        x = of_cells.unflatten(2, (side, side)).unflatten(
            1, (height // side, width // side)
        )  # [B, h, w, side, side, ...]
        return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def read_text(self, text: Tensor) -> Tensor:
        """Features of the text encoder `[B, t, text_dim]` (or `adapter_dim`) to the model's width, token by token."""
        text = text.to(self.embed_text.weight.dtype)
        if self.adapter is not None:
            text = self.adapter(plain_norm(text))
        return self.text_norm(self.embed_text(text))

    def read_codes(self, cells: Tensor) -> Tensor:
        """Codes `[B, n, c]` to image tokens `[B, n, D]`, cell by cell."""
        x = _pointwise(self.embed_out, self.embed_norm(self.embed_codes(cells)))  # [B, n, c, D]
        x = self.down(self.down_norm(x)) if self.down is not None and self.down_norm is not None else x[:, :, 0]
        return self.enter(self.enter_norm(x))

    def leave_cells(self, image: Tensor) -> Tensor:
        """Image tokens `[B, n, D]` behind the blocks to features of their codes `[B, n, c, D]`, cell by cell."""
        x = self.leave(self.leave_norm(image))
        x = self.up(self.up_norm(x)) if self.up is not None and self.up_norm is not None else x[:, :, None]
        return self.image_norm(_pointwise(self.image_in, x))

    def condition(self, pooled: Tensor, micro: Tensor, time: Tensor) -> Condition:
        """SiLU of (time embedding + embedding of pooled text and micro conditions), `[B, D]`; arguments as `features`."""
        micro = sinusoid(micro).flatten(1).expand(len(pooled), -1)  # [B, 1280]
        pooled = self.embed_pooled(torch.cat((pooled.float(), micro), dim=1))  # [B, D]
        moment = self.condition_time(sinusoid(time.float() * TIME_FACTOR))  # [B or 1, D]
        return Condition(F.silu(moment + self.condition_pooled(pooled)))

    def rotary(self, text_length: int, size: Sequence[int], device: torch.device | None = None) -> RotaryTables:
        """Tables `[T + N, 1, d]` for text at the origin, then the cells of a grid of codes at (0, row, column)."""
        height, width = (length // self.cell_side for length in size)
        rows = torch.arange(height, device=device).repeat_interleave(width)
        columns = torch.arange(width, device=device).repeat(height)
        image = torch.stack((torch.zeros_like(rows), rows, columns), dim=1)  # [N, 3]
        positions = torch.cat((image.new_zeros(text_length, 3), image))  # [T + N, 3]
        dtype = torch.float64 if self.embed_text.weight.dtype == torch.float64 else torch.float32
        return axis_tables(positions, self.config.rope_axes, self.config.rope_theta, dtype)

    def text_head(self, features: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Logits of the text ids `[start, stop)`: `[..., D]` to float32 `[..., stop - start]`.

        Raises:
            ValueError: the model has no text head.
        """
        if self.text_out is None:
            raise ValueError("this model predicts images only (text_vocab_size is None); it cannot write text")
        return _wide(F.linear(features, self.text_out.weight[start:stop]))

    def image_head(self, features: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Logits of the codes `[start, stop)`: `[..., D]` to float32 `[..., stop - start]`."""
        return _wide(F.linear(features, self.image_out.weight[start:stop].flatten(1)))

    def forward(self, codes: Tensor, text: Tensor, pooled: Tensor, micro: Tensor, time: Tensor) -> MMDiTOutput:
        """Logits of every position; arguments as `features`."""
        features = self.features(codes, text, pooled, micro, time)
        words = None if self.text_out is None else self.text_head(features.text)
        return MMDiTOutput(words, self.image_head(features.image))

    def _check_inputs(self, codes: Tensor, text: Tensor, pooled: Tensor) -> None:
        if codes.ndim != 3:
            raise ValueError(f"codes have shape {tuple(codes.shape)}; expected a grid [B, H, W]")
        if not len(codes) == len(text) == len(pooled):
            raise ValueError(
                f"{len(codes)} images, {len(text)} texts and {len(pooled)} pooled vectors; expected as many of each"
            )

    @torch.no_grad()
    def _init_weights(self) -> None:
        """Fan-in scaled normals, small embeddings; the gates of adaLN start at zero, so blocks start as identities."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
                # every output of a transposed convolution with stride = kernel size sees `in_channels` inputs
                fan_in = len(module.weight) if isinstance(module, nn.ConvTranspose2d) else module.weight[0].numel()
                nn.init.normal_(module.weight, std=fan_in**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, AdaLN):
                nn.init.zeros_(module.linear.weight)
        nn.init.normal_(self.image_out.weight, std=0.02)
        if self.text_out is not None:
            nn.init.normal_(self.text_out.weight, std=0.02)


def _pointwise(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A 1x1 convolution on channels-last features `[..., D]`."""
    return F.linear(x, conv.weight.flatten(1))


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _check_config(c: Any) -> None:
    axes = list(c.rope_axes)
    if len(axes) != 3 or sum(axes) != c.head_dim or any(n < 0 or n % 2 for n in axes):
        raise ValueError(f"rope_axes = {axes}; expected three even numbers that sum to head_dim = {c.head_dim}")
    if not 1 <= c.codebook_size < c.vocab_size:
        raise ValueError(
            f"codebook_size = {c.codebook_size} must be at least 1 and below vocab_size = {c.vocab_size}, whose last row is [MASK]"
        )
