"""Other tokens for a trained pipeline: rows are the means they should be, and what did not change draws the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from unidiff.models.transformer import MaskedTransformer
from unidiff.pipeline import UniDiffPipeline
from unidiff.pipelines.settings import PipelineSettings
from unidiff.tokens import Vocabulary
from unidiff.tokens.image.vq import CellVQModel, VQImageTokenizer
from unidiff.tokens.text import TextTokenizer
from unidiff.train.finetune import code_overlap, with_image_tokenizer, with_text_tokens

SCRIPT = Path(__file__).resolve().parents[2] / "training" / "change_tokens.py"


def tokenizer(codes: int, factor: int = 8) -> VQImageTokenizer:
    return VQImageTokenizer(CellVQModel(factor, codes, 4, 16, 1, (8,), (1,)))


@pytest.fixture
def pipe() -> UniDiffPipeline:
    torch.manual_seed(0)
    images = tokenizer(12)
    texts = TextTokenizer.train(["a red dog", "two blue cats on green"], 300)
    vocabulary = Vocabulary.unified(
        texts.size, images.codebook_size, {n: texts.special(n) for n in ("eos", "caption", "question", "answer")}
    )
    model = MaskedTransformer(vocabulary.size, hidden_size=16, num_layers=1, num_heads=2, head_bias=True)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return UniDiffPipeline(model, images, texts, PipelineSettings(vocabulary, 12, (2, 2)))


def pictures(n: int) -> torch.Tensor:
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def test_overlap_counts_the_cells_of_both() -> None:
    torch.manual_seed(1)
    old, new = tokenizer(6), tokenizer(40)
    batches = [pictures(5), pictures(8)]
    overlap = code_overlap(old, new, batches)
    pairs = [(int(b), int(a)) for x in batches for a, b in zip(old.encode(x).flatten(), new.encode(x).flatten())]
    used = torch.bincount(torch.tensor([a for _, a in pairs]), minlength=6) / len(pairs)
    for code in range(40):
        own = [a for b, a in pairs if b == code]
        expected = torch.bincount(torch.tensor(own), minlength=6) / len(own) if own else used
        torch.testing.assert_close(overlap[code], expected.float())


def test_same_tokenizer_changes_nothing(pipe: UniDiffPipeline) -> None:
    same = with_image_tokenizer(pipe, pipe.images, [pictures(64)])
    assert same.settings == pipe.settings
    used = pipe.images.encode(pictures(64)).unique() + pipe.settings.vocabulary.image[0]
    rows = torch.cat([torch.arange(pipe.settings.vocabulary.image[0]), used])
    torch.testing.assert_close(same.transformer.embed_tokens.weight[rows], pipe.transformer.embed_tokens.weight[rows])


def test_other_tokenizer_draws_and_reads(pipe: UniDiffPipeline, tmp_path: Path) -> None:
    torch.manual_seed(2)
    other = tokenizer(20)
    before = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    changed = with_image_tokenizer(pipe, other, [pictures(64)])
    vocabulary = changed.settings.vocabulary
    assert vocabulary.size == pipe.settings.vocabulary.size + 8 and vocabulary.image_size == 20
    start = vocabulary.image[0]
    overlap = code_overlap(pipe.images, other, [pictures(64)])
    for name in ("embed_tokens.weight", "output_weight", "output_bias"):
        new, old = changed.transformer.state_dict()[name], before[name]
        torch.testing.assert_close(new[:start], old[:start])
        torch.testing.assert_close(new[start:], overlap @ old[start:])
    assert all(torch.equal(value, before[name]) for name, value in pipe.transformer.state_dict().items())
    changed.save_pretrained(tmp_path / "changed")
    again = UniDiffPipeline.from_pretrained(tmp_path / "changed")
    again.set_progress_bar_config(disable=True)
    assert int(again.text_to_image("a red dog", generator=0, output_type="pt").ids.max()) < vocabulary.size
    assert isinstance(again.caption(pictures(1), generator=0).texts[0], str)


def test_added_words_start_as_their_pieces(pipe: UniDiffPipeline) -> None:
    words = [" zebra", "quokka"]
    changed = with_text_tokens(pipe, words)
    old, new = pipe.settings.vocabulary, changed.settings.vocabulary
    assert new.text_size == old.text_size + 2 and new.image_size == old.image_size
    weights, before = changed.transformer.embed_tokens.weight, pipe.transformer.embed_tokens.weight
    for word in words:
        (number,) = changed.texts.encode(word)
        assert number >= old.text_size
        torch.testing.assert_close(weights[number], before[pipe.texts.encode(word)].mean(0))
    torch.testing.assert_close(weights[new.mask_id :], before[old.mask_id :])
    sentence = "a quokka and a zebra, two zebras"
    assert changed.texts.decode(changed.texts.encode(sentence)) == sentence
    assert pipe.texts.size == old.text_size and len(pipe.texts.encode(" zebra")) > 1


def test_bad_input(pipe: UniDiffPipeline) -> None:
    with pytest.raises(ValueError, match="4 pixels per code, the old one 8"):
        with_image_tokenizer(pipe, tokenizer(8, factor=4), [pictures(1)])
    with pytest.raises(ValueError, match="no images were given"):
        with_image_tokenizer(pipe, tokenizer(8), [])
    with pytest.raises(ValueError, match="none twice"):
        with_text_tokens(pipe, ["new", "new"])
    with pytest.raises(ValueError, match="is one token already"):
        with_text_tokens(pipe, ["a"])


def test_command(pipe: UniDiffPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "model")
    command = [sys.executable, str(SCRIPT)]
    done = subprocess.run(
        [*command, "text", tmp_path / "model", tmp_path / "more", "--add", " zebra"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(UniDiffPipeline.from_pretrained(tmp_path / "more").texts.encode(" zebra")) == 1
    done = subprocess.run(
        [*command, "image", tmp_path / "model", tmp_path / "gone", tmp_path / "x"], capture_output=True, text=True
    )
    assert done.returncode == 2 and "--emoji" in done.stderr and not (tmp_path / "x").exists()
