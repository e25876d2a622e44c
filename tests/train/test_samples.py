"""Sample sheets: fixed prompts, one PNG per call, the same picture for the same weights, and tokenizers that do not fit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from train_fixtures import SPECIALS, VOCABULARY, tiny_config, tiny_table

from unidiff.train.data.samples import SheetSampler, sheet_sampler
from unidiff.train.trainer import Trainer


class GreyDecoder:
    """A picture whose grey value is the code."""

    factor, codebook_size = 8, VOCABULARY.image_size

    def decode(self, codes):
        assert (codes >= 0).all() and (codes < self.codebook_size).all()
        return (
            (codes.float() / self.codebook_size)[:, None]
            .expand(-1, 3, -1, -1)
            .repeat_interleave(8, 2)
            .repeat_interleave(8, 3)
        )


class LetterTokenizer:
    """One id per letter of `abcdefgh`."""

    size, eos_id = VOCABULARY.text_size, SPECIALS["eos"]

    def encode(self, text):
        return [8 + "abcdefgh".index(letter) for letter in text]

    def special(self, name):
        return SPECIALS[name]


def test_sheets_are_written_while_training_and_repeat_for_equal_weights(tmp_path):
    config = tiny_config(
        tmp_path, "steps=4", "logging.sample_every=2", "logging.sample_steps=3", "logging.prompts=[a,h,c]"
    )
    config_guided = tiny_config(
        tmp_path, "logging.sample_guidance=2", "logging.sample_steps=3", "logging.prompts=[a,h,c]"
    )
    table = tiny_table()
    sampler = SheetSampler(config, table, GreyDecoder(), LetterTokenizer(), tmp_path / "samples")
    trainer = Trainer(config, table, None, sampler)
    trainer.train()
    assert trainer.model.training
    names = sorted(p.name for p in (tmp_path / "samples").iterdir())
    assert names == ["step-00000002.png", "step-00000004.png"]
    trainer.model.eval()
    first, second = sampler(trainer.model, 10), sampler(trainer.model, 11)
    assert first.dtype == torch.uint8 and first.shape[0] == 3 and torch.equal(first, second)
    written = np.asarray(Image.open(tmp_path / "samples" / "step-00000010.png"))
    assert np.array_equal(written, first.permute(1, 2, 0).numpy())
    guided = SheetSampler(config_guided, table, GreyDecoder(), LetterTokenizer(), tmp_path / "guided")(trainer.model, 1)
    assert guided.shape == first.shape


def test_no_sheets_without_prompts_or_tokenizers_and_wrong_ones_are_refused(tmp_path):
    assert sheet_sampler(tiny_config(tmp_path, "logging.sample_every=5", "logging.prompts=[a]"), tiny_table()) is None
    wrong = GreyDecoder()
    wrong.codebook_size = 99
    with pytest.raises(ValueError, match="99 codes"):
        SheetSampler(tiny_config(tmp_path, "logging.prompts=[a]"), tiny_table(), wrong, LetterTokenizer(), tmp_path)
    missing = ["logging.sample_every=5", "logging.prompts=[a]", "tokenizer.image=/nowhere", "tokenizer.text=/nowhere"]
    with pytest.raises(FileNotFoundError, match="nowhere"):
        sheet_sampler(tiny_config(tmp_path, *missing), tiny_table())


def test_held_out_pictures_are_described_and_completed(tmp_path):
    texts = LetterTokenizer()
    texts.decode = lambda ids: "".join("abcdefgh"[i - 8] for i in ids if 8 <= i < 16)
    table = tiny_table()
    config = tiny_config(tmp_path, "steps=1", "logging.sample_steps=2")
    trainer = Trainer(config, table)
    trainer.model.eval()
    held_out = table.fetch(torch.arange(3))
    sampler = SheetSampler(config, table, GreyDecoder(), texts, tmp_path / "samples", held_out)
    assert sampler.prompts == [texts.decode(row.tolist()) for row in held_out.captions]
    blind = SheetSampler(config, table, GreyDecoder(), texts, tmp_path / "blind", held_out, sees=False)
    whole, part = sampler(trainer.model, 1), blind(trainer.model, 1)
    assert whole.shape[1] > part.shape[1] > sampler(trainer.model, 2).shape[1] / 3  # one line less, of three
    assert torch.equal(whole, sampler(trainer.model, 3))
