"""Tiny token tables and settings for the training tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from unidiff.data.manifest import TokenManifest
from unidiff.data.tar import ShardWriter
from unidiff.tokens import Vocabulary
from unidiff.train.config import TrainConfig, read_config
from unidiff.train.data.source import TokenTable

DOCUMENT_CODES, DOCUMENT_LENGTH = 9, 40  # of a picture, and most tokens
SPECIALS = {"eos": 0, "caption": 1, "question": 2, "answer": 3}
VOCABULARY = Vocabulary.unified(32, 16, SPECIALS)
TINY = [
    "threads=1",
    "device=cpu",
    "batch_size=8",
    "model={hidden_size: 32, num_layers: 2, num_heads: 2, qk_norm: head}",
    "objective.chunk=64",
    "data.validation_rows=8",
    "schedule.warmup=2",
    "logging.trackers=[]",
    "logging.progress=false",
    "logging.report=false",
    "checkpoint.best=''",
    "logging.validate_every=0",
]
MIXED = [
    "tasks.generate.weight=1",
    "tasks.text_to_image={weight: 2, rate: cosine, dropout: 0.25}",
    "tasks.caption={weight: 1, loss: elbo, dropout: 0.5}",
    "tasks.answer.weight=1",
    "tasks.text.weight=1",
]


def tiny_table(count: int = 64, length: int = 6, side: int = 3, seed: int = 0) -> TokenTable:
    """Rows whose picture is a function of their one word, with one question; two paraphrases."""
    generator = torch.Generator().manual_seed(seed)
    word = torch.randint(0, 8, (count,), generator=generator)
    captions = torch.zeros(count, 2, length, dtype=torch.long)
    captions[:, :, 0] = SPECIALS["caption"]
    captions[:, :, 1] = 8 + word[:, None]
    captions[:, 1, 2] = 20  # the second paraphrase has one word more
    questions = torch.zeros(count, 1, length, dtype=torch.long)
    questions[:, 0, :4] = torch.stack(
        [torch.full((count,), 2), torch.full((count,), 21), torch.full((count,), 3), 8 + word], 1
    )
    codes = (word[:, None, None] + torch.arange(side)[:, None] * 2 + torch.arange(side)) % 16
    tensors = {"codes": codes, "captions": captions, "questions": questions}
    tensors |= {"answer_start": torch.full((count, 1), 3), "levels": word // 4}
    return TokenTable(tensors, VOCABULARY)


def tiny_config(folder: Path, *overrides: str) -> TrainConfig:
    """A run of a few small steps in `folder`."""
    return read_config(None, [*TINY, f"output={folder}", *overrides])


def write_documents(folder: Path, count: int = 12, grid: tuple[int, int] = (3, 3)) -> Path:
    """Document n is n + 5 text tokens with n % 4 pictures among them."""
    generator = np.random.default_rng(0)
    with ShardWriter(folder, 5) as writer:
        for number in range(count):
            tokens, starts = [8 + number], []
            for _ in range(number % 4):
                if len(tokens) + DOCUMENT_CODES >= DOCUMENT_LENGTH:
                    break
                starts.append(len(tokens))
                tokens += [*generator.integers(0, 16, DOCUMENT_CODES), 20]
            tokens += [0]
            writer.write(
                f"{number:03d}", {"tokens.npy": np.asarray(tokens), "images.npy": np.asarray(starts, np.int64)}
            )
    manifest = TokenManifest(VOCABULARY.to_dict(), 0, DOCUMENT_LENGTH, grid, dict(writer.written), kind="documents")
    manifest.save(folder)
    return folder
