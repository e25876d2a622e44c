"""`MaskedTransformer`: the denoiser. Ids of both modalities in, hidden states out, a head that can be sliced."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F

from unidiff.checked import CheckedModel
from unidiff.models.attention import Attention, AttentionMask, block_causal_mask
from unidiff.models.conditioning import AdaLN, Condition, TimeEmbedding, modulate
from unidiff.models.denoiser import DenoiserTraits, LayerFlops
from unidiff.models.image_spans import image_spans
from unidiff.models.layers import ACTIVATIONS, NORMS, FeedForward, Norm, default_ffn_size
from unidiff.models.partial import CachePlan, PartialHidden, Select, partial_hidden
from unidiff.models.rotary import RotaryTables, rotary_tables
from unidiff.models.store import FeatureStore, StoreLayout, StoreOptions
from unidiff.schema import Depth, Epsilon, Index, Positive, Rows, Width
from unidiff.tokens.batch import TokenBatch
from unidiff.tokens.vocabulary import Modality


class Block(nn.Module):
    """x += gate . norm(attention(norm(x))); x += gate . norm(feed_forward(norm(x))); parts left out are identities.

    Args:
        attention, feed_forward: the two branches; the feed-forward is a slot: any module with the same call works.
        norms: the two input norms.
        out_norms: the two sandwich norms on the branch outputs, or None.
        cond_dim: size of the condition for adaLN, or None without time conditioning.
        attention_gate: whether adaLN gates the attention branch.
        dropout: on the branch outputs, in training mode.
    """

    def __init__(
        self,
        attention: Attention,
        feed_forward: nn.Module,
        norms: tuple[Norm, Norm],
        out_norms: tuple[Norm, Norm] | None,
        cond_dim: int | None,
        attention_gate: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        self.attention, self.feed_forward = attention, feed_forward
        self.attention_gate, self.dropout = attention_gate, dropout
        self.attention_norm, self.ffn_norm = norms
        self.attention_out_norm = out_norms[0] if out_norms else None
        self.ffn_out_norm = out_norms[1] if out_norms else None
        self.ada_ln = None if cond_dim is None else AdaLN(cond_dim, norms[0].weight.numel(), branches=2)

    def forward(
        self, x: Tensor, rotary: RotaryTables, mask: AttentionMask, condition: Condition | None = None
    ) -> Tensor:
        """`x` `[B, L, D]` to the same; `mask` as in `Attention`; `condition` where the block was made with `cond_dim`."""
        if self.ada_ln is None:
            x = x + self._leave(self.attention(self.attention_norm(x), rotary, mask), self.attention_out_norm)
            return x + self._leave(self.feed_forward(self.ffn_norm(x)), self.ffn_out_norm)
        first, second = self.ada_ln(condition)
        h = self._leave(self.attention(modulate(self.attention_norm(x), first), rotary, mask), self.attention_out_norm)
        x = x + (first.gate * h if self.attention_gate else h)
        h = self._leave(self.feed_forward(modulate(self.ffn_norm(x), second)), self.ffn_out_norm)
        return x + second.gate * h

    def _leave(self, h: Tensor, norm: Norm | None) -> Tensor:
        h = h if norm is None else norm(h)
        return F.dropout(h, self.dropout, self.training) if self.dropout else h


class MaskedTransformer(CheckedModel):
    """A transformer over one sequence of text ids and image codes, bidirectional or block-causal.

    Weights are drawn from torch's global generator: seed with `torch.manual_seed` before construction.

    Args:
        vocab_size: rows of the embedding and columns of the head.
        hidden_size, num_layers, num_heads: width, depth, heads.
        num_kv_heads: shared key/value heads (GQA); None for one per head.
        ffn_size: inner width of the feed-forward; None for 4 D (GELU) or 8/3 D (SwiGLU, in multiples of 64).
        norm: "rms", "layer" (scale only) or "layer_bias"; `norm_eps` its epsilon.
        qk_norm: "none", "head" (each head) or "width" (before the head split); `qk_norm_type` as `norm`,
            `qk_norm_eps` its epsilon (None: `norm_eps`).
        activation: "swiglu", "gelu" (erf) or "gelu_tanh".
        rope: "1d" (index) or "2d" (image tokens by row and column); `rope_theta` and `rope_linear_factor` as in
            `rotary_tables`. rope_grid: every image spans this many steps whatever its side: the factor of an image is
            its side over `rope_grid`, and `rope_linear_factor` stays 1 (UniDisc, interleaved).
        modality_embedding: add a learned vector per modality to the input.
        image_embeddings: add a learned vector per image of a sample, at its tokens; how many images have one, 0 for none.
        grid_embeddings: add learned vectors per row and per column of an image, at its tokens; how many rows and columns
            have one, 0 for none. Rotary only says how far apart two tokens are; what is on the left or at the top has
            to be learned from that, slowly. They start as zeros, so that weights without them can be warm-started from.
        time_conditioning: adaLN on the time given to `hidden`; `cond_dim` the condition's size.
        time_scale: the time is multiplied by it before the sinusoidal embedding.
        constant_time: the network always sees this time, whatever it is given (MDLM without time conditioning).
        time_tokens: adaLN reaches "all" tokens, or "image": only image tokens, and the shift and scale (not the gate)
            every token of rows without images (UniDisc).
        attention_gate: whether adaLN gates the attention branch (UniDisc with sandwich norms does not).
        sandwich_norm: norms on the branch outputs as well.
        tie_head: the head is the embedding matrix.
        head_bias, linear_bias: biases of the head, of the linear layers; `ffn_bias` and `qkv_bias` override it for the
            feed-forward and for queries, keys and values.
        shift: the weights predict the *next* token, as those that were adapted from an autoregressive model do (Dream):
            features move one token on within their sample, so that the logits at a token are its own for every caller.
        attention: "full" or "block_causal" with blocks of `block_length` positions, counted in each sample.
        dropout: on the branch outputs, in training mode.
    """

    @register_to_config
    def __init__(
        self,
        vocab_size: Rows,
        hidden_size: Width = 256,
        num_layers: Depth = 6,
        num_heads: Depth = 4,
        num_kv_heads: Depth | None = None,
        ffn_size: Width | None = None,
        norm: str = "rms",
        norm_eps: Epsilon = 1e-6,
        qk_norm: str = "none",
        qk_norm_type: str = "rms",
        qk_norm_eps: Epsilon | None = None,
        activation: str = "swiglu",
        rope: str = "2d",
        rope_theta: Positive = 1e4,
        rope_linear_factor: Positive = 1.0,
        rope_grid: Width | None = None,
        modality_embedding: bool = True,
        image_embeddings: Index = 0,
        grid_embeddings: Index = 0,
        time_conditioning: bool = False,
        cond_dim: Width = 128,
        time_scale: float = 1.0,
        constant_time: float | None = None,
        time_tokens: str = "all",
        attention_gate: bool = True,
        sandwich_norm: bool = False,
        tie_head: bool = False,
        head_bias: bool = False,
        linear_bias: bool = False,
        ffn_bias: bool | None = None,
        qkv_bias: bool | None = None,
        shift: bool = False,
        attention: str = "full",
        block_length: Rows | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        c = self.config
        self.check_arguments()
        _check_config(c)
        self.embed_tokens = nn.Embedding(vocab_size, hidden_size)
        self.embed_modality = nn.Embedding(len(Modality), hidden_size) if modality_embedding else None
        self.embed_image = nn.Embedding(image_embeddings, hidden_size) if image_embeddings else None
        self.embed_row, self.embed_column = (
            nn.Embedding(grid_embeddings, hidden_size) if grid_embeddings else None for _ in range(2)
        )
        self.embed_time = TimeEmbedding(cond_dim) if time_conditioning else None
        self.blocks = nn.ModuleList(self._make_block() for _ in range(num_layers))
        self.final_norm = Norm(hidden_size, norm, norm_eps)
        self.final_ada_ln = AdaLN(cond_dim, hidden_size, branches=None) if time_conditioning else None
        self.output_weight = None if tie_head else nn.Parameter(torch.empty(vocab_size, hidden_size))
        self.output_bias = nn.Parameter(torch.zeros(vocab_size)) if head_bias else None
        self._init_weights()

    def hidden(
        self,
        ids: Tensor,
        modality: Tensor,
        positions: Tensor,
        attention_mask: AttentionMask = None,
        time: Tensor | None = None,
    ) -> Tensor:
        """Final hidden states `[B, L, D]`, ready for `head`.

        Args:
            ids, modality: int64 `[B, L]`.
            positions: int64 `[B, L, 3]`: (index in the sample, image row, image column).
            attention_mask: bool `[B, 1, L, L]`, True where a query may see a key; None when every row is one sample
                without padding (the fast path). A query that may see nothing gets a zero attention output. Or the
                `BlockMask` of a `Visibility`, which has the order of blocks in it.
            time: float `[B]`; needed with `time_conditioning` unless `constant_time` is set, ignored without.
        """
        c = self.config
        # 1. embed
        rotary, spots = self.place(positions, modality)
        x = self.embed(ids, modality, spots)  # [B, L, D]
        # 2. what all layers share besides the rotary tables: visibility, condition
        if c.attention == "block_causal" and (attention_mask is None or isinstance(attention_mask, Tensor)):
            attention_mask = block_causal_mask(positions[..., 0], c.block_length, attention_mask)
        condition = self.condition(modality, time)
        # 3. layers
        for block in self.blocks:
            x = block(x, rotary, attention_mask, condition)
        # 4. final norm
        return self.shifted(self.finish(x, condition), positions)

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
        return partial_hidden(self, ids, plan, store, time, select)

    @property
    def traits(self) -> DenoiserTraits:
        """See `PartialDenoiser`."""
        return transformer_traits(self.config)

    def make_store(self, batch: TokenBatch, options: StoreOptions | None = None) -> FeatureStore:
        """See `PartialDenoiser`."""
        c = self.config
        heads, allowed = c.num_kv_heads or c.num_heads, batch.attention_mask()
        if c.attention == "block_causal":
            allowed = block_causal_mask(batch.positions[..., 0], c.block_length, allowed)
        rotary, spots = self.place(batch.positions, batch.modality)
        inputs = {"modality": batch.modality, **rotary._asdict()} | ({} if spots is None else {"spots": spots})
        layout = StoreLayout(heads, c.hidden_size // c.num_heads, c.hidden_size, (2,) * c.num_layers)
        like = self.embed_tokens.weight.new_empty(0, device=batch.ids.device)
        return FeatureStore(layout, batch.shape, like, options, allowed, inputs)

    def place(self, positions: Tensor, modality: Tensor) -> tuple[RotaryTables, Tensor | None]:
        """What positions `[B, L, 3]` mean to the network: rotary tables, and where the input has learned vectors for it,
        each token's image in its sample, row and column, int64 `[B, L, 3]`.

        Raises:
            ValueError: an image with more rows or columns than `grid_embeddings` (checked on the CPU).
        """
        c = self.config
        dtype = torch.float64 if self.embed_tokens.weight.dtype == torch.float64 else torch.float32
        factor: float | Tensor = c.rope_linear_factor
        number = torch.zeros_like(modality)
        if c.rope_grid is not None or self.embed_image is not None:
            spans = image_spans(positions, modality)
            number = spans.number
            if c.rope_grid is not None:
                factor = spans.side[..., None].to(dtype) / c.rope_grid
        head_dim = c.hidden_size // c.num_heads
        rotary = rotary_tables(positions, modality, head_dim, c.rope, c.rope_theta, factor, dtype)
        if self.embed_image is None and self.embed_row is None:
            return rotary, None
        spots = torch.where((modality == Modality.IMAGE)[..., None], positions[..., 1:], 0)  # [B, L, 2]
        if self.embed_row is not None and spots.device.type == "cpu" and int(spots.max()) >= c.grid_embeddings:
            raise ValueError(
                f"an image has {int(spots.max()) + 1} rows or columns of tokens, the model knows {c.grid_embeddings} "
                "(grid_embeddings); give smaller images"
            )
        return rotary, torch.cat([number[..., None], spots], -1)

    def embed(self, ids: Tensor, modality: Tensor, spots: Tensor | None = None) -> Tensor:
        """Input of the first layer `[B, L, D]`; `spots` as `place` returns it."""
        x = F.embedding(ids, self.embed_tokens.weight)
        if self.embed_modality is not None:
            x = x + F.embedding(modality, self.embed_modality.weight)
        if spots is not None:
            tables = (self.embed_image, self.embed_row, self.embed_column)
            parts = [F.embedding(spots[..., i], t.weight) for i, t in enumerate(tables) if t is not None]
            x = x + sum(parts) * (modality == Modality.IMAGE)[..., None]
        return x

    def finish(self, x: Tensor, condition: Condition | None) -> Tensor:
        """The final norm."""
        x = self.final_norm(x)
        return x if self.final_ada_ln is None else modulate(x, self.final_ada_ln(condition)[0])

    def shifted(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """With `shift`, `[B, L, D]` where every token has the features of the one before it; a sample's first its own."""
        if not self.config.shift:
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
        return self.head(self.hidden(batch.ids, batch.modality, batch.positions, batch.attention_mask(), time))

    def condition(self, modality: Tensor, time: Tensor | None) -> Condition | None:
        c = self.config
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

    def _make_block(self) -> Block:
        c = self.config
        ffn_size = c.ffn_size or default_ffn_size(c.hidden_size, c.activation)
        ffn_bias = c.linear_bias if c.ffn_bias is None else c.ffn_bias
        qk_eps = c.norm_eps if c.qk_norm_eps is None else c.qk_norm_eps
        norms = [Norm(c.hidden_size, c.norm, c.norm_eps) for _ in range(4 if c.sandwich_norm else 2)]
        return Block(
            Attention(
                c.hidden_size,
                c.num_heads,
                c.num_kv_heads or c.num_heads,
                c.qk_norm,
                c.qk_norm_type,
                qk_eps,
                c.linear_bias,
                c.qkv_bias,
            ),
            FeedForward(c.hidden_size, ffn_size, c.activation, ffn_bias),
            (norms[0], norms[1]),
            (norms[2], norms[3]) if c.sandwich_norm else None,
            c.cond_dim if c.time_conditioning else None,
            c.attention_gate,
            c.dropout,
        )

    def weight_copies(self) -> dict[str, str]:
        return {"output_weight": "embed_tokens.weight"} if self.config.tie_head else {}

    @torch.no_grad()
    def _init_weights(self) -> None:
        """Fan-in scaled normals; residual branches start small.

        Branch outputs start at zero, except where something else already silences or rescales them: with adaLN the
        gates start at zero (two zeros in a row would never learn), and a sandwich norm undoes the scale of its input
        (its own gain starts at 1/sqrt(2 layers) instead).
        """
        c = self.config
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
        if self.output_weight is not None:
            nn.init.normal_(self.output_weight, std=0.02)
        for table in (self.embed_row, self.embed_column):
            if table is not None:
                nn.init.zeros_(table.weight)


