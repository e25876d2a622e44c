"""`VQImageTokenizer`, the one interface over all image tokenizers, and `CellVQModel`, the embedded model's own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from inspect import isabstract
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from unidiff.errors import plain, read_json
from unidiff.files import path_of
from unidiff.registry import Registry
from unidiff.schema import Between, Layers, Rows, Width, check_value
from unidiff.tokens.image.protocols import ImageTokenizerModel, Reconstruction, TrainableTokenizer
from unidiff.weights.model import HOOKS, CheckedModel, bring, load_checked, save_model

_LARGEST = (1 << 62) - 1
RowDraws = torch.Generator | int | Tensor | Sequence[int | torch.Generator] | None
"""Where rows take their noise from, see `row_generators`."""


class Quantized(NamedTuple):
    """Codes int64 `[B, h, w]`, their vectors `[B, d, h, w]`, and the latents `[B, d, h, w]` that were compared with these."""

    codes: Tensor
    vectors: Tensor
    latents: Tensor


class QuantizedAutoencoder(CheckedModel, TrainableTokenizer):
    """Images `[B, 3, H, W]` in [0, 1] to codes and back, in four steps that training and tests use one by one."""

    @abstractmethod
    def latents(self, images: Tensor) -> Tensor:
        """Images to latents `[B, d, h, w]` before quantization."""

    @abstractmethod
    def quantize(self, latents: Tensor) -> Quantized:
        """Codes of latents `[B, d, h, w]`."""

    @abstractmethod
    def lookup(self, codes: Tensor) -> Tensor:
        """Vectors float32 `[B, d, h, w]` of codes `[B, h, w]`, as the decoder sees them."""

    @abstractmethod
    def decode_vectors(self, vectors: Tensor) -> Tensor:
        """Code vectors `[B, d, h, w]` to images `[B, 3, H, W]`, 0 to 1 but not clipped."""

    def encode(self, images: Tensor) -> Tensor:
        return self.quantize(self.latents(images)).codes

    def decode(self, codes: Tensor) -> Tensor:
        return self.decode_vectors(self.lookup(codes))

    def reconstruct(self, images: Tensor, autocast: AbstractContextManager) -> Reconstruction:
        with autocast:
            latents = self.latents(images)
        found = self.quantize(latents)
        with autocast:  # straight-through: the vectors' values, the latents' gradient
            output = self.decode_vectors(latents + (found.vectors - latents).detach())
        kept = latents.detach() if self.has_cell_codes else None
        return Reconstruction(output, found.codes, self.commitment(found), kept)

    def commitment(self, found: Quantized) -> Tensor:
        """Mean squared distance of latents and vectors; a quarter of it moves the encoder, the rest the codebook."""
        encoder = F.mse_loss(found.latents, found.vectors.detach())
        return 0.25 * encoder + F.mse_loss(found.vectors, found.latents.detach())


def _saved_name(value: Any) -> str | None:
    """The class name in a folder's config."""
    found = isinstance(value, type) and issubclass(value, ImageTokenizerModel) and not isabstract(value)
    return value.network_class().__name__ if found else None


IMAGE_TOKENIZERS = Registry[type[ImageTokenizerModel]]("image_tokenizers", "unidiff.tokens.image", _saved_name)


def coder_of(network: nn.Module) -> ImageTokenizerModel:
    """The image tokenizer behind a network of ours or of another library; `ValueError` for one that is none."""
    kinds = [IMAGE_TOKENIZERS[cls.__name__] for cls in type(network).__mro__ if cls.__name__ in IMAGE_TOKENIZERS]
    if not kinds or not isinstance(network, nn.Module):
        names = ", ".join(IMAGE_TOKENIZERS)
        raise ValueError(f"the image tokenizer is a {type(network).__name__}; expected one of {names}")
    return kinds[0].adapt(network)


