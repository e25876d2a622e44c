"""`DualTransformer`: a `DualMMDiT` over the code vectors of an image tokenizer, with a text encoder that it learns with."""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F

from unidiff.models.dual_mmdit import DualMMDiT, DualOutput
from unidiff.schema import Between, Depth, Layers, Rows, Width
from unidiff.weights.model import CheckedModel


class _Facts(NamedTuple):
    """What training asks of a model's settings."""

    block_length: None = None
    num_experts: int = 0
    timed: bool = True


class DualTransformer(CheckedModel):
    """A `DualMMDiT` over the vectors of an image tokenizer's codes, and the text encoder that it learns with.

    Args:
        vocab_size: text ids, [MASK] among them as the last one.
        codebook_size, code_dim: of the image tokenizer, whose code vectors are a buffer.
        grid: rows and columns of codes.
        num_layers, num_heads, head_dim: of the network, whose width is num_heads * head_dim.
        text_size, text_layers, text_heads, text_ffn_size: of the text encoder.
    """

    @register_to_config
    def __init__(
        self,
        vocab_size: Rows,
        codebook_size: Rows,
        code_dim: Width,
        grid: Annotated[int, Between(1, 2**12)] = 8,
        num_layers: Layers = 3,
        num_heads: Depth = 4,
        head_dim: Width = 48,
        text_size: Width = 192,
        text_layers: Layers = 2,
        text_heads: Depth = 4,
        text_ffn_size: Width = 512,
    ) -> None:
        from transformers import T5EncoderModel

        super().__init__()
        self.check_arguments()
        if text_size % text_heads:
            raise ValueError(f"text_size {text_size} must be a multiple of text_heads {text_heads}")
        self.network = DualMMDiT(
            vocab_size=vocab_size,
            sample_size=grid,
            patch_size=1,
            in_channels=code_dim,
            num_layers=num_layers,
            num_heads=num_heads,
            head_dim=head_dim,
            text_dim=text_size,
            out_channels=code_dim,
            position_side=grid,
        )
        self.text_encoder = T5EncoderModel(self._t5_config()).encoder
        nn.init.normal_(self.text_encoder.embed_tokens.weight, std=1.0)
        self.register_buffer("code_vectors", torch.zeros(codebook_size, code_dim))

    def _t5_config(self) -> Any:
        from transformers import T5Config

        c = self.config
        return T5Config(
            vocab_size=c.vocab_size,
            d_model=c.text_size,
            d_kv=c.text_size // c.text_heads,
            num_heads=c.text_heads,
            num_layers=c.text_layers,
            d_ff=c.text_ffn_size,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )

    def released_encoder(self) -> Any:
        """The text encoder as transformers' `T5EncoderModel`, which shares its weights."""
        from transformers import T5EncoderModel

        with torch.device("meta"):
            model = T5EncoderModel(self._t5_config())
        table = self.text_encoder.embed_tokens.weight
        weights = {f"encoder.{name}": value for name, value in self.text_encoder.state_dict().items()}
        model.load_state_dict({**weights, "shared.weight": table}, assign=True, strict=False)
        model.tie_weights()
        return model

    @property
    def settings(self) -> _Facts:
        return _Facts()

    @property
    def blocks(self) -> nn.ModuleList:
        return self.network.double_blocks

    def head_parameters(self) -> tuple[Tensor, Tensor | None]:
        """See `LinearHead`."""
        return self.network.head_parameters()

    def latents(self, codes: Tensor) -> Tensor:
        """float `[B, code_dim, h, w]` of codes int64 `[B, h, w]`."""
        return F.embedding(codes, self.code_vectors).movedim(-1, 1)

    def hidden(self, ids: Tensor, latents: Tensor | None, time: Tensor) -> DualOutput:
        """Text ids int64 `[B, T]`, latents (None for no picture) and times `[B]` to what `DualMMDiT` answers."""
        return self.network(latents, self.text_encoder(input_ids=ids).last_hidden_state, time)
