"""The image tokenizer of LLaDA2.0-Uni (arXiv 2604.20796) and GLM-Image: a vision transformer and a codebook, for meaning.

Codes come from the last layer of the transformer. They are not made for pixels to come back: a picture is drawn anew, as the
codes say, by a `FlowDecoder`, whose weights lie beside and are read when the first picture is decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, Protocol

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from unidiff.schema import Between, Depth, Epsilon, Rows, Width
from unidiff.tokens.image.flow import FlowDecoder, FlowSettings
from unidiff.tokens.image.protocols import ImageTokenizerModel, StoredPart
from unidiff.tokens.image.vq import row_generators
from unidiff.weights.model import CheckedModel

Activation = Literal["gelu", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu"]
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "silu": F.silu,
}
NO_DECODER = (
    "these weights only encode pictures: no pixel decoder lies beside them; put decoder (or decoder-turbo), vae and "
    "image_tokenizer/sigvq_embedding.pt into one folder"
)
_AT_ONCE = 2048  # latents that are compared with all codes at once
Level = Annotated[float, Between(-10, 10)]


class StoredDecoder(StoredPart, Protocol):
    """A pixel decoder that was not read yet. `settings`: how it samples where nothing else is asked for."""

    @property
    def settings(self) -> FlowSettings: ...

    def load(self) -> FlowDecoder: ...


class VisionBlock(nn.Module):
    """Attention over all patches of a picture, then a feed-forward network, each behind a layer norm and added to the input."""

    def __init__(self, width: int, inner: int, heads: int, activation: str, bias: bool, eps: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=bias), nn.Linear(width, width, bias=bias)
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)
        self.heads, self.activation = heads, activation

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, N, d]
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(_ACTIVATIONS[self.activation](self.up(self.norm2(x))))


class SiglipVQModel(CheckedModel, ImageTokenizerModel):
    """Pictures `[B, 3, H, W]` in [0, 1] to codes `[B, H/patch_size, W/patch_size]`, and codes to pictures through a decoder.

    Patches go through the network in groups of `merge_size` x `merge_size`, but get the positions, and give the codes, of
    places counted row by row. Only with `merge_size` 1 is the code at (i, j) that of the patch at (i, j). Weights were trained
    with one of the two orders, so the released value has to be kept.

    It always computes in float32 or float64: rounded activations move codes. The defaults are the sizes of GLM-Image's.

    Args:
        patch_size: pixels of a patch along each side. merge_size: see above; sides of pictures are multiples of both together.
        position_side: the table of positions has so many rows and columns; it is stretched over a picture (bilinear).
        hidden_size, ffn_size, num_heads, num_layers, activation, attention_bias, norm_eps: of the transformer.
        codebook_size, code_dim: rows and columns of the codebook; latents and codes are compared as unit vectors.
        mean, std: of the pixels that the network sees, for red, green and blue.

    Raises:
        ValueError: heads that do not divide the width.
    """

    draws: ClassVar[bool] = True

    @register_to_config
    def __init__(
        self,
        patch_size: Annotated[int, Between(1, 1024)] = 16,
        merge_size: Annotated[int, Between(1, 64)] = 1,
        position_side: Annotated[int, Between(1, 8192)] = 128,
        hidden_size: Width = 1536,
        ffn_size: Width = 6144,
        num_heads: Depth = 16,
        num_layers: Depth = 40,
        activation: Activation = "gelu",
        attention_bias: bool = True,
        norm_eps: Epsilon = 1e-6,
        codebook_size: Rows = 16384,
        code_dim: Width = 2048,
        mean: Sequence[Level] = (0.5, 0.5, 0.5),
        std: Sequence[Level] = (0.5, 0.5, 0.5),
    ) -> None:
        super().__init__()
        self.check_arguments()
        if hidden_size % num_heads:
            raise ValueError(f"SiglipVQModel hidden_size {hidden_size} must be a multiple of num_heads {num_heads}")
        if len(mean) != 3 or len(std) != 3 or not all(std):
            raise ValueError(f"SiglipVQModel mean {mean} and std {std} must have three values each, and no std of 0")
        block = (hidden_size, ffn_size, num_heads, activation, attention_bias, norm_eps)
        self.patch_embed = nn.Conv2d(3, hidden_size, patch_size, stride=patch_size)
        self.positions = nn.Parameter(torch.zeros(position_side**2, hidden_size))
        self.blocks = nn.ModuleList(VisionBlock(*block) for _ in range(num_layers))
        self.quant_conv = nn.Conv2d(hidden_size, code_dim, 1)
        self.post_quant_conv = nn.Conv2d(code_dim, hidden_size, 1)
        self.codebook = nn.Parameter(torch.randn(codebook_size, code_dim))
        self._decoders: dict[str, StoredDecoder] = {}
        self._loaded: dict[str, FlowDecoder] = {}  # a plain dict: its weights are not weights of this model
        self.decoder_name, self.flow = "", FlowSettings()

    # ------------------------------------------------------------------------------------------- pictures to codes

    @property
    def factor(self) -> int:
        return int(self.config.patch_size)

    @property
    def codebook_size(self) -> int:
        return int(self.config.codebook_size)

    def patches(self, images: Tensor) -> Tensor:
        """Pictures `[B, 3, H, W]` in [0, 1] to normalised patches `[B, N, 3 * patch_size^2]`, in the order of the network.

        Raises:
            ValueError: sides that `patch_size * merge_size` does not divide.
        """
        side, group = self.factor, int(self.config.merge_size)
        height, width = images.shape[-2:]
        if height % (side * group) or width % (side * group):
            unit = side * group
            raise ValueError(
                f"image size {height}x{width} must be a multiple of {unit} ({group} x {group} patches); resize or crop it"
            )
        mean, std = (images.new_tensor(list(values))[:, None, None] for values in (self.config.mean, self.config.std))
        x = (images - mean) / std
        x = x.reshape(len(x), 3, height // (side * group), group, side, width // (side * group), group, side)
        return x.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(len(x), -1, 3 * side * side)

    def hidden(self, images: Tensor) -> Tensor:
        """Features of the last layer `[B, N, hidden_size]`, which are the input of an understanding model of one's own."""
        self._leave_half_precision()
        images = images.to(self.patch_embed.weight.dtype)
        rows, columns = images.shape[-2] // self.factor, images.shape[-1] // self.factor
        with torch.autocast(images.device.type, enabled=False):
            x = F.linear(self.patches(images), self.patch_embed.weight.flatten(1), self.patch_embed.bias)
            x = x + self._positions(rows, columns)
            for block in self.blocks:
                x = block(x)
        return x

    def latents(self, images: Tensor) -> Tensor:
        """What is compared with the codes: `[B, code_dim, h, w]`, not yet of unit length."""
        rows, columns = images.shape[-2] // self.factor, images.shape[-1] // self.factor
        return self.quant_conv(self.hidden(images).unflatten(1, (rows, columns)).permute(0, 3, 1, 2))

    def encode(self, images: Tensor) -> Tensor:
        """Codes int64 `[B, h, w]`: those with the largest cosine; of equals the first."""
        latents = F.normalize(self.latents(images).movedim(1, -1), dim=-1)  # [B, h, w, d]
        codes = F.normalize(self.codebook, dim=-1).T
        parts = latents.flatten(0, -2).split(_AT_ONCE)  # all cosines of a batch are gigabytes
        return torch.cat([(part @ codes).argmax(-1) for part in parts]).reshape(latents.shape[:-1])

    def _positions(self, rows: int, columns: int) -> Tensor:
        """`[rows * columns, hidden_size]`, place by place, row by row."""
        side = int(self.config.position_side)
        table = self.positions.unflatten(0, (side, side)).permute(2, 0, 1)[None]  # [1, C, side, side]
        places = [((torch.arange(n, device=table.device) + 0.5) / n * 2 - 1).to(table.dtype) for n in (rows, columns)]
        down, right = torch.meshgrid(*places, indexing="ij")
        grid = torch.stack((right, down), -1)[None]  # [1, rows, columns, 2]
        found = F.grid_sample(table, grid, mode="bilinear", padding_mode="border", align_corners=False)
        return found[0].flatten(1).T

    def _leave_half_precision(self) -> None:
        for weight in self.parameters():
            if weight.dtype in (torch.float16, torch.bfloat16):
                weight.data = weight.data.float()

    # ------------------------------------------------------------------------------------------- codes to pictures

    @property
    def decoders(self) -> tuple[str, ...]:
        """Names of the decoders that lie beside the weights."""
        return tuple(self._decoders)

    @property
    def upscale(self) -> int:
        """A decoded picture has `upscale` times as many pixels along each side as an encoded one."""
        return self.flow.upscale

    def attach(self, decoders: Mapping[str, StoredDecoder]) -> None:
        """Make decoders known by name; the first one is chosen."""
        self._decoders = dict(decoders)
        if decoders:
            self.choose_decoder(next(iter(decoders)))

    def parts_beside(self) -> Mapping[str, StoredDecoder]:
        return self._decoders

    def choose_decoder(self, name: str, settings: FlowSettings | None = None) -> None:
        """Decode with another of `decoders` from now on; the one before leaves the memory.

        Args:
            settings: how it samples; None for its released settings.

        Raises:
            ValueError: no such decoder.
        """
        if name not in self._decoders:
            raise ValueError(f"the decoder is {name!r:.80}; expected one of {list(self._decoders)}")
        self._loaded = {held: decoder for held, decoder in self._loaded.items() if held == name}
        self.decoder_name, self.flow = name, settings or self._decoders[name].settings

    def decode_with(self, name: str | None = None, steps: int | None = None) -> None:
        if not self._decoders:
            raise ValueError(NO_DECODER)
        if name is not None:
            self.choose_decoder(name)
        if steps is not None:
            self.flow = replace(self.flow, steps=steps)

    def decode(self, codes: Tensor) -> Tensor:
        """`draw` with fresh noise."""
        return self.draw(codes, row_generators(None, len(codes)))

    def draw(self, codes: Tensor, generators: Sequence[torch.Generator], quick: bool = False) -> Tensor:
        """Pictures float32 `[B, 3, h * factor * upscale, ...]`, one after the other, so that a row is the same in any batch.

        Raises:
            ValueError: no decoder lies beside the weights.
        """
        decoder = self.decoder().to(self.device)
        side, flow = self.factor * self.upscale, self.flow.quick() if quick else self.flow
        return torch.stack([decoder(row, side, g, flow) for row, g in zip(codes, generators, strict=True)])

    def decoder(self) -> FlowDecoder:
        """The chosen decoder, read at the first call; errors as of `draw`."""
        if not self._decoders:
            raise ValueError(NO_DECODER)
        name = self.decoder_name
        if name not in self._loaded:
            self._loaded[name] = self._decoders[name].load()
        return self._loaded[name]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """A decoder that was read moves with the model."""
        for decoder in self._loaded.values():
            decoder._apply(fn, recurse)
        return super()._apply(fn, recurse)
