"""`TransformerConfig`: everything that decides what a `MaskedTransformer` is; its fields are the keys of `config.json`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Literal

from unidiff.schema import Between, Depth, Epsilon, Index, Positive, Rows, Width, check_fields

NormKind = Literal["rms", "layer", "layer_bias"]


@dataclass(frozen=True)
class TransformerConfig:
    """A transformer over one sequence of text ids and image codes.

    Args:
        vocab_size: rows of the embedding and columns of the head.
        hidden_size, num_layers, num_heads: width, depth, heads.
        num_kv_heads: shared key/value heads (GQA); None for one per head.
        head_size: features of a head; None for hidden_size / num_heads.
        ffn_size: inner width of the feed-forward; None for 4 D (GELU) or 8/3 D (SwiGLU, in multiples of 64).
        norm: "rms", "layer" (scale only) or "layer_bias"; `norm_eps` its epsilon.
        qk_norm: "none", "head" (each head) or "width" (before the head split); `qk_norm_type` as `norm`,
            `qk_norm_eps` its epsilon (None: `norm_eps`).
        activation: "swiglu", "gelu" (erf) or "gelu_tanh".
        num_experts: of the mixture in the place of the feed-forward of every layer that is not in `dense_layers` (from 0); 0 for
            none. Each token passes `experts_per_token` of them, SwiGLU networks of inner width `expert_size`, and, where
            `shared_expert_size` is not 0, one more of that width.
        router: "softmax" over all experts, or "sigmoid" of each. router_bias: a number per expert beside the scores: "none",
            "selection" (in the choice alone) or "weights" (in the weights as well).
        router_groups, router_top_groups: experts are chosen from so many of so many groups, the best ones.
        router_normalised: the weights of the chosen ones add up to 1; then they are multiplied by `router_scale`.
        rope: "1d" (index) or "2d" (image tokens by row and column); `rope_theta` and `rope_linear_factor` as in
            `rotary_tables`. rope_grid: every image spans this many steps whatever its side: the factor of an image is
            its side over `rope_grid`, and `rope_linear_factor` stays 1 (UniDisc, interleaved). rope_share: of a head's
            features, the first ones, which are turned.
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

    Raises:
        ValueError: a value of another type or outside its range, or settings that do not go together.
    """

    vocab_size: Rows
    hidden_size: Width = 256
    num_layers: Depth = 6
    num_heads: Depth = 4
    num_kv_heads: Depth | None = None
    head_size: Width | None = None
    ffn_size: Width | None = None
    norm: NormKind = "rms"
    norm_eps: Epsilon = 1e-6
    qk_norm: Literal["none", "head", "width"] = "none"
    qk_norm_type: NormKind = "rms"
    qk_norm_eps: Epsilon | None = None
    activation: Literal["swiglu", "gelu", "gelu_tanh"] = "swiglu"
    num_experts: Index = 0
    experts_per_token: Depth = 1
    expert_size: Width | None = None
    shared_expert_size: Index = 0
    dense_layers: tuple[Index, ...] = ()
    router: Literal["softmax", "sigmoid"] = "softmax"
    router_bias: Literal["none", "selection", "weights"] = "none"
    router_groups: Depth = 1
    router_top_groups: Depth = 1
    router_normalised: bool = True
    router_scale: Positive = 1.0
    rope: Literal["1d", "2d"] = "2d"
    rope_theta: Positive = 1e4
    rope_linear_factor: Positive = 1.0
    rope_grid: Width | None = None
    rope_share: Annotated[float, Between(0, 1)] = 1.0
    modality_embedding: bool = True
    image_embeddings: Index = 0
    grid_embeddings: Index = 0
    time_conditioning: bool = False
    cond_dim: Width = 128
    time_scale: float = 1.0
    constant_time: float | None = None
    time_tokens: Literal["all", "image"] = "all"
    attention_gate: bool = True
    sandwich_norm: bool = False
    tie_head: bool = False
    head_bias: bool = False
    linear_bias: bool = False
    ffn_bias: bool | None = None
    qkv_bias: bool | None = None
    shift: bool = False
    attention: Literal["full", "block_causal"] = "full"
    block_length: Rows | None = None
    dropout: Annotated[float, Between(0, 1 - 2**-40)] = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.dense_layers, list):  # as plain data has them
            object.__setattr__(self, "dense_layers", tuple(self.dense_layers))
        check_fields(self, "MaskedTransformer")
        unit, turned = 4 if self.rope == "2d" else 2, self.head_dim * self.rope_share
        if self.head_size is None and self.hidden_size % (self.num_heads * unit):
            raise ValueError(
                f"hidden_size = {self.hidden_size} must be a multiple of {self.num_heads * unit} for {self.num_heads} heads, "
                f"rope {self.rope}"
            )
        if self.rope_size % unit:
            raise ValueError(
                f"a head has {self.head_dim} features, {turned:g} of them turned by rope {self.rope}; expected a multiple of "
                f"{unit} (head_size, rope_share)"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_kv_heads = {self.num_kv_heads} must divide num_heads = {self.num_heads}")
        if (self.attention == "block_causal") != (self.block_length is not None):
            raise ValueError(
                f"attention = {self.attention!r} with block_length = {self.block_length}; give both, or neither"
            )
        if self.rope_grid is not None and (self.rope != "2d" or self.rope_linear_factor != 1):
            raise ValueError(f"rope_grid = {self.rope_grid} needs rope '2d' and rope_linear_factor 1")
        if self.num_experts:
            self._check_experts()

    def _check_experts(self) -> None:
        if self.expert_size is None:
            raise ValueError(f"num_experts = {self.num_experts} needs expert_size, the inner width of one")
        if self.activation != "swiglu" or self.ffn_bias or (self.linear_bias and self.ffn_bias is None):
            raise ValueError("experts are SwiGLU networks without biases; set activation='swiglu' and ffn_bias=False")
        if self.router_top_groups > self.router_groups or self.num_experts % self.router_groups:
            raise ValueError(
                f"router_groups = {self.router_groups} must divide num_experts = {self.num_experts}, and router_top_groups = "
                f"{self.router_top_groups} be no more than that"
            )
        most = self.num_experts // self.router_groups * self.router_top_groups
        if self.experts_per_token > most:
            raise ValueError(
                f"experts_per_token = {self.experts_per_token}, but a token may choose from {most} experts"
            )

    @cached_property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @cached_property
    def head_dim(self) -> int:
        return self.head_size or self.hidden_size // self.num_heads

    @cached_property
    def rope_size(self) -> int:
        """Features of a head that are turned."""
        return int(self.head_dim * self.rope_share)

    def has_experts(self, layer: int) -> bool:
        """Whether a layer, from 0, has a mixture of experts."""
        return self.num_experts > 0 and layer not in self.dense_layers

    @cached_property
    def inner_size(self) -> int:
        """Width inside the feed-forward: 4 D, or for SwiGLU the same number of weights, 8/3 D in multiples of 64."""
        swiglu = self.activation == "swiglu"
        return self.ffn_size or (-(-8 * self.hidden_size // 3 // 64) * 64 if swiglu else 4 * self.hidden_size)

    @cached_property
    def timed(self) -> bool:
        """Whether features depend on the time."""
        return self.time_conditioning and self.constant_time is None
