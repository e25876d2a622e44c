"""Training of a dual model: its loss, what its batches hold, and a run from settings to a pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from train_fixtures import TINY, VOCABULARY, tiny_table

from unidiff import UniDiffPipeline
from unidiff.diffusion.flow import flow_error, logit_normal, noisy_latents
from unidiff.models.trained_on import TASKS
from unidiff.tokens import Modality, Vocabulary
from unidiff.tokens.image.vq import CellVQModel, VQImageTokenizer
from unidiff.tokens.text import TextTokenizer
from unidiff.train.config import ObjectiveConfig, read_config
from unidiff.train.data.source import TokenTable
from unidiff.train.data.tasks import TaskMixer
from unidiff.train.dual import DualNLL, build_dual, scaled_vectors, validate_dual
from unidiff.train.pretrain import pretrain
from unidiff.train.trainer import Trainer

SIZES = (
    "model={num_layers: 1, num_heads: 2, head_dim: 8, text_size: 8, text_layers: 1, text_heads: 2, text_ffn_size: 8}"
)
MIX = [
    "tasks.generate.weight=1",
    "tasks.text_to_image={weight: 1, dropout: 0.25}",
    "tasks.caption={weight: 1, loss: elbo, dropout: 0.5}",
    "tasks.answer.weight=1",
    "tasks.text.weight=1",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 16 codes of 2 x 2 pixels."""
    torch.manual_seed(0)
    model = CellVQModel(
        2, codebook_size=16, code_dim=4, encoder_width=8, encoder_depth=1, decoder_widths=(8,), decoder_depths=(1,)
    )
    folder = tmp_path_factory.mktemp("codes")
    model.save_pretrained(folder)
    return folder


def config_of(folder: Path, tokenizer: Path, *more: str) -> Any:
    base = [line for line in TINY if not line.startswith("model=")]
    own = ["network=dual", SIZES, *MIX, f"tokenizer.image={tokenizer}", "logging.sample_every=0", f"output={folder}"]
    return read_config(None, [*base, *own, *more])


def test_the_error_of_a_velocity_is_that_of_the_picture():
    """(x_s - s v - x0)^2 = s^2 (v - (e - x0))^2."""
    g = torch.Generator().manual_seed(0)
    x0, noise, v = (torch.randn(5, 3, 2, 2, generator=g, dtype=torch.float64) for _ in range(3))
    level = torch.rand(5, generator=g, dtype=torch.float64)
    wide = level[:, None, None, None]
    error = flow_error(v, noisy_latents(x0, noise, level), x0, level)
    torch.testing.assert_close(error, wide**2 * (v - (noise - x0)) ** 2)
    assert torch.allclose(flow_error(noise - x0, noisy_latents(x0, noise, level), x0, level), torch.zeros(()).double())


