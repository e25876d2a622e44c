"""UniDisc's network against the reference's outputs: key map, rotary tables, hidden states, logits, SUBS."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from golden import golden_cases
from reference.batches import unidisc_batch
from reference.subs import subs_log_probs
from safetensors.torch import load_file
from torch import Tensor

from unidiff.decoding import ModalityDecoding, Sampler, SamplerConfig, draw
from unidiff.decoding.commit import base
from unidiff.decoding.draw import gather_positions
from unidiff.families.family import named_vocabulary
from unidiff.families.unidisc import UNIDISC
from unidiff.families.unidisc.rows import unidisc_interleaved, unidisc_sampler
from unidiff.models.transformer import MaskedTransformer, image_spans
from unidiff.tokens import Vocabulary

TOLERANCE = dict(atol=5e-5, rtol=1e-5)
INPUTS = {
    *("x0", "input_ids", "modality", "attention_mask", "sample_ids", "sigma"),
    *("text_only_input_ids", "text_only_modality"),
}
OBJECTIVE = ("t", "move_indices", "as_config.")  # the training objective: compared by the objective's golden tests


def read_config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def forward_file(folder: Path) -> dict[str, Tensor]:
    (path,) = folder.glob("forward*.safetensors")
    return load_file(path)


@pytest.mark.golden
@pytest.mark.parametrize("folder", golden_cases("unidisc", having="weights.safetensors"))
def test_every_weight_maps_both_ways(folder):
    weights = load_file(folder / "weights.safetensors")
    for prefix in ("", "module.", "_orig_mod.", "module._orig_module."):
        nested = {"model": {prefix + name: value for name, value in weights.items()}}
        model, _ = UNIDISC.load(nested if prefix else weights, read_config(folder))
        back = UNIDISC.export(model)
        assert set(back) == set(weights)
        assert all(torch.equal(back[name], value) for name, value in weights.items())


@pytest.mark.golden
@pytest.mark.parametrize("folder", golden_cases("unidisc", having="weights.safetensors"))
@torch.no_grad()
def test_forward_matches_the_reference(folder):
    stored, config = forward_file(folder), read_config(folder)
    model, vocabulary = UNIDISC.load(load_file(folder / "weights.safetensors"), config)
    samples = stored.get("sample_ids")
    batch = unidisc_batch(stored["input_ids"], stored["modality"], stored.get("attention_mask"), samples)
    assert (samples is not None) == unidisc_interleaved(config)
    assert (batch.attention_mask() is None) == (samples is None), "padding takes part in attention unless packed"
    hidden: dict[str, Tensor] = {}
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda _m, _a, output, name=f"hidden.{i}": hidden.update({name: output}))
    time = stored.get("sigma")
    conditions = []
    if model.embed_time is not None:
        model.embed_time.register_forward_hook(lambda _m, _a, output: conditions.append(output))
    ours = {"logits": model(batch, time)}
    ours |= {name: value for name, value in hidden.items() if name in stored}
    ours |= rotary(model, batch, stored)
    if conditions:
        ours["cond"] = conditions[0]
    if "text_only_input_ids" in stored:
        text = unidisc_batch(stored["text_only_input_ids"], stored["text_only_modality"])
        ours["text_only_logits"] = model(text, time[: text.shape[0]])
    for name, value in ours.items():
        torch.testing.assert_close(value, stored[name], **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")
    compared = set(ours)
    if "log_probs" in stored:  # the reference's -1e6 offsets stand for -inf
        actual = subs_log_probs(model, batch, vocabulary, time)
        torch.testing.assert_close(actual.exp(), stored["log_probs"].exp(), **TOLERANCE)
        assert torch.equal(actual.isneginf(), stored["log_probs"] < -1e5)
        compared.add("log_probs")
    rest = {n for n in set(stored) - compared - INPUTS if not n.startswith(OBJECTIVE)}
    assert not rest, f"stored tensors that nothing compares: {sorted(rest)}"


def rotary(model, batch, stored) -> dict[str, Tensor]:
    """The stored half tables, from ours: text rows by index, image rows by row and column."""

    def tables(rows, modality):
        return half_tables(model, rows, modality)

    out: dict[str, Tensor] = {}
    if "rope_cos" in stored:
        index = torch.zeros(len(stored["rope_cos"]), 3, dtype=torch.long)
        index[:, 0] = torch.arange(len(index))
        out["rope_cos"], out["rope_sin"] = tables(index, 0)
    if "rope.txt_cos" in stored:
        index = torch.zeros(len(stored["rope.txt_cos"]), 3, dtype=torch.long)
        index[:, 0] = torch.arange(len(index))
        out["rope.txt_cos"], out["rope.txt_sin"] = tables(index, 0)
        row = int((stored["modality"] == 1).any(1).nonzero()[0])
        out["rope.img_cos"], out["rope.img_sin"] = tables(batch.positions[row][stored["modality"][row] == 1], 1)
    return out


def half_tables(model, positions, modality):
    """cos and sin of the first half of a head, `[L, head_dim / 2]`, for one row of one modality."""
    made, _ = model.position_tables(positions[None], torch.full((1, len(positions)), modality))
    half = made.cos.shape[-1] // 2
    return made.cos[0, :, 0, :half], made.signed_sin[0, :, 0, half:]


@pytest.mark.golden
@pytest.mark.parametrize(
    "folder",
    [
        p
        for p in golden_cases("unidisc", having="weights.safetensors")
        if p.values[0] and (p.values[0] / "rope.safetensors").is_file()
    ],
)
def test_every_image_size_has_its_own_rotary_table(folder):
    stored, config = load_file(folder / "rope.safetensors"), read_config(folder)
    with torch.device("meta"):
        model = MaskedTransformer(**UNIDISC.settings(config))
    compared = set()
    for name in sorted(key.removesuffix(".rows") for key in stored if key.endswith(".rows")):
        rows, image = stored[f"{name}.rows"], name.startswith("img")
        count = int(name.removeprefix("img")) if image else int(rows.max()) + 1
        batch = unidisc_batch(torch.zeros(1, count, dtype=torch.long), torch.full((1, count), int(image)))
        made = half_tables(model, batch.positions[0], int(image))
        for part, value in zip(("cos", "sin"), made, strict=True):
            torch.testing.assert_close(value[rows], stored[f"{name}.{part}"], **TOLERANCE)
        compared |= {f"{name}.{part}" for part in ("rows", "cos", "sin")}
    assert compared == set(stored)


class Replayed:
    """`draw.choose` with the stored codes, ranked by log p + 4.5 t Gumbel."""

    def __init__(self, stored: dict[str, Tensor], targets: Tensor, vocabulary: Vocabulary, steps: int) -> None:
        self.stored, self.open, self.vocabulary, self.steps = stored, targets, vocabulary, steps
        self.step = 0

    def __call__(self, values, is_real, settings, u, noise, blend) -> draw.Choice:
        logits = blend(values)
        index, _ = gather_positions(self.open, logits.shape[1])
        codes, gumbel = (self.stored[f"traj_maskgit.{n}.{self.step}"].gather(1, index) for n in ("pred_code", "gumbel"))
        token = torch.where(is_real, codes - self.vocabulary.image[0], 0)
        p = logits.double().softmax(-1).gather(-1, token[..., None])[..., 0]
        t = torch.linspace(1, 1e-5, self.steps + 1)[self.step]
        self.step += 1
        return draw.Choice(token, p, p.log() + 4.5 * t * gumbel, torch.ones((), dtype=torch.bool))

    def look(self, step, state) -> None:
        self.open = state.open


@pytest.mark.golden
@pytest.mark.parametrize(
    "folder",
    [
        p
        for p in golden_cases("unidisc", having="weights.safetensors")
        if p.values[0] and (p.values[0] / "sampling.safetensors").is_file()
    ],
)
def test_the_sampler_makes_the_references_maskgit_run(folder, monkeypatch):
    """The one sampler, guided by a ramp, with the reference's quotas, codes and noise: the same state after each pass."""
    stored = load_file(folder / "sampling.safetensors")
    model, vocabulary = UNIDISC.load(load_file(folder / "weights.safetensors"), read_config(folder))
    steps = int(stored["traj_maskgit.num_steps"])
    given = stored["unmask_t2i"].bool()
    batch = unidisc_batch(stored["x0"], stored["modality"]).replace(given=given)
    replayed = Replayed(stored, batch.targets, vocabulary, steps)
    monkeypatch.setattr(draw, "choose", replayed)
    schedule = stored["traj_maskgit.schedule"].long()
    monkeypatch.setattr(base, "quota", lambda *about: schedule.gather(1, about[3][:, None].clamp_max(steps - 1))[:, 0])
    image = ModalityDecoding(steps=steps)
    config = SamplerConfig(image=image, guidance=unidisc_sampler(guidance=3.0).guidance)
    sampler = Sampler(model, vocabulary, config)
    out = sampler(batch, torch.zeros(len(given), dtype=torch.long), callback=replayed.look, record=True)
    assert replayed.step == steps
    for i in range(steps):
        assert torch.equal(out.trajectory[i + 1], stored[f"traj_maskgit.x.{i}"]), f"pass {i}"
    assert torch.equal(out.batch.ids, stored["traj_maskgit.final"])


