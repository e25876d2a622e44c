"""The MM-DiT against the reference implementation's outputs, with every stored intermediate; names both ways."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from muddit_parts import muddit_sets, read_config
from safetensors.torch import load_file
from torch import Tensor

from unidiff.families.muddit import MUDDIT
from unidiff.models import mmdit
from unidiff.models.mmdit import MMDiT

pytestmark = pytest.mark.golden
# stored name: our module. Blocks are found by number.
MODULES = {
    "cond_embed": "embed_pooled",
    "encoder_proj_layer_norm": "text_norm",
    "project_to_hidden": "enter",
    "project_from_hidden": "leave",
    "down_block": "down",
    "up_block": "up",
}
ARGUMENTS = ("hidden_states", "encoder_hidden_states", "pooled_projections", "micro_conds", "timestep")


def weight_sets(folder: Path) -> list[str]:
    names = [name for name in read_config(folder) if name.startswith("transformer")]
    assert {f"{n}.safetensors" for n in names} == {
        p.name for p in folder.glob("transformer*.safetensors") if not p.stem.endswith("_cases")
    }, "weights without a configuration, or the other way round"
    return names


def load(folder: Path, name: str) -> MMDiT:
    return MUDDIT.load(load_file(folder / f"{name}.safetensors"), read_config(folder)[name])[0]


def record(model: MMDiT) -> dict[str, Tensor]:
    """Outputs of the modules that the set stores, under its names, filled by the next pass."""
    seen: dict[str, Tensor] = {}

    def keep(name: str):
        def hook(_module, _inputs, output) -> None:
            parts = {name: output} if isinstance(output, Tensor) else {f"{name}.{i}": o for i, o in enumerate(output)}
            seen.update(parts)

        return hook

    for theirs, ours in MODULES.items():
        if (module := getattr(model, ours)) is not None:
            module.register_forward_hook(keep(theirs))
    for i, block in enumerate(model.double_blocks):
        block.register_forward_hook(keep(f"transformer_blocks.{i}"))
    for i, block in enumerate(model.single_blocks):
        block.register_forward_hook(keep(f"single_transformer_blocks.{i}"))
    model.condition_time.register_forward_hook(keep("time"))
    model.condition_pooled.register_forward_hook(keep("pooled"))
    return seen


@pytest.mark.parametrize("folder", muddit_sets())
def test_every_weight_maps_both_ways(folder):
    for name in weight_sets(folder):
        weights = load_file(folder / f"{name}.safetensors")
        for prefix in ("", "module.", "_orig_mod."):
            model, _ = MUDDIT.load({prefix + k: v for k, v in weights.items()}, read_config(folder)[name])
            back = MUDDIT.export(model)
            assert set(back) == set(weights)
            assert all(torch.equal(back[k], v) and back[k].dtype == v.dtype for k, v in weights.items())


def spread_of_rounding(model: MMDiT, inputs: list[Tensor]) -> float:
    """How far logits move when each frequency of the sinusoids moves by one unit in its last place.

    `exp` in float32 is right to about one such unit, a different one on every processor, and a time is multiplied by a
    thousand before it meets the frequency (twice where the reference's training script did it already).
    """
    plain, far = mmdit.sinusoid, 0.0
    whole = model(*inputs)
    for seed in range(8):

        def moved(values: Tensor, seed: int = seed) -> Tensor:
            half = mmdit.SINUSOID // 2
            steps = torch.randint(-1, 2, (half,), generator=torch.Generator().manual_seed(seed)).double()
            frequency = (torch.arange(half).double() * (-math.log(1e4) / half)).exp().float()
            angles = values.float()[..., None] * (frequency * (1 + steps * 2.0**-23)).float()
            return torch.cat((angles.cos(), angles.sin()), -1)

        try:
            mmdit.sinusoid = moved
            other = model(*inputs)
        finally:
            mmdit.sinusoid = plain
        far = max(far, *(float((a - b).abs().max()) for a, b in zip(other, whole) if a is not None))
    return far


@pytest.mark.parametrize("folder", muddit_sets())
@torch.no_grad()
def test_forward_matches_the_reference(folder):
    stored = load_file(folder / "transformer_cases.safetensors")
    models = {name: load(folder, name) for name in weight_sets(folder)}
    compared, used = set(), set()
    for case in sorted({name.split(".")[0] for name in stored}):
        weights = f"transformer_{case}" if f"transformer_{case}" in models else "transformer"
        model = models[weights]
        used.add(weights)
        inputs = [stored[f"{case}.in.{name}"] for name in ARGUMENTS]
        seen = record(model)
        output = model(*inputs)
        seen = dict(seen)  # of this pass
        tolerance = max(1e-4, spread_of_rounding(model, inputs) / 2)
        assert tolerance < 0.3, "nothing would be compared: the logits' standard deviation is about 3"
        ours = {f"{case}.out.image_logits": output.image.permute(0, 3, 1, 2)}
        if output.text is not None:
            ours[f"{case}.out.text_logits"] = output.text
        text_length, grid = (
            inputs[1].shape[1],
            [n // model.cell_side for n in inputs[0].shape[1:]],
        )
        tables = model.rotary(text_length, inputs[0].shape[1:])
        signs = torch.tensor([-1.0, 1.0]).repeat(tables.cos.shape[-1] // 2)
        seen["pos_embed.0"], seen["pos_embed.1"] = tables.cos[:, 0], tables.signed_sin[:, 0] * signs
        if model.down is not None:  # cell by cell to a grid, channels first
            seen["down_block"] = seen["down_block"].unflatten(1, grid).permute(0, 3, 1, 2)
            seen["up_block"] = model.grid(seen["up_block"], inputs[0].shape[1:]).permute(0, 3, 1, 2)
        seen["time_text_embed"] = seen["time"] + seen["pooled"]
        ours |= {f"{case}.mid.{k}": v for k, v in seen.items() if f"{case}.mid.{k}" in stored}
        for name, value in ours.items():
            torch.testing.assert_close(value, stored[name], atol=tolerance, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
        compared |= set(ours)
        # positions are made from the grid here; the stored ones must be the same
        image_ids, text_ids = stored[f"{case}.in.img_ids"], stored[f"{case}.in.txt_ids"]
        expected = torch.cartesian_prod(torch.zeros(1), *(torch.arange(float(n)) for n in grid))
        assert torch.equal(image_ids, expected) and text_ids.shape == (text_length, 3) and not text_ids.any()
        compared |= {f"{case}.in.{name}" for name in (*ARGUMENTS, "img_ids", "txt_ids")}
    assert compared == set(stored), f"stored tensors that nothing compares: {sorted(set(stored) - compared)}"
    assert used == set(models)
