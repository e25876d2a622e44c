"""Every pipeline class gives its parts to another one, which shares their weights and does the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from muddit_parts import write_folder
from released_pipelines import write_chat, write_pictures
from tiny_pipeline import tiny_pipeline

from unidiff.pipeline import UniDiffPipeline
from unidiff.pipelines.released import load_released_parts


def released(folder: Path, kind: str):
    if kind == "muddit":
        write_folder(folder / "512")
        return UniDiffPipeline.from_pretrained(folder / "512").sized(8, 8)
    if kind in ("mmada", "dynin", "lumina"):
        return UniDiffPipeline(*load_released_parts(folder, vocabulary=write_pictures(folder, kind)))
    write_chat(folder, kind)
    return UniDiffPipeline.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["mmada", "dynin", "lumina", "llada", "dream", "muddit"])
def test_released_pipelines(tmp_path, kind):
    pipe = released(tmp_path, kind)
    if kind == "lumina":
        pipe = pipe.sized(8, 4)
    for again in (type(pipe).from_pipe(pipe), type(pipe)(**pipe.components)):
        assert again is not pipe and again.components.keys() == pipe.components.keys()
        for name, part in pipe.components.items():
            assert again.components[name] is part or again.components[name] == part
        assert again.transformer is pipe.transformer and again.layout is pipe.layout
    if kind == "llada":
        asked = [p.chat("a red fox", max_text_tokens=4, generator=0).ids for p in (pipe, again)]
        assert torch.equal(*asked)


def test_classes_do_not_mix(tmp_path):
    chat, ours = released(tmp_path, "llada"), tiny_pipeline()

    class Own(UniDiffPipeline):
        pass

    assert Own.from_pipe(Own.from_pipe(Own(**ours.components))).transformer is ours.transformer
    for pipe in (chat, ours):
        with pytest.raises(ValueError, match="got a UniDiffPipeline; expected a Own"):
            Own.from_pipe(pipe)
    with pytest.raises(TypeError, match="has no argument 'layot'; did you mean 'layout'"):
        UniDiffPipeline.from_pipe(chat, layot=1)
    with pytest.raises(ValueError, match="llada is not saved as a pipeline; `unidiff convert` writes"):
        chat.save_pretrained(tmp_path / "new")