def test_interleaved_samples_keep_to_themselves():
    """Positions restart, images are counted in their sample, padding is invisible, and each defect has its sentence."""
    modality = torch.cat((torch.zeros(2), torch.ones(256), torch.zeros(2), torch.ones(256), torch.zeros(3))).long()[
        None
    ]
    samples = torch.tensor([[0] * 258 + [1] * 258 + [-1] * 3])
    ids = torch.zeros_like(samples)
    batch = unidisc_batch(ids, modality, sample_ids=samples)
    assert batch.positions[0, [0, 2, 257, 258, 260], 0].tolist() == [0, 2, 257, 0, 2]
    assert image_spans(batch.positions, modality).number.max() == 0
    assert not batch.valid[0, -3:].any() and batch.given[0, -3:].all() and not batch.given[0, :-3].any()
    one = unidisc_batch(ids, modality, sample_ids=torch.where(samples >= 0, 0, -1))
    spans = image_spans(one.positions, modality)
    assert spans.number[0, [2, 257, 258, 260, 515]].tolist() == [0, 0, 0, 1, 1]
    assert spans.side[0, [1, 2, 260]].tolist() == [1, 16, 16]
    with pytest.raises(ValueError, match="image of 4x4 codes; expected a side of"):
        unidisc_batch(ids[:, :16], torch.ones_like(ids[:, :16]), sample_ids=torch.zeros_like(ids[:, :16]))


