"""Sample sheets while training: fixed prompts drawn with fixed noise, so that sheets of different steps can be compared."""

from __future__ import annotations

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
from unidiff.tokens.image.protocols import PixelDecoder
from unidiff.tokens.image.vq import VQImageTokenizer
from unidiff.tokens.text import TextTokenizer
from unidiff.train.config import TrainConfig
from unidiff.train.data.source import TokenRows, TokenSource

COLUMNS, SHOWN = 8, 8  # pictures of a line, held-out rows


class SheetSampler:
    """Draws a picture for every prompt, and describes and completes pictures that are held out; writes `folder/step-N.png`.

    Args:
        held_out: rows whose pictures are described and completed, and whose captions are drawn where there are no prompts.
        sees: whether words are read from pictures, which block-causal models cannot.

    Raises ValueError for tokenizers of other data.
    """

    def __init__(
        self,
        config: TrainConfig,
        source: TokenSource,
        decoder: PixelDecoder,
        text: TextTokenizer,
        folder: Path,
        held_out: TokenRows | None = None,
        sees: bool = True,
    ) -> None:
        vocabulary = source.vocabulary
        if (decoder.codebook_size, text.size) != (vocabulary.image_size, vocabulary.text_size):
            raise ValueError(
                f"the tokenizers have {decoder.codebook_size} codes and {text.size} text ids, the data "
                f"{vocabulary.image_size} and {vocabulary.text_size}; point tokenizer.image and tokenizer.text at its own"
            )
        self.folder, self.decoder, self.text, self.held_out = folder, decoder, text, held_out
        self.vocabulary, self.grid, self.prefix, self.sees = vocabulary, source.grid, source.text_prefix, sees
        self.prompts = list(config.logging.prompts)
        if not self.prompts and held_out is not None:
            self.prompts = self._said(held_out.captions)
        self.settings = SamplerConfig(
            image=ModalityDecoding(steps=config.logging.sample_steps, choice_temperature=1.0),
            guidance=Guidance(scale=config.logging.sample_guidance),
        )
        rows = [caption_row(text, prompt, source.text_length).ids for prompt in self.prompts]
        self.words = torch.tensor(rows)  # [P, T]

    @torch.no_grad()
    def __call__(self, model: MaskedTransformer, step: int) -> Tensor:
        """Decode, write the sheet, and return it as uint8 `[3, H, W]`."""
        hidden, count = torch.ones(self.grid, dtype=torch.bool), len(self.prompts)
        blank = torch.zeros((count, *self.grid), dtype=torch.long)
        _, codes = self._decode(model, self.words, blank, self.words < 0, hidden.expand(count, -1, -1), self.settings)
        cells = [[Cell((x,), said) for x, said in zip(self._pictures(codes), self.prompts, strict=True)]]
        if self.held_out is not None:
            cells += self._held_out(model, self.held_out)
        lines = [part[n : n + COLUMNS] for part in cells for n in range(0, len(part), COLUMNS)]
        sheet = draw_sheet(lines)
        save_image(sheet, self.folder / f"step-{step:08d}.png")
        return torch.from_numpy(np.array(sheet)).permute(2, 0, 1)

    def _held_out(self, model: MaskedTransformer, rows: TokenRows) -> list[list[Cell]]:
        """Pictures with what the model says of them, and pictures whose right half it makes anew."""
        plain, none = SamplerConfig(self.settings.text, self.settings.image), torch.zeros_like(rows.codes).bool()
        half = none.clone()
        half[:, :, self.grid[1] // 2 :] = True
        shown, cells = self._pictures(rows.codes), []
        if self.sees:
            unsaid = torch.ones_like(rows.captions).bool()
            unsaid[:, : self.prefix] = False
            words, _ = self._decode(model, rows.captions, rows.codes, unsaid, none, plain)
            cells.append([Cell((x,), s, heading="described") for x, s in zip(shown, self._said(words), strict=True)])
        _, codes = self._decode(model, rows.captions, rows.codes, torch.zeros_like(rows.captions).bool(), half, plain)
        pairs = zip(shown, self._pictures(codes), strict=True)
        return [*cells, [Cell(pair, heading="right half made anew") for pair in pairs]]

    def _decode(
        self,
        model: MaskedTransformer,
        words: Tensor,
        codes: Tensor,
        unsaid: Tensor,
        holes: Tensor,
        settings: SamplerConfig,
    ) -> tuple[Tensor, Tensor]:
        """Text ids `[B, T]` and codes `[B, h, w]` with what is hidden (`unsaid`, `holes`) filled, each counted from 0."""
        device, ids = next(model.parameters()).device, self.vocabulary
        rows = []
        for row, picture, gap, hole in zip(words, codes, unsaid, holes, strict=True):
            said = [None if hidden else int(token) + ids.text[0] for token, hidden in zip(row, gap, strict=True)]
            rows.append([Span.words(said, ids), Span.codes(picture, ids, hole)])
        batch = TokenBatch.from_spans(rows).to(device)
        condition = batch.given.clone()
        condition[:, : self.prefix] = False  # the task token stays visible in the unconditional stream, as in training
        seeds, length = torch.arange(len(rows), device=device), words.shape[1]
        found = Sampler(model, ids, settings)(batch, seeds, condition=condition).batch.ids.cpu()
        return found[:, :length] - ids.text[0], (found[:, length:] - ids.image[0]).view(-1, *self.grid)

    def _said(self, words: Tensor) -> list[str]:
        return [self.text.decode(row[self.prefix :].tolist()).strip() for row in words]

    def _pictures(self, codes: Tensor) -> list[Image.Image]:
        pictures = self.decoder.decode(codes).clamp(0, 1)  # [B, 3, h, w]
        images = (pictures * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        return [Image.fromarray(image) for image in images]


def sheet_sampler(
    config: TrainConfig, source: TokenSource, held_out: TokenSource | None = None
) -> Callable[[MaskedTransformer, int], Tensor] | None:
    """A `SheetSampler` writing to OUTPUT/samples, or None when sheets are off, or there are no tokenizers or nothing to draw.

    Raises FileNotFoundError for a tokenizer's folder that does not exist.
    """
    image, words = config.tokenizer.image, config.tokenizer.text
    if config.logging.sample_every == 0 or not (image and words) or not (config.logging.prompts or held_out):
        return None
    decoder, text = VQImageTokenizer.from_pretrained(image), TextTokenizer.from_pretrained(words)
    rows = None if held_out is None else held_out.fetch(torch.arange(min(SHOWN, held_out.rows or SHOWN)))
    sees = config.model.get("attention") != "block_causal"
    return SheetSampler(config, source, decoder, text, Path(config.output) / "samples", rows, sees)
