"""`MaskedTransformer`: the denoiser. Ids of both modalities in, hidden states out, a head that can be sliced."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unidiff.models.block import (
    AdaLN,
    Attention,
    AttentionMask,
    Block,
    Condition,
    TimeEmbedding,
    View,
    WholeView,
    modulate,
)
from unidiff.models.config import TransformerConfig
from unidiff.models.denoiser import CachePlan, DenoiserTraits, LayerFlops, PartialHidden, Select
from unidiff.models.experts import mixtures
from unidiff.models.partial import partial_pass
from unidiff.models.parts import FeedForward, Norm, RotaryTables, gather_rows, queries_of
from unidiff.models.store import FeatureStore, StoreLayout, StoreOptions, TokenIndex
from unidiff.tokens import Modality, TokenBatch
from unidiff.tokens.batch import CONTINUOUS
from unidiff.weights.model import CheckedModel, built_from

_OF_TOKENS = ("modality", "grid_index", "features")  # inputs of a store that `embed` takes


class MaskedTransformer(CheckedModel):
    """A transformer over one sequence of text ids and image codes, bidirectional or block-causal.

    Weights are drawn from torch's global generator: seed with `torch.manual_seed` before construction.

    Arguments are the fields of `TransformerConfig`: `MaskedTransformer(vocab_size, hidden_size=...)`.
    """

    _no_split_modules = _repeated_blocks = ("Block",)
    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns = ("embed", "norm", "router")  # the first have the dtype of the features

    @built_from(TransformerConfig)
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.build(config)

    def build(self, config: TransformerConfig) -> None:
        """Make the parts of the network; for constructors."""
        self.settings = c = config
        self.gradient_checkpointing = False  # `enable_gradient_checkpointing` sets it
        size = c.hidden_size
        self.embed_tokens = nn.Embedding(c.vocab_size, size)
        self.embed_modality = nn.Embedding(len(Modality), size) if c.modality_embedding else None
        self.embed_image = nn.Embedding(c.image_embeddings, size) if c.image_embeddings else None
        self.embed_row, self.embed_column = (
            nn.Embedding(c.grid_embeddings, size) if c.grid_embeddings else None for _ in range(2)
        )
        self.embed_time = TimeEmbedding(c.cond_dim) if c.time_conditioning else None
        self.blocks = nn.ModuleList(Block(c, layer) for layer in range(c.num_layers))
        self.final_norm = Norm(size, c.norm, c.norm_eps)
        self.final_ada_ln = AdaLN(c.cond_dim, size, branches=None) if c.time_conditioning else None
        self.output_weight = None if c.tie_head else nn.Parameter(torch.empty(c.vocab_size, size))
        self.output_bias = nn.Parameter(torch.zeros(c.vocab_size)) if c.head_bias else None
        self._init_weights()

    def hidden(
        self,
        ids: Tensor,
        modality: Tensor,
        positions: Tensor,
        attention_mask: AttentionMask = None,
        time: Tensor | None = None,
        wanted: Tensor | None = None,
        features: Tensor | None = None,
    ) -> Tensor:
        """Final hidden states `[B, L, D]`, ready for `head`.

        Args:
            ids, modality: int64 `[B, L]`.
            positions: int64 `[B, L, 3]`: (index in the sample, image row, image column).
            attention_mask: bool `[B, 1, L, L]` or `[B, 1, 1, L]`, True where a query may see a key; None when every row is one sample
                without padding (the fast path). A query that may see nothing gets a zero attention output. Or the
                `BlockMask` of a `Visibility`, which has the order of blocks in it. Or floats `[B, 1, L, L]` that are added to the
                scores of attention, in place of any order of blocks.
            time: float `[B]`; needed with `time_conditioning` unless `constant_time` is set, ignored without.
            wanted: int64 `[B, m]`, the only positions whose states are returned, `[B, m, D]`: of the others the last layer
                computes keys and values alone. L or more is padding, for any position. Not with `shift`.
            features: float `[B, L, D]`, taken in place of the embedding where an id is `CONTINUOUS`.

        Raises:
            ValueError: features of another width than the model's.
        """
        c = self.settings
        assert wanted is None or not c.shift
        # 1. embed
        rotary, grid_index = self.position_tables(positions, modality)
        x = self.embed(ids, modality, grid_index, features)  # [B, L, D]
        # 2. what all layers share besides the rotary tables: visibility, condition
        own = attention_mask if isinstance(attention_mask, Tensor) else None
        if c.block_length is not None and (attention_mask is None or (own is not None and not own.is_floating_point())):
            attention_mask = block_causal_mask(positions[..., 0], c.block_length, own)
        condition = self.condition(modality, time)
        # 3. layers and final norm
        views = [WholeView(rotary, attention_mask)] * len(self.blocks)
        if wanted is not None:
            if not (attention_mask is None or isinstance(attention_mask, Tensor)):  # a BlockMask is for whole rows
                return gather_rows(self.run_blocks(x, condition, views), wanted)
            views[-1] = WholeView(rotary, queries_of(attention_mask, wanted), left=wanted)
        return self.shifted(self.run_blocks(x, condition, views), positions)

    def partial(
        self,
        ids: Tensor,
        plan: CachePlan,
        store: FeatureStore,
        time: Tensor | None = None,
        select: Select | None = None,
    ) -> PartialHidden:
        """See `PartialDenoiser.partial`. What a query sees: its own sample, no padding, and earlier blocks where the model
        is block-causal."""
        if ids.shape != store.shape:
            raise ValueError(f"ids have shape {tuple(ids.shape)}; expected {tuple(store.shape)}, that of the store")

        def run(rows: Tensor | None, store: FeatureStore, index: TokenIndex, views: Sequence[View]) -> Tensor:
            own, when, inputs = ids, time, store.inputs
            if rows is not None:
                own, when = ids[rows], None if time is None else time[rows]
            condition = self.condition(inputs["modality"], when)
            if not index.whole:
                own, inputs = (
                    own.gather(1, index.at.clamp_max(ids.shape[1] - 1)),
                    store.inputs_at(index, *(name for name in _OF_TOKENS if name in inputs)),
                )
                condition = None if condition is None else condition.at(index.at)
            x = self.embed(own, inputs["modality"], *(inputs.get(name) for name in _OF_TOKENS[1:]))  # [B, n, D]
            return self.run_blocks(x, condition, views)

        return partial_pass(run, plan, store, select)

    @cached_property
    def traits(self) -> DenoiserTraits:
        """See `PartialDenoiser`."""
        c, d = self.settings, self.settings.hidden_size
        q, kv, matrices = c.head_dim * c.num_heads, c.head_dim * c.kv_heads, 3 if c.activation == "swiglu" else 2
        heads = 2 * d * q, 2 * d * kv, 2 * d * kv, 2 * d * q
        dense, layers = 2 * matrices * d * c.inner_size, []
        # of a mixture: the router, and the experts that a token passes
        active = 2 * d * c.num_experts + 6 * d * (c.experts_per_token * (c.expert_size or 0) + c.shared_expert_size)
        for layer in range(c.num_layers):
            layers.append(LayerFlops(*heads, active if c.has_experts(layer) else dense, 4 * q))
        known = {
            "narrows": not c.shift,
            "recordable": not c.num_experts,
        }  # of experts, the host asks how many tokens each has
        return DenoiserTraits(c.vocab_size, d, tuple(layers), True, c.block_length, c.timed, **known)

    def make_store(self, batch: TokenBatch, options: StoreOptions | None = None) -> FeatureStore:
        """See `PartialDenoiser`."""
        c = self.settings
        allowed = batch.attention_mask()
        if c.block_length is not None:
            allowed = block_causal_mask(batch.positions[..., 0], c.block_length, allowed)
        rotary, grid_index = self.position_tables(batch.positions, batch.modality)
        inputs = {"modality": batch.modality, "cos": rotary.cos, "signed_sin": rotary.signed_sin}
        if grid_index is not None:
            inputs["grid_index"] = grid_index
        inputs |= batch.continuous()
        own: Any = self.blocks[0].attention  # with fewer heads than in the config where processes share them
        layout = StoreLayout(own.num_kv_heads, c.head_dim, c.hidden_size, (2,) * c.num_layers)
        like = self.embed_tokens.weight.new_empty(0, device=batch.ids.device)
        return FeatureStore(layout, batch.shape, like, options, allowed, inputs)

    def position_tables(self, positions: Tensor, modality: Tensor) -> tuple[RotaryTables, Tensor | None]:
        """What positions `[B, L, 3]` mean to the network: rotary tables, and where the input has learned vectors for it,
        each token's image in its sample, row and column, int64 `[B, L, 3]`.

        Raises:
            ValueError: an image with more rows or columns than `grid_embeddings` (checked on the CPU).
        """
        c = self.settings
        dtype = torch.float64 if self.embed_tokens.weight.dtype == torch.float64 else torch.float32
        factor: float | Tensor = c.rope_linear_factor
        number = torch.zeros_like(modality)
        if c.rope_grid is not None or self.embed_image is not None:
            spans = image_spans(positions, modality)
            number = spans.number
            if c.rope_grid is not None:
                factor = spans.side[..., None].to(dtype) / c.rope_grid
        rotary = rotary_tables(positions, modality, c.rope_size, c.rope, c.rope_theta, factor, dtype)
        if self.embed_image is None and self.embed_row is None:
            return rotary, None
        grid_index = torch.where((modality == Modality.IMAGE)[..., None], positions[..., 1:], 0)  # [B, L, 2]
        if (
            self.embed_row is not None
            and grid_index.device.type == "cpu"
            and not torch.compiler.is_compiling()
            and int(grid_index.max()) >= c.grid_embeddings
        ):
            raise ValueError(
                f"an image has {int(grid_index.max()) + 1} rows or columns of tokens, the model knows {c.grid_embeddings} "
                "(grid_embeddings); give smaller images"
            )
        return rotary, torch.cat([number[..., None], grid_index], -1)

    def embed(
        self, ids: Tensor, modality: Tensor, grid_index: Tensor | None = None, features: Tensor | None = None
    ) -> Tensor:
        """Input of the first layer `[B, L, D]`; `grid_index` as `position_tables` returns it, `features` as of `hidden`."""
        x = self.embed_tokens(ids if features is None else ids.clamp_min(0))
        if features is not None:
            if (width := features.shape[-1]) != x.shape[-1]:
                raise ValueError(f"features are {width} wide, but the model {x.shape[-1]}; project them to its width")
            x = torch.where((ids == CONTINUOUS)[..., None], features.to(x.dtype), x)
        if self.embed_modality is not None:
            x = x + self.embed_modality(modality)
        if grid_index is not None:
            tables = (self.embed_image, self.embed_row, self.embed_column)
            parts = [table(grid_index[..., i]) for i, table in enumerate(tables) if table is not None]
            x = x + sum(parts) * (modality == Modality.IMAGE)[..., None]
        return x

    def run_blocks(self, x: Tensor, condition: Condition | None, views: Sequence[View]) -> Tensor:
        """All layers, with a view for each, and the final norm: `[B, n, D]` to `[B, m, D]`."""
        for block, view in zip(self.blocks, views, strict=True):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(block, x, condition, view)
            else:
                x = block(x, condition, view)
        left = views[-1].left
        if condition is not None and left is not None:
            condition = condition.at(left)
        x = self.final_norm(x)
        return x if self.final_ada_ln is None else modulate(x, self.final_ada_ln(condition)[0])

    def shifted(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """With `shift`, `[B, L, D]` where every token has the features of the one before it; a sample's first its own."""
        if not self.settings.shift:
            return hidden
        before = F.pad(hidden[:, :-1], (0, 0, 1, 0))
        return torch.where((positions[..., 0] == 0)[..., None], hidden, before)

    def head(self, hidden: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Logits of the ids `[start, stop)`: `[..., D]` to float32 `[..., stop - start]` (float64 for a float64 model)."""
        weight, bias = self.head_parameters()
        logits = F.linear(hidden, weight[start:stop], None if bias is None else bias[start:stop])
        return logits if logits.dtype == torch.float64 else logits.float()

    def head_parameters(self) -> tuple[Tensor, Tensor | None]:
        """Weight `[V, D]` and bias `[V]` (or None) of the whole head."""
        return self.embed_tokens.weight if self.output_weight is None else self.output_weight, self.output_bias

    def forward(self, batch: TokenBatch, time: Tensor | None = None) -> Tensor:
        """Logits over the whole vocabulary, `[B, L, V]`. For tests and small models; training slices the head."""
        rows = batch.ids, batch.modality, batch.positions, batch.attention_mask()
        return self.head(self.hidden(*rows, time, **batch.continuous()))

    def condition(self, modality: Tensor, time: Tensor | None) -> Condition | None:
        c = self.settings
        if self.embed_time is None:
            return None
        if c.constant_time is not None:
            time = torch.full((len(modality),), float(c.constant_time), device=modality.device)
        if time is None:
            raise ValueError("this model is time-conditioned: give `time`, a float tensor [B]")
        vector = self.embed_time(time * c.time_scale)
        if c.time_tokens == "all":
            return Condition(vector)
        image = (modality == Modality.IMAGE)[..., None]  # [B, L, 1]
        return Condition(vector, shifted=image | ~image.any(1, keepdim=True), gated=image)

    def weight_copies(self) -> dict[str, str]:
        return {"output_weight": "embed_tokens.weight"} if self.settings.tie_head else {}

    @torch.no_grad()
    def _init_weights(self) -> None:
        """Fan-in scaled normals; residual branches start small.

        Branch outputs start at zero, except where something else already silences or rescales them: with adaLN the
        gates start at zero (two zeros in a row would never learn), and a sandwich norm undoes the scale of its input
        (its own gain starts at 1/sqrt(2 layers) instead).
        """
        c = self.settings
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, AdaLN):
                nn.init.zeros_(module.linear.weight)
            elif isinstance(module, Block) and module.attention_out_norm and module.ffn_out_norm:
                nn.init.constant_(module.attention_out_norm.weight, (2 * c.num_layers) ** -0.5)
                nn.init.constant_(module.ffn_out_norm.weight, (2 * c.num_layers) ** -0.5)
            elif isinstance(module, (Attention, FeedForward)) and not (c.sandwich_norm or c.time_conditioning):
                nn.init.zeros_(module.out.weight if isinstance(module, Attention) else module.down.weight)
        for mixture in mixtures(self):
            mixture.reset_experts(silent=not (c.sandwich_norm or c.time_conditioning))
        if self.output_weight is not None:
            nn.init.normal_(self.output_weight, std=0.02)
        for table in (self.embed_row, self.embed_column):
            if table is not None:
                nn.init.zeros_(table.weight)


def rotary_tables(
    positions: Tensor,
    modality: Tensor,
    head_dim: int,
    kind: str = "2d",
    theta: float = 1e4,
    linear_factor: float | Tensor = 1.0,
    dtype: torch.dtype = torch.float32,
) -> RotaryTables:
    """Tables for one batch.

    Args:
        positions, modality: as in `MaskedTransformer.hidden`.
        head_dim: features of a head that are turned; divisible by 4 for `kind="2d"`.
        kind: "1d": every token turns by its index. "2d": image tokens turn by row and column instead, in the
            interleaved layout [h0, w0, h1, w1, ...] of UniDisc, whose frequencies are theta^(-4i/head_dim).
        theta: base of the frequencies.
        linear_factor: rows and columns are divided by it (UniDisc: 1 at 256 px, 2 at 512 px); a number, or one per
            token `[B, L, 1]`.
        dtype: of the angles and tables; float32 or float64.
    """
    index = positions[..., 0, None].to(dtype)  # [B, L, 1]
    angles = index * _frequencies(head_dim // 2, theta, index)  # [B, L, d/2]
    if kind == "2d":
        grid = positions[..., 1:].to(dtype) / linear_factor  # [B, L, 2]
        frequencies = _frequencies(head_dim // 4, theta, index)
        by_place = (frequencies[:, None] * grid[..., None, :]).flatten(-2)  # [B, L, d/4, 2] -> [B, L, d/2]
        angles = torch.where((modality == Modality.IMAGE)[..., None], by_place, angles)
    cos, sin = angles[:, :, None].cos(), angles[:, :, None].sin()  # [B, L, 1, d/2]
    return RotaryTables(torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1))


def _frequencies(count: int, theta: float, like: Tensor) -> Tensor:
    exponent = torch.arange(count, dtype=like.dtype, device=like.device) / count
    return theta**-exponent  # [count]


class ImageSpans(NamedTuple):
    """Per position, int64 `[B, L]`."""

    number: Tensor  # which image of its sample, from 0; 0 for text
    side: Tensor  # rows or columns of the image, whichever are more; 1 for text


def image_spans(positions: Tensor, modality: Tensor) -> ImageSpans:
    """Images of packed rows, read off `positions` `[B, L, 3]` and `modality` `[B, L]`.

    One begins at every image token of row 0 and column 0, a sample at every index 0.
    """
    image = modality == Modality.IMAGE
    corner = (image & (positions[..., 1:] == 0).all(-1)).long()
    begun = corner.cumsum(1)  # images of the row begun so far
    before = torch.where(positions[..., 0] == 0, begun - corner, 0).cummax(1).values  # those of earlier samples
    number = torch.where(image, begun - 1 - before, 0).clamp_min(0)
    slot = torch.where(image, begun, 0)
    extent = positions[..., 1:].amax(-1) + 1
    side = torch.zeros_like(slot).scatter_reduce(1, slot, extent, "amax").gather(1, slot)
    return ImageSpans(number, torch.where(image, side, 1))


def block_causal_mask(index: Tensor, block_length: int, allowed: Tensor | None) -> Tensor:
    """bool `[B, 1, L, L]`: a query sees its own block of `block_length` positions and earlier ones (BD3-LM).

    Args:
        index: int64 `[B, L]`, position inside the sample.
        allowed: bool `[B, 1, L or 1, L]` that keeps samples and padding apart, or None for one sample per row.
    """
    block = torch.div(index, block_length, rounding_mode="floor")  # [B, L]
    visible = (block[:, :, None] >= block[:, None, :])[:, None]  # [B, 1, L, L]
    return visible if allowed is None else visible & allowed
