"""An image tokenizer."""

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from unidiff.tokens.image.protocols import ImageTokenizerModel
from unidiff.weights.model import CheckedModel


class Mosaic(CheckedModel, ImageTokenizerModel):
    """Each cell of `factor` x `factor` pixels becomes its mean colour, in `levels` steps per channel."""

    @register_to_config
    def __init__(self, factor: int = 8, levels: int = 4) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))  # a model has weights

    @property
    def factor(self) -> int:
        return self.config.factor

    @property
    def codebook_size(self) -> int:
        return self.config.levels**3

    def encode(self, images: Tensor) -> Tensor:
        top = self.config.levels - 1
        red, green, blue = (nn.functional.avg_pool2d(images, self.factor) * top).round().long().unbind(1)
        return (red * (top + 1) + green) * (top + 1) + blue

    def decode(self, codes: Tensor) -> Tensor:
        n = self.config.levels
        small = torch.stack((codes // n**2, codes // n % n, codes % n), 1) / (n - 1)  # [B, 3, h, w]
        return self.gain * small.repeat_interleave(self.factor, 2).repeat_interleave(self.factor, 3)
