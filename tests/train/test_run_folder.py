"""What a run finds in its folder: exports that a kill left behind, runs of another kind, and what must not be replaced."""

from __future__ import annotations

import shutil

import pytest
from folder_trees import tree
from killed_tokenizer import config as tokenizer_config
from safetensors.torch import load_file
from train_fixtures import tiny_config, tiny_table

from unidiff.train.image_tokenizer.trainer import train_image_tokenizer
from unidiff.train.trainer import Trainer

pytestmark = pytest.mark.training
WEIGHTS = "diffusion_pytorch_model.safetensors"


class Killed(BaseException):
    """The end of a process, wherever it is."""


def train(folder, *overrides: str) -> None:
    config = tiny_config(folder, "steps=4", "checkpoint.every=2", *overrides)
    Trainer(config, *tiny_table().split(8)).train()


@pytest.mark.parametrize("name", ["model", "model-best"])
def test_an_export_that_a_kill_prevented_is_made_by_the_next_start(tmp_path, name):
    best = ["logging.validate_every=4", "checkpoint.best=joint_nelbo"]
    train(tmp_path / "whole", *best)
    trainer = Trainer(tiny_config(tmp_path / "cut", "steps=4", "checkpoint.every=2", *best), *tiny_table().split(8))
    export = trainer.export

    def export_or_die(folder) -> None:
        if trainer.state.step == 4 and folder.name == name:
            raise Killed
        export(folder)

    trainer.export = export_or_die
    with pytest.raises(Killed):
        trainer.train()
    train(tmp_path / "cut", *best)
    for one in ("model", "model-best"):
        assert (tmp_path / "cut" / one / WEIGHTS).read_bytes() == (tmp_path / "whole" / one / WEIGHTS).read_bytes()


def test_a_finished_run_exports_in_the_precision_that_is_asked_for(tmp_path):
    train(tmp_path)
    train(tmp_path, "checkpoint.export_dtype=float32")
    assert {str(value.dtype) for value in load_file(tmp_path / "model" / WEIGHTS).values()} == {"torch.float32"}


@pytest.mark.parametrize("gone", ["folder", "content"])
def test_a_model_without_its_checkpoints_is_not_replaced(tmp_path, gone):
    train(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    if gone == "content":
        (tmp_path / "checkpoints").mkdir()
    before = tree(tmp_path)
    with pytest.raises(ValueError, match="holds a model and no checkpoint to go on from; name another output="):
        train(tmp_path)
    assert tree(tmp_path) == before


def test_a_file_in_the_place_of_the_checkpoints_is_said_before_anything_changes(tmp_path):
    train(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "checkpoints").write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(ValueError, match="is a file where the run puts its checkpoints; move it"):
        train(tmp_path)
    assert tree(tmp_path) == before


def test_a_checkpoint_under_the_name_of_another_step_is_noticed(tmp_path):
    train(tmp_path)
    (tmp_path / "checkpoints" / "step-00000004").rename(tmp_path / "checkpoints" / "step-00000006")
    (tmp_path / "checkpoints" / "latest").write_text("step-00000006\n")
    with pytest.raises(ValueError, match=r"is of step 4, as its state\.json says: .*; step-00000002 is whole"):
        train(tmp_path)


def test_runs_of_another_kind_are_told_apart(tmp_path):
    train(tmp_path / "model")
    train_image_tokenizer(tokenizer_config(tmp_path / "images", steps=1))
    with pytest.raises(ValueError, match="holds checkpoints of an image tokenizer's training; name another"):
        train(tmp_path / "images")
    shutil.rmtree(tmp_path / "model" / "model")
    with pytest.raises(ValueError, match="holds checkpoints of a model's training; name another"):
        train_image_tokenizer(tokenizer_config(tmp_path / "model", steps=1))