def transformer_traits(config: Any) -> DenoiserTraits:
    """From the config of a `MaskedTransformer`."""
    c, d = config, config.hidden_size
    kv = d // c.num_heads * (c.num_kv_heads or c.num_heads)
    inner, matrices = c.ffn_size or default_ffn_size(d, c.activation), 3 if c.activation == "swiglu" else 2
    layer = LayerFlops(2 * d * (d + kv), 2 * d * kv, 2 * d * d, 2 * matrices * d * inner, 4 * d)
    timed = c.time_conditioning and c.constant_time is None
    return DenoiserTraits(c.vocab_size, d, (layer,) * c.num_layers, True, c.block_length, timed)


def _check_config(c: Any) -> None:
    choices = {
        "norm": NORMS,
        "qk_norm": ("none", "head", "width"),
        "qk_norm_type": NORMS,
        "activation": ACTIVATIONS,
        "rope": ("1d", "2d"),
        "time_tokens": ("all", "image"),
        "attention": ("full", "block_causal"),
    }
    for name, allowed in choices.items():
        if c[name] not in allowed:
            raise ValueError(f"{name} = {c[name]!r}; expected one of {list(allowed)}")
    unit = c.num_heads * (4 if c.rope == "2d" else 2)
    if c.hidden_size % unit:
        raise ValueError(
            f"hidden_size = {c.hidden_size} must be a multiple of {unit} for {c.num_heads} heads, rope {c.rope}"
        )
    if c.num_kv_heads is not None and (c.num_kv_heads < 1 or c.num_heads % c.num_kv_heads):
        raise ValueError(f"num_kv_heads = {c.num_kv_heads} must divide num_heads = {c.num_heads}")
    if (c.attention == "block_causal") != (c.block_length is not None) or (c.block_length or 1) < 1:
        raise ValueError(f"attention = {c.attention!r} with block_length = {c.block_length}; give both, or neither")
    if c.rope_grid is not None and (c.rope != "2d" or c.rope_grid < 1 or c.rope_linear_factor != 1):
        raise ValueError(f"rope_grid = {c.rope_grid} needs rope '2d', at least 1 and rope_linear_factor 1")
    if not 0 <= c.dropout < 1:
        raise ValueError(f"dropout = {c.dropout} must lie in [0, 1)")
