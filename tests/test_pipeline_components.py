"""Every pipeline class gives its parts to another one, which shares their weights and does the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from muddit_parts import write_folder
from released_pipelines import write_chat, write_pictures
from tiny_pipeline import tiny_pipeline

from unidiff.pipeline import UniDiffPipeline
from unidiff.pipelines.muddit import MudditPipeline
from unidiff.pipelines.released import ReleasedPipeline
from unidiff.pipelines.released_folder import load_released_pipeline


def released(folder: Path, kind: str):
    if kind == "muddit":
        write_folder(folder / "512")
        return MudditPipeline.from_folder(folder / "512")
    if kind in ("mmada", "lumina"):
        return load_released_pipeline(folder, vocabulary=write_pictures(folder, kind))
    write_chat(folder, kind)
    return load_released_pipeline(folder)


@pytest.mark.parametrize("kind", ["mmada", "lumina", "llada", "dream", "muddit"])
def test_released_pipelines(tmp_path, kind):
    pipe = released(tmp_path, kind)
    if kind == "lumina":
        pipe = pipe.sized(8, 4)
    for again in (type(pipe).from_pipe(pipe), type(pipe)(**pipe.components)):
        assert again is not pipe and again.components.keys() == pipe.components.keys()
        for name, part in pipe.components.items():
            assert again.components[name] is part or again.components[name] == part
        if kind != "muddit":
            assert again.transformer is pipe.transformer and again.grid == pipe.grid
            assert again.fixed_size == pipe.fixed_size
        else:
            assert again.image_size == pipe.image_size
    if kind == "llada":
        asked = [p.chat("a red fox", max_text_tokens=4, generator=0).ids for p in (pipe, again)]
        assert torch.equal(*asked)


def test_classes_do_not_mix(tmp_path):
    chat, ours = released(tmp_path, "llada"), tiny_pipeline()
    for cls, pipe in (
        (UniDiffPipeline, chat),
        (ReleasedPipeline, ours),
        (MudditPipeline, ours),
        (MudditPipeline, chat),
    ):
        with pytest.raises(ValueError, match=f"got a {type(pipe).__name__}; expected a {cls.__name__}"):
            cls.from_pipe(pipe)
    with pytest.raises(TypeError, match="unexpected argument 'text'; did you mean 'texts'"):
        ReleasedPipeline.from_pipe(chat, text=1)
