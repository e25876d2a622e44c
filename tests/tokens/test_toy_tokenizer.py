"""An image tokenizer is one module: nothing of unidiff names it, and saving, loading, training, pipelines and info find it."""

from __future__ import annotations

from toy_packages import run_with

PACKAGE = """
import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import nn

from unidiff.tokens.image.vq import Quantized, QuantizedAutoencoder


class ToyTokenizer(QuantizedAutoencoder):
    kind = "toy"

    @register_to_config
    def __init__(self, factor: int = 4, codebook_size: int = 16):
        super().__init__()
        self.check_arguments()
        self.encoder = nn.Conv2d(3, 4, factor, stride=factor)
        self.decoder = nn.ConvTranspose2d(4, 3, factor, stride=factor)
        self.codebook = nn.Parameter(torch.randn(codebook_size, 4))

    @property
    def factor(self):
        return self.config.factor

    @property
    def codebook_size(self):
        return self.config.codebook_size

    def latents(self, images):
        return self.encoder(images).float()

    def quantize(self, latents):
        codes = torch.cdist(latents.movedim(1, -1), self.codebook).argmin(-1)
        return Quantized(codes, self.lookup(codes), latents)

    def lookup(self, codes):
        return F.embedding(codes, self.codebook).movedim(-1, 1)

    def decode_vectors(self, vectors):
        return self.decoder(vectors)
"""
RUN = """
import sys
from pathlib import Path

import torch
from typer.testing import CliRunner

from unidiff.cli import app
from unidiff.config import load_config
from unidiff.models.transformer import MaskedTransformer
from unidiff.pipeline import UniDiffPipeline
from unidiff.pipelines.settings import PipelineSettings
from unidiff.tokens import Vocabulary
from unidiff.tokens.image.vq import IMAGE_TOKENIZERS, VQImageTokenizer
from unidiff.tokens.text import TextTokenizer
from unidiff.train.image_tokenizer.trainer import ImageTokenizerConfig, train_image_tokenizer

here = Path(sys.argv[1])
words = ["model.kind=toy", "model.factor=8", "data.world=emoji", "data.validation_images=4", "steps=4", "batch_size=2"]
words += [f"out={here / 'run'}", "validate_every=2", "log_every=2", "warmup_steps=1"]
report = train_image_tokenizer(load_config(ImageTokenizerConfig, None, words))
assert report["psnr"] > 0
images = VQImageTokenizer.from_pretrained(here / "run" / "model")
assert type(images.model) is IMAGE_TOKENIZERS["ToyTokenizer"] and (images.factor, images.codebook_size) == (8, 16)
codes = images.encode(torch.rand(1, 3, 16, 24))
assert codes.shape == (1, 2, 3) and images.decode(codes).shape == (1, 3, 16, 24)
try:
    load_config(ImageTokenizerConfig, None, ["model.kind=toy", "model.code_dim=3"])
except ValueError as error:
    assert "'code_dim'" in str(error) and "codebook_size" in str(error)

texts = TextTokenizer.train(["a toy"], 300)
vocabulary = Vocabulary.unified(texts.size, 16, texts.specials())
model = MaskedTransformer(vocabulary.size, hidden_size=16, num_layers=1, num_heads=2)
settings = PipelineSettings(vocabulary, 8, (2, 2))
UniDiffPipeline(model, images, texts, settings).save_pretrained(here / "pipeline")
pipe = UniDiffPipeline.from_pretrained(here / "pipeline")
assert pipe.text_to_image("a toy", generator=0, steps=2).images[0].size == (16, 16)
said = CliRunner().invoke(app, ["info", str(here / "pipeline")])
assert said.exit_code == 0 and "16 codes" in said.output, said.output
"""


def test_an_image_tokenizer_of_another_package(tmp_path):
    run_with(tmp_path, "image_tokenizers", PACKAGE, RUN)
