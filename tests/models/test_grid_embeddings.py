"""Learned vectors of image rows and columns."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from unidiff.models.transformer import MaskedTransformer
from unidiff.tokens import Modality
from unidiff.train.build import build_model
from unidiff.train.config import read_config


def _row(side: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two text tokens, then a picture of `side` x `side` equal codes: ids, modality, positions, one row each."""
    places = [(0, 0, 0), (1, 0, 0)] + [(2 + r * side + c, r, c) for r in range(side) for c in range(side)]
    modality = torch.tensor([[Modality.TEXT] * 2 + [Modality.IMAGE] * side * side])
    return torch.where(modality == Modality.IMAGE, 7, 3), modality, torch.tensor([places])


def _model(**changes) -> MaskedTransformer:
    torch.manual_seed(0)
    return MaskedTransformer(12, hidden_size=16, num_layers=1, num_heads=2, **changes)


def test_rows_and_columns_are_told_apart_and_text_is_left_alone() -> None:
    model = _model(grid_embeddings=3)
    torch.nn.init.normal_(model.embed_row.weight)
    torch.nn.init.normal_(model.embed_column.weight)
    ids, modality, positions = _row(3)
    x = model.embed(ids, modality, model.position_tables(positions, modality)[1])[0]
    bare = model.embed(ids, modality)[0]
    assert torch.equal(x[:2], bare[:2])
    added = (x - bare)[2:].unflatten(0, (3, 3))
    expected = model.embed_row.weight[:, None] + model.embed_column.weight[None]
    torch.testing.assert_close(added, expected)


def test_a_larger_picture_is_refused() -> None:
    ids, modality, positions = _row(4)
    with pytest.raises(ValueError, match="4 rows or columns of tokens, the model knows 3"):
        _model(grid_embeddings=3).hidden(ids, modality, positions)


def test_warm_start_from_weights_without_them_changes_nothing(tmp_path) -> None:
    old = _model()
    torch.nn.init.normal_(old.blocks[0].attention.out.weight)
    save_file(old.state_dict(), tmp_path / "model.safetensors")
    size = ["model.hidden_size=16", "model.num_layers=1", "model.num_heads=2"]
    changes = [*size, f"checkpoint.init_from={tmp_path}"]
    new = build_model(read_config(None, [*changes, "model.grid_embeddings=3"]), 12)
    ids, modality, positions = _row(3)
    torch.testing.assert_close(new.hidden(ids, modality, positions), old.hidden(ids, modality, positions))
    with pytest.raises(ValueError, match="do not fit"):  # other missing weights are still refused
        build_model(read_config(None, [*changes, "model.qk_norm=head"]), 12)