def test_released_sizes_and_vocabularies():
    """Parameter counts of the released models, from configurations alone."""
    base = dict(norm_type="rms", qk_norm=True, modality_embed=True, sandwich_normalization=True, full_attention=True)
    sizes = {
        (2048, 24, 16, True, 16384): 1.407e9,
        (1024, 24, 16, False, 8192): 384e6,
        (768, 12, 12, False, 8192): 147e6,
    }
    for (hidden, blocks, heads, rope_2d, codes), expected in sizes.items():
        model = dict(base, hidden_size=hidden, n_blocks=blocks, n_heads=heads, rope_2d=rope_2d)
        config = {"model": dict(model, text_vocab_size=32001, image_vocab_size=codes), "unrelated": {"key": 1}}
        with torch.device("meta"):
            network = MaskedTransformer(**UNIDISC.settings(config))
        assert sum(p.numel() for p in network.parameters()) == pytest.approx(expected, rel=5e-3)
        name = "unidisc-vq16" if codes == 16384 else "unidisc-magvit"
        assert UNIDISC.vocabulary(config) == named_vocabulary(name)


def test_missing_keys_take_upstream_defaults():
    kwargs = UNIDISC.settings({"model": {"text_vocab_size": 5, "image_vocab_size": 3, "linear_factor": None}})
    assert (kwargs["norm"], kwargs["qk_norm"], kwargs["sandwich_norm"], kwargs["rope"]) == (
        "layer",
        "none",
        False,
        "1d",
    )
    assert kwargs["rope_linear_factor"] == 1.0 and not kwargs["time_conditioning"] and kwargs["vocab_size"] == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(full_attention=False), "autoregressive"),
        (dict(use_pretrained_img_emb=True), "use_pretrained_img_emb"),
        (dict(norm_type="batch"), "norm_type"),
        (dict(image_vocab_size=None), "neither vocab_size nor model.image_vocab_size"),
    ],
)
def test_other_networks_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        UNIDISC.settings({"model": {"text_vocab_size": 5, "image_vocab_size": 3, **change}})


def test_images_must_be_square():
    ids = torch.zeros(1, 7, dtype=torch.long)
    with pytest.raises(ValueError, match="run of 5 image tokens"):
        unidisc_batch(ids, torch.tensor([[0, 0, 1, 1, 1, 1, 1]]))
    batch = unidisc_batch(ids, torch.tensor([[1, 1, 1, 1, 0, 0, 1]]))
    assert batch.positions[0, :, 1].tolist() == [0, 0, 1, 1, 0, 0, 0]
    assert batch.positions[0, :, 2].tolist() == [0, 1, 0, 1, 0, 0, 0]