class VQImageTokenizer:
    """Images to codes and back: `factor` pixels per code along each side, `codebook_size` codes, and whether decoding `draws` noise.

    Args:
        model: one of `IMAGE_TOKENIZERS`: a `CellVQModel`, a `ConvVQModel` (LlamaGen), a diffusers `VQModel`, ...
    """

    def __init__(self, model: nn.Module) -> None:
        self._coder = coder_of(model)
        self.model: Any = model.eval()
        self.factor, self.codebook_size, self.draws = self._coder.factor, self._coder.codebook_size, self._coder.draws

    @property
    def upscale(self) -> int:
        """As of its network."""
        return self._coder.upscale

    @property
    def device(self) -> torch.device:
        if HOOKS & vars(self.model).keys():
            bring(self.model)
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def to(self, *args, **kwargs) -> VQImageTokenizer:
        """Move the weights, as `nn.Module.to`."""
        self.model.to(*args, **kwargs)
        return self

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """float `[B, 3, H, W]` in [0, 1] -> int64 codes `[B, H/factor, W/factor]`; `ValueError` as of `check_images`."""
        check_images(images, self.factor)
        return self._coder.encode(images.to(self.device))

    def decode(self, codes: Tensor, generator: RowDraws = None) -> Tensor:
        """int64 codes `[B, h, w]` -> float32 `[B, 3, h * s, w * s]` in [0, 1], s = factor * upscale.

        Args:
            generator: of the noise, where decoding draws some (`draws`); errors as of `row_generators` and `check_codes`.
        """
        return self._decode(codes, generator)

    def decode_with(self, name: str | None = None, steps: int | None = None) -> None:
        """As of its network."""
        self._coder.decode_with(name, steps)

    def preview(self, codes: Tensor, generator: RowDraws = None) -> Tensor:
        """`decode`, by decoders that make many passes in a few: what pictures of half-finished rows look like."""
        return self._decode(codes, generator, quick=True)

    @torch.no_grad()
    def _decode(self, codes: Tensor, generator: RowDraws, quick: bool = False) -> Tensor:
        check_codes(codes, self.codebook_size)
        codes = codes.to(self.device)
        if self.draws:
            return self._coder.draw(codes, row_generators(generator, len(codes)), quick).float().clamp(0, 1)
        return self._coder.decode(codes).float().clamp(0, 1)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config and weights (safetensors); other files in the folder stay.

        Raises ValueError: `folder` is a file or holds another model, or weights that hold NaN. OSError: a full disk."""
        if isinstance(self.model, CheckedModel):
            self.model.save_pretrained(folder)
        else:
            save_model(self.model, folder, self.model.save_pretrained)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, dtype: torch.dtype = torch.float32, variant: str | None = None
    ) -> Self:
        """Read a folder written by `save_pretrained`, or any diffusers `VQModel` folder; `FileNotFoundError` for none."""
        path = path_of(folder) / "config.json"
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist; name a folder with an image tokenizer")
        config = read_json(path, "an image tokenizer's config")
        name = config.get("_class_name")
        if not isinstance(name, str) or name not in IMAGE_TOKENIZERS:
            raise ValueError(f"{path} holds a {plain(name)!r}; expected one of {sorted(IMAGE_TOKENIZERS)}")
        kind = IMAGE_TOKENIZERS[name]
        try:
            kind.check_config(config)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        load = kind.network_class().from_pretrained
        return cls(load_checked(load, name, str(folder), torch_dtype=dtype, variant=variant)[0])


def check_images(images: Tensor, factor: int) -> None:
    """Raise `ValueError` unless `images` is float `[B, 3, H, W]` in [0, 1] with sides that `factor` divides."""
    check_value(images, Tensor, "the batch of images")
    if not images.is_floating_point():
        raise ValueError(f"images have dtype {images.dtype}; expected floats in [0, 1], so divide 8-bit values by 255")
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images have shape {tuple(images.shape)}; expected [B, 3, H, W] (RGB)")
    height, width = images.shape[-2:]
    if height % factor or width % factor or not height or not width:
        raise ValueError(f"image size {height}x{width} must be a positive multiple of {factor}; resize or crop it")
    low, high = images.amin().item(), images.amax().item()
    if not (low >= -1e-3 and high <= 1 + 1e-3):
        raise ValueError(f"image values span [{low:.3g}, {high:.3g}]; expected finite values in [0, 1]")


def check_codes(codes: Tensor, codebook_size: int) -> None:
    """Raise `ValueError` unless `codes` is integer `[B, h, w]` with values below `codebook_size`."""
    if not isinstance(codes, Tensor):
        check_value(codes, Tensor, "the batch of codes")
    if codes.ndim != 3 or codes.is_floating_point() or codes.is_complex() or not codes.numel():
        raise ValueError(f"codes have shape {tuple(codes.shape)} and dtype {codes.dtype}; expected int64 [B, h, w]")
    low, high = int(codes.min()), int(codes.max())
    if low < 0 or high >= codebook_size:
        raise ValueError(f"codes span [{low}, {high}]; expected values in [0, {codebook_size})")


def row_generators(generator: RowDraws, rows: int) -> list[torch.Generator]:
    """A generator on the CPU for each row, so that a row's noise does not depend on the other rows or on the device.

    Args:
        generator: None for fresh noise; a torch generator, or an int that stands for one, which draws a seed for each row; or
            one entry for each row, a seed (int64 `[B]` or a list) or a generator.

    Raises:
        ValueError: another kind of thing, or a list of another length.
    """
    if generator is None:
        generator = torch.Generator()
        generator.seed()
    elif isinstance(generator, int) and not isinstance(generator, bool):
        generator = torch.Generator().manual_seed(generator)
    if isinstance(generator, torch.Generator):
        drawn = [int(torch.randint(_LARGEST, (), generator=generator, device=generator.device)) for _ in range(rows)]
        return [torch.Generator().manual_seed(seed) for seed in drawn]
    entries = generator.tolist() if isinstance(generator, Tensor) else generator
    if not isinstance(entries, list | tuple) or len(entries) != rows:
        given = f"{len(entries)} entries" if isinstance(entries, list | tuple) else f"a {type(entries).__name__}"
        raise ValueError(
            f"generator is {given} for {rows} rows; expected an int, a torch.Generator, or one of them per row"
        )
    if bad := [entry for entry in entries if isinstance(entry, bool) or not isinstance(entry, int | torch.Generator)]:
        raise ValueError(f"generator lists a {type(bad[0]).__name__}; expected ints and torch.Generators")
    return [e if isinstance(e, torch.Generator) else torch.Generator().manual_seed(e) for e in entries]


class ChannelNorm(nn.Module):
    """RMS norm over channels at each place of `[B, C, H, W]`: unlike a group norm it looks nowhere else."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.float().square().mean(1, keepdim=True) + 1e-6).to(x.dtype)
        return x * scale * self.weight[:, None, None].to(x.dtype)


