"""Sample sheets while training: fixed prompts drawn with fixed noise, so that sheets of different steps can be compared."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unidiff.data.rows import caption_row
from unidiff.decoding.config import Guidance, ModalityDecoding, SamplerConfig
from unidiff.decoding.sampler import Sampler
from unidiff.models.transformer import MaskedTransformer
from unidiff.pipelines.sheet import Cell, draw_sheet, save_image
from unidiff.tokens import Span, TokenBatch
from unidiff.tokens.image.vq import PixelDecoder, VQImageTokenizer
from unidiff.tokens.text import TextTokenizer
from unidiff.train.config import TrainConfig
from unidiff.train.data.source import TokenSource

_LOG = logging.getLogger(__name__)
COLUMNS = 8  # pictures of a line


class SheetSampler:
    """Draws a picture for every prompt and writes `folder/step-N.png`. Raises ValueError for tokenizers of other data."""

    def __init__(
        self, config: TrainConfig, source: TokenSource, decoder: PixelDecoder, text: TextTokenizer, folder: Path
    ) -> None:
        vocabulary = source.vocabulary
        if (decoder.codebook_size, text.size) != (vocabulary.image_size, vocabulary.text_size):
            raise ValueError(
                f"the tokenizers have {decoder.codebook_size} codes and {text.size} text ids, the data "
                f"{vocabulary.image_size} and {vocabulary.text_size}; point tokenizer.image and tokenizer.text at its own"
            )
        self.prompts, self.folder, self.decoder = list(config.logging.prompts), folder, decoder
        self.vocabulary, self.grid = vocabulary, source.grid
        self.settings = SamplerConfig(
            image=ModalityDecoding(steps=config.logging.sample_steps, choice_temperature=1.0),
            guidance=Guidance(scale=config.logging.sample_guidance),
        )
        rows = [caption_row(text, prompt, source.text_length).ids for prompt in self.prompts]
        self.words = torch.tensor(rows) + vocabulary.text[0]  # [P, T]
        self.prefix = source.text_prefix

    def __call__(self, model: MaskedTransformer, step: int) -> Tensor:
        """Decode, write the sheet, and return it as uint8 `[3, H, W]`."""
        device = next(model.parameters()).device
        masked = Span.masked_image(self.grid, self.vocabulary)
        batch = TokenBatch.from_spans([[Span.text(words, True), masked] for words in self.words]).to(device)
        words = batch.given.clone()
        words[:, : self.prefix] = False  # the task token stays visible in the unconditional stream, as in training
        seeds = torch.arange(len(self.prompts), device=device)
        output = Sampler(model, self.vocabulary, self.settings)(batch, seeds, condition=words)
        codes = output.batch.ids[:, self.words.shape[1] :] - self.vocabulary.image[0]
        pictures = self.decoder.decode(codes.view(-1, *self.grid).cpu()).clamp(0, 1)  # [P, 3, h, w]
        images = (pictures * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        cells = [Cell((Image.fromarray(x),), words) for x, words in zip(images, self.prompts, strict=True)]
        sheet = draw_sheet([cells[i : i + COLUMNS] for i in range(0, len(cells), COLUMNS)])
        save_image(sheet, self.folder / f"step-{step:08d}.png")
        return torch.from_numpy(np.array(sheet)).permute(2, 0, 1)


def sheet_sampler(config: TrainConfig, source: TokenSource) -> Callable[[MaskedTransformer, int], Tensor] | None:
    """A `SheetSampler` writing to OUTPUT/samples, or None when sheets are off or no tokenizers are configured.

    Raises FileNotFoundError for a tokenizer's folder that does not exist.
    """
    if config.logging.sample_every == 0:
        return None
    prompts, image, words = config.logging.prompts, config.tokenizer.image, config.tokenizer.text
    for name, value in {"logging.prompts": prompts, "tokenizer.image": image, "tokenizer.text": words}.items():
        if not value:
            _LOG.warning("no sample sheets are drawn, though logging.sample_every is set: %s is empty", name)
            return None
    decoder, text = VQImageTokenizer.from_pretrained(image), TextTokenizer.from_pretrained(words)
    return SheetSampler(config, source, decoder, text, Path(config.output) / "samples")
