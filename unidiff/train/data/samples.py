"""Sample sheets while training: fixed prompts drawn with fixed noise, so that sheets of different steps can be compared."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from unidiff.data.collate import caption_row
from unidiff.decoding.config import Guidance, ModalityDecoding, SamplerConfig
from unidiff.decoding.sampler import Sampler
from unidiff.files import replacing
from unidiff.models.transformer import MaskedTransformer
from unidiff.tokens import Span, TokenBatch
from unidiff.tokens.image.protocol import PixelDecoder
from unidiff.tokens.image.vq import VQImageTokenizer
from unidiff.tokens.text import TextTokenizer
from unidiff.train.config import TrainConfig
from unidiff.train.data.source import TokenSource

_LOG = logging.getLogger(__name__)

_CAPTION_HEIGHT = 14


class SheetSampler:
    """Draws a picture for every prompt and writes `folder/step-N.png`.

    Args:
        config: `logging.prompts`, `logging.sample_steps`, `logging.sample_guidance`.
        source: vocabulary, grid and text length of the model's rows.
        decoder: codes to pixels.
        text: tokenizer of the prompts.
        folder: where sheets go.

    Raises:
        ValueError: tokenizers that do not belong to the data.
    """

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
        pictures = self.decoder.decode(codes.view(-1, *self.grid).cpu())
        sheet = draw_sheet(pictures, self.prompts)
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(self.folder / f"step-{step:08d}.png") as temporary:
            sheet.save(temporary, format="PNG")
        return (
            torch.frombuffer(bytearray(sheet.tobytes()), dtype=torch.uint8).view(*sheet.size[::-1], 3).permute(2, 0, 1)
        )


def sheet_sampler(config: TrainConfig, source: TokenSource) -> Callable[[MaskedTransformer, int], Tensor] | None:
    """A `SheetSampler` writing to OUTPUT/samples, or None when sheets are off or no tokenizers are configured.

    Raises:
        FileNotFoundError: a tokenizer folder that does not exist.
    """
    if config.logging.sample_every == 0:
        return None
    needed = {"logging.prompts": config.logging.prompts, "tokenizer.image": config.tokenizer.image}
    needed |= {"tokenizer.text": config.tokenizer.text}
    if absent := [name for name, value in needed.items() if not value]:
        _LOG.warning("no sample sheets are drawn, though logging.sample_every is set: %s is empty", absent[0])
        return None
    decoder = VQImageTokenizer.from_pretrained(config.tokenizer.image)
    text = TextTokenizer.from_pretrained(config.tokenizer.text)
    return SheetSampler(config, source, decoder, text, Path(config.output) / "samples")


def draw_sheet(pictures: Tensor, captions: Sequence[str], columns: int = 8, side: int = 128) -> Image.Image:
    """A grid of pictures (float `[N, 3, H, W]` in [0, 1]), enlarged to `side` pixels, each with its caption below."""
    columns = min(columns, len(pictures))
    lines = -(-len(pictures) // columns)
    cell = side + _CAPTION_HEIGHT
    sheet = Image.new("RGB", (columns * (side + 4), lines * (cell + 4)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        array = (picture.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
        left, top = number % columns * (side + 4), number // columns * (cell + 4)
        sheet.paste(Image.fromarray(array).resize((side, side), Image.Resampling.NEAREST), (left, top))
        draw.text((left + 2, top + side + 1), caption[:22], fill="black")
    return sheet