def _silent(layer: nn.Conv2d) -> nn.Conv2d:
    """The layer, whose output is 0 until it is trained."""
    for weights in layer.parameters():
        nn.init.zeros_(weights)
    return layer


class CellBlock(nn.Module):
    """Norm, k x k convolution, SiLU, 1 x 1 convolution, added to the input."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.conv1 = nn.Conv2d(channels, 2 * channels, kernel, padding=kernel // 2)
        self.conv2 = _silent(nn.Conv2d(2 * channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(self.norm(x))))


class PictureContext(nn.Module):
    """Adds a projection of the mean over all cells to each: the background's colour, which codes may leave out; starts silent."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 1)
        self.conv2 = _silent(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(x.mean((2, 3), keepdim=True))))


class CellVQModel(QuantizedAutoencoder):
    """A small VQ autoencoder for images `[B, 3, H, W]` in [0, 1] whose codes depend on one cell of pixels each.

    With group norms and stacked convolutions the same sprite would get other codes at every place, and a generative model
    had to learn them all. Here the encoder sees exactly one `factor x factor` cell; the decoder looks at neighbours to join
    them sharply. Codes are cosine-nearest (Yu et al. 2021, arXiv 2110.04627, 3.2: low-dimensional, l2-normalised codes).

    Args:
        factor: pixels per code along each side, a power of two.
        codebook_size: number of codes.
        code_dim: dimensions of a code vector.
        encoder_width, encoder_depth: channels and residual blocks over single cells.
        decoder_widths: channels at 1/factor, then at each doubling of the resolution; the rest is a pixel shuffle.
        decoder_depths: residual 3 x 3 blocks at each of these resolutions.
        decoder_context: whether the decoder also looks at the mean over the whole picture, after its first block.
    """

    kind = "cell"
    has_cell_codes = True

    @register_to_config
    def __init__(
        self,
        factor: Annotated[int, Between(2, 1024)] = 8,
        codebook_size: Rows = 2048,
        code_dim: Width = 8,
        encoder_width: Width = 256,
        encoder_depth: Layers = 2,
        decoder_widths: Sequence[Width] = (192, 64),
        decoder_depths: Sequence[Layers] = (3, 2),
        decoder_context: bool = False,
    ) -> None:
        super().__init__()
        self.check_arguments()
        if factor < 2 or factor & (factor - 1):
            raise ValueError(f"factor {factor} must be a power of two, at least 2")
        if len(decoder_widths) != len(decoder_depths) or 2 ** (len(decoder_widths) - 1) > factor:
            given = f"decoder_widths {tuple(decoder_widths)} and decoder_depths {tuple(decoder_depths)}"
            raise ValueError(f"{given} must have the same length, at most {factor.bit_length()} for factor {factor}")
        self.encoder = nn.Sequential(
            nn.Conv2d(3, encoder_width, factor, stride=factor),
            *(CellBlock(encoder_width, 1) for _ in range(encoder_depth)),
            ChannelNorm(encoder_width),
            nn.Conv2d(encoder_width, code_dim, 1),
        )
        self.register_buffer("codebook", F.normalize(torch.randn(codebook_size, code_dim), dim=-1))
        layers: list[nn.Module] = [nn.Conv2d(code_dim, decoder_widths[0], 1)]
        for level, (width, depth) in enumerate(zip(decoder_widths, decoder_depths, strict=True)):
            if level:
                layers += [nn.Conv2d(decoder_widths[level - 1], 4 * width, 1), nn.PixelShuffle(2)]
            layers += [CellBlock(width, 3) for _ in range(depth)]
        if decoder_context:
            layers.insert(2, PictureContext(decoder_widths[0]))
        step = factor // 2 ** (len(decoder_widths) - 1)
        layers += [ChannelNorm(decoder_widths[-1]), nn.Conv2d(decoder_widths[-1], 3 * step * step, 1)]
        if step > 1:
            layers.append(nn.PixelShuffle(step))
        self.decoder = nn.Sequential(*layers)

    @property
    def factor(self) -> int:
        return int(self.config.factor)

    @property
    def codebook_size(self) -> int:
        return int(self.config.codebook_size)

    def latents(self, images: Tensor) -> Tensor:
        """Unit vectors `[B, d, h, w]`, float32 whatever autocast says: nearest codes must not depend on bf16 rounding."""
        return F.normalize(self.encoder(images.to(next(self.encoder.parameters()).dtype) * 2 - 1).float(), dim=1)

    def quantize(self, latents: Tensor) -> Quantized:
        """Nearest codes by cosine, in float32."""
        with torch.autocast(latents.device.type, enabled=False):
            codes = (latents.movedim(1, -1) @ self.codebook.float().T).argmax(-1)  # [B, h, w]
            return Quantized(codes, self.lookup(codes), latents)

    def commitment(self, found: Quantized) -> Tensor:
        """One minus the mean cosine; codes follow by averages, not by gradient."""
        return (1 - (found.latents * found.vectors).sum(1)).mean()

    def lookup(self, codes: Tensor) -> Tensor:
        return F.embedding(codes, self.codebook.float()).movedim(-1, 1)

    def decode_vectors(self, vectors: Tensor) -> Tensor:
        return self.decoder(vectors.to(next(self.encoder.parameters()).dtype)) * 0.5 + 0.5