def test_levels_are_logit_normal():
    u = (torch.arange(20_000).double() + 0.5) / 20_000
    logits = torch.logit(logit_normal(u, 0.3, 1.5))
    assert abs(float(logits.mean()) - 0.3) < 1e-3 and abs(float(logits.std()) - 1.5) < 1e-2
    ends = logit_normal(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert bool(((ends > 0) & (ends < 1)).all())


def test_latents_are_the_codes_vectors_of_unit_variance(tokenizer: Path):
    images = VQImageTokenizer.from_pretrained(tokenizer)
    vectors, scale = scaled_vectors(images)
    assert abs(float(vectors.std()) - 1) < 1e-5
    torch.testing.assert_close(vectors[3] / scale, images.model.codebook[3])


def batch_of(tokenizer: Path, folder: Path, task: str) -> tuple[DualNLL, Any]:
    config = config_of(folder, tokenizer)
    model = build_dual(config, tiny_table())
    nll = DualNLL(model, VOCABULARY, 64, image_weight=2.0)
    mixer = TaskMixer(tiny_table(), config.tasks, ObjectiveConfig(), 0)
    micro = mixer.of(torch.arange(32), TASKS.index(task))
    return nll, nll.ready(micro, torch.device("cpu"))


@pytest.mark.parametrize("task", TASKS)
def test_what_a_batch_hides(tokenizer: Path, tmp_path: Path, task: str):
    nll, batch = batch_of(tokenizer, tmp_path, task)
    clean, image = batch.clean.batch, batch.clean.batch.modality == Modality.IMAGE
    drawn, written = (clean.targets & image).any(1), (clean.targets & ~image).any(1)
    assert torch.equal(batch.level > 0, drawn)
    if task == "generate":  # as much noise as there are hidden words
        torch.testing.assert_close(batch.level.double(), batch.clean.rate, atol=1e-6, rtol=0)
    if task == "text":
        assert len(batch.absent) == 32 and not len(batch.present)
    assert bool((batch.noisy.masked & image)[drawn].sum(1).eq(9).all())  # the whole picture is noisy
    assert not bool((batch.noisy.masked & image & ~clean.targets).any())
    hidden = batch.noisy.batch.ids == VOCABULARY.mask_id
    if task != "generate":  # there few words may be hidden, or none
        assert bool((hidden & ~image)[written].any(1).all())
    shown = batch.noisy.batch.ids[image].view(32, -1)[batch.present]
    assert bool((shown != VOCABULARY.image_mask).all())  # codes of latents, never [MASK]
    value = nll(batch)
    assert value.shape == clean.shape and bool(torch.isfinite(value).all())
    assert bool((value[~batch.noisy.masked] == 0).all())


def test_the_loss_is_both_parts_over_all_targets(tokenizer: Path, tmp_path: Path):
    nll, batch = batch_of(tokenizer, tmp_path, "generate")
    torch.manual_seed(1)
    loss, values, _ = nll.loss(batch, batch.clean.batch.targets.sum())
    image = batch.clean.batch.modality == Modality.IMAGE
    text = (values * batch.clean.weight)[~image].sum()
    expected = (text + 2.0 * values[image].sum()) / batch.clean.batch.targets.sum()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(p.grad is not None for p in nll.model.parameters())


def test_validation_repeats_itself(tokenizer: Path, tmp_path: Path):
    nll, _ = batch_of(tokenizer, tmp_path, "caption")
    first, second = (validate_dual(nll, tiny_table(), 16, 2, size) for size in (8, 5))
    assert first.keys() == {f"{n}{e}" for n in ("flow_loss", "caption_nelbo", "answer_nelbo") for e in ("", "_error")}
    for name, value in first.items():
        assert abs(value - second[name]) < 1e-4 * max(1, abs(value))


def test_a_run_learns_stops_and_goes_on(tokenizer: Path, tmp_path: Path):
    """In two parts it ends with the weights of one run."""
    weights = []
    for name, parts in (("whole", (12,)), ("parts", (5, 12))):
        for steps in parts:
            config = config_of(
                tmp_path / name,
                tokenizer,
                f"steps={steps}",
                "schedule.name=constant",
                "precision=fp32",
                "optimiser.name=muon",
            )
            trainer = Trainer(config, tiny_table(), tiny_table(16, seed=1))
            trainer.train()
        weights.append(trainer.model.state_dict())
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


@pytest.mark.parametrize(
    ("setting", "match"),
    [
        ("logging.sample_every=5", "logging.sample_every"),
        ("lora.rank=2", "lora.rank"),
        ("model.vocab_size=5", "comes from the data"),
        ("model.depth=5", "depth"),
        ("tokenizer.image=''", "tokenizer.image"),
    ],
)
def test_settings_that_do_not_go_together(tokenizer: Path, tmp_path: Path, setting: str, match: str):
    with pytest.raises(ValueError, match=match):
        Trainer(config_of(tmp_path, tokenizer, setting), tiny_table())


def test_from_settings_to_a_pipeline(tokenizer: Path, tmp_path: Path):
    texts = TextTokenizer.train(["a red dot", "a blue dot", "what is it? a dot"], 300)
    texts.save_pretrained(tmp_path / "words")
    table = tiny_table()
    vocabulary = Vocabulary.unified(
        texts.size, 16, {n: texts.special(n) for n in ("eos", "caption", "question", "answer")}
    )
    TokenTable(table.tensors, vocabulary).save(tmp_path / "train.safetensors")
    more = (
        f"data.train={tmp_path / 'train.safetensors'}",
        f"tokenizer.text={tmp_path / 'words'}",
        "steps=2",
        "data.validation_rows=8",
    )
    assert pretrain(config_of(tmp_path / "run", tokenizer, *more), {}) == 0
    pipe = UniDiffPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe.text_to_image(["dot", "a"], generator=[1, 2], steps=3, output_type="pt")
    assert drawn.images.shape == (2, 3, 6, 6) and drawn.codes.shape == (2, 3, 3)
    told = pipe.caption(drawn.images, generator=[1, 2])
    assert len(told.texts) == 2 and not bool((told.ids == pipe.vocabulary.mask_id).any())
    assert pipe.answer(drawn.images[0], "a", generator=1).text_ids
    both = pipe.generate(generator=3, steps=4)
    assert not both.notes and both.images[0].size == (6, 6)
    assert pretrain(config_of(tmp_path / "run", tokenizer, *more), {}) == 0  # again: the same folder
