"""The MM-DiT on its own: heads, grids, rows of a batch, rotary tables, saving, refusals."""

from __future__ import annotations

import pytest
import torch
from muddit_parts import MODEL, tiny_model

from unidiff.models.block import WholeView
from unidiff.models.mmdit import MMDiT
from unidiff.models.mmdit_blocks import axis_tables
from unidiff.models.parts import RotaryTables, rotate


def inputs(rows: int = 3, grid: tuple[int, int] = (4, 6), length: int = 5) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(7)
    codes = torch.randint(MODEL["vocab_size"], (rows, *grid), generator=g)
    text = torch.randn(rows, length, MODEL["text_dim"], generator=g)
    pooled = torch.randn(rows, MODEL["pooled_dim"], generator=g)
    micro = torch.rand(rows, 5, generator=g) * 512
    return codes, text, pooled, micro, torch.rand(rows, generator=g)


@torch.no_grad()
def test_a_row_in_a_batch_equals_the_row_alone_and_one_time_serves_all_rows():
    model = tiny_model()
    batch = inputs()
    together = model(*batch)
    for row in range(3):
        alone = model(*(part[row : row + 1] for part in batch))
        torch.testing.assert_close(alone.image[0], together.image[row], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(alone.text[0], together.text[row], atol=1e-5, rtol=1e-5)
    shared = model(*batch[:4], batch[4][:1])
    each = model(*batch[:4], batch[4][:1].expand(3))
    torch.testing.assert_close(shared.image, each.image)
    assert (shared.image[1] - together.image[1]).abs().max() > 1e-3, "time has no effect"


@torch.no_grad()
def test_heads_can_be_sliced():
    model = tiny_model()
    features = model.features(*inputs())
    assert features.image.shape == (3, 4, 6, 24) and features.text.shape == (3, 5, 24)
    torch.testing.assert_close(model.image_head(features.image, 3, 9), model.image_head(features.image)[..., 3:9])
    torch.testing.assert_close(model.text_head(features.text, 40), model.text_head(features.text)[..., 40:])
    half = tiny_model().to(torch.bfloat16)
    assert half(*inputs()).image.dtype == torch.float32


@torch.no_grad()
def test_every_input_reaches_both_heads():
    model = tiny_model()
    base = inputs(rows=1)
    before = model(*base)
    for place in range(5):
        changed = list(base)
        changed[place] = (base[place] + 1) % MODEL["vocab_size"] if place == 0 else base[place] + 1.0
        after = model(*changed)
        assert (after.image - before.image).abs().max() > 1e-4 and (after.text - before.text).abs().max() > 1e-4


def test_without_downsampling_any_grid_works_and_blocks_see_every_code():
    model = tiny_model(downsample=False)
    assert model(*inputs(grid=(3, 5))).image.shape == (3, 3, 5, MODEL["codebook_size"])
    assert len(model.rotary(2, (3, 5)).cos) == 17


def test_a_new_model_learns_and_its_blocks_start_as_identities():
    torch.manual_seed(0)
    model = MMDiT(**MODEL)
    text, image = torch.randn(2, 3, 24), torch.randn(2, 6, 24)
    condition = model.condition(*inputs(rows=2)[2:])
    after = model.double_blocks[0](text, image, condition, WholeView(model.rotary(3, (4, 6))))
    assert torch.equal(after[0], text) and torch.equal(after[1], image)
    assert torch.equal(model.single_blocks[0](text, condition, WholeView(model.rotary(3, (0, 0)))), text)
    output = model(*inputs())
    (output.image.logsumexp(-1).sum() + output.text.logsumexp(-1).sum()).backward()
    silent = {n for n, p in model.named_parameters() if p.grad is None}
    assert not silent, silent
    assert model.single_blocks[0].ada_ln.linear.weight.grad.abs().max() > 0


def test_rotary_turns_by_differences_of_each_axis():
    g = torch.Generator().manual_seed(0)
    positions = torch.tensor([[0, 0, 0], [0, 2, 1], [0, 5, 3], [1, 1, 1]])
    q, k = torch.randn(2, 4, 1, 12, generator=g, dtype=torch.float64)

    def scores(of_queries: RotaryTables, of_keys: RotaryTables) -> torch.Tensor:
        return rotate(q, of_queries)[:, 0] @ rotate(k, of_keys)[:, 0].mT

    for axis in range(3):
        moved = positions.clone()
        moved[:, axis] += 3
        plain, shifted = (axis_tables(p, (4, 4, 4), dtype=torch.float64) for p in (positions, moved))
        torch.testing.assert_close(scores(shifted, shifted), scores(plain, plain))
        assert (scores(shifted, plain) - scores(plain, plain)).abs().max() > 1e-3
    tables = axis_tables(positions, (4, 4, 4))
    assert torch.equal(tables.cos[1, 0, 4:8], torch.tensor([2.0, 2.0, 0.02, 0.02], dtype=torch.float64).cos().float())


def test_saves_and_loads(tmp_path):
    model = tiny_model(text_vocab_size=None, adapter_dim=9)
    model.save_pretrained(tmp_path)
    back = MMDiT.from_pretrained(tmp_path)
    assert all(torch.equal(back.state_dict()[k], v) for k, v in model.state_dict().items())
    assert tuple(back.config.rope_axes) == MODEL["rope_axes"]
    codes, _, *rest = inputs()
    output = back(codes, torch.randn(3, 5, 9), *rest)
    assert output.text is None
    with pytest.raises(ValueError, match="predicts images only"):
        back.text_head(torch.zeros(1, 24))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(rope_axes=(4, 4, 6)), "sum to head_dim = 12"),
        (dict(rope_axes=(5, 3, 4)), "three even numbers"),
        (dict(codebook_size=20), "below vocab_size = 20"),
        (dict(num_heads=0), "num_heads is 0"),
    ],
)
def test_bad_configurations_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        MMDiT(**{**MODEL, **change})


def test_bad_inputs_are_refused():
    model = tiny_model()
    codes, text, pooled, micro, time = inputs()
    with pytest.raises(ValueError, match="4x5 codes cannot be halved"):
        model(codes[:, :, :5], text, pooled, micro, time)
    with pytest.raises(ValueError, match=r"expected a grid \[B, H, W\]"):
        model(codes.flatten(1), text, pooled, micro, time)
    with pytest.raises(ValueError, match="3 images, 2 texts and 3 pooled"):
        model(codes, text[:2], pooled, micro, time)
