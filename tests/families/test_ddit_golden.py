"""D-DiT against the reference: every stored tensor of the golden set is compared."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from ddit_parts import ddit_sets, golden_network, golden_t5, golden_vae, read_config
from diffusers import FlowMatchEulerDiscreteScheduler
from reference.times import importance_times, sample_times
from safetensors.torch import load_file
from torch import Tensor

from unidiff.decoding.flow import FlowDraw, dynamic_shift, guided
from unidiff.diffusion import get_schedule, mask_tokens
from unidiff.diffusion.flow import flow_error, noisy_latents, trained_times
from unidiff.families.ddit import DDIT, ddit_vocabulary
from unidiff.families.ddit.denoiser import DualDenoiser
from unidiff.families.ddit.upstream import substituted, write_words
from unidiff.models.block import Condition, WholeView
from unidiff.models.dual_mmdit import DualMMDiT, position_table
from unidiff.models.mmdit_blocks import plain_norm
from unidiff.tokens import Modality, Span, TokenBatch

pytestmark = pytest.mark.golden
EVERY = pytest.mark.parametrize("folder", ddit_sets())
TEXTS = ("text_pretrain", "text_sft", "text_only")


def close(actual: Tensor, expected: Tensor, name: str, tolerance: float = 2e-5) -> None:
    """Within tolerance * (1 + |value|)."""
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance, msg=lambda m: f"{name}: {m}")


class Case:
    """The tensors of a file below a name."""

    def __init__(self, stored: dict[str, Tensor], name: str) -> None:
        self.stored, self.name = stored, name

    def __getitem__(self, key: str) -> Tensor:
        return self.stored[f"{self.name}.{key}"]


@EVERY
def test_every_weight_maps_both_ways(folder: Path):
    weights = dict(load_file(folder / "transformer.safetensors").items())
    back = DDIT.export(golden_network(folder))
    assert back.keys() == weights.keys() and all(torch.equal(back[name], weights[name]) for name in weights)


@EVERY
@torch.no_grad()
def test_forward(folder: Path):
    stored, model, t5 = load_file(folder / "forward.safetensors"), golden_network(folder), golden_t5(folder)
    c = model.config
    table = position_table(c.num_heads * c.head_dim, c.position_side, c.sample_size // c.patch_size)
    close(table, stored["pos_embed_sincos"], "pos_embed_sincos")
    close(t5(stored["t5.ids"]), stored["t5.emb"], "t5.emb")
    layers = t5.encoder(input_ids=stored["t5.ids"], output_hidden_states=True).hidden_states
    for number in range(t5.encoder.config.num_layers):
        close(layers[number], stored[f"t5.hidden{number}"], f"t5.hidden{number}")
    for name in ("image", "text_only"):
        case = Case(stored, name)
        latents = case["latents"] if name == "image" else None
        text, time = case["text_emb"], case["timestep"]
        vector, words = model.time_features(time), model.read_text(text)
        close(vector, case["temb"], f"{name}.temb")
        close(words, case["text_tokens"], f"{name}.text_tokens")
        image = model.null_image.expand(len(text), -1, -1)
        if latents is not None:
            image = model.read(model.patches(latents))
            close(image, case["image_tokens"], f"{name}.image_tokens")
        for number, block in enumerate(model.double_blocks):
            words, image = block(words, image, Condition(torch.nn.functional.silu(vector)), WholeView(None))
            close(words, case[f"block{number}.text"], f"{name}.block{number}.text")
            close(image, case[f"block{number}.image"], f"{name}.block{number}.image")
        out = model(latents, text, time)
        close(model.text_head(out.text), case["text_logits"], f"{name}.text_logits")
        close(model.text_head(plain_norm(words)), case["text_logits"], f"{name}.text_logits")
        close(out.image, case["velocity" if latents is not None else "image_hidden"], name)


@EVERY
def test_times(folder: Path):
    stored, config = load_file(folder / "losses.safetensors"), read_config(folder)["training"]
    schedule, low = get_schedule("loglinear"), config["sampling_eps"]
    for name, mode in (("sample_t", "stratified"), ("sample_t_importance", "importance")):
        u = stored[f"{name}.u"].double()
        t = sample_times(len(u), u, low=low)
        if mode == "importance":
            least = -torch.expm1(-torch.tensor(1e-3, dtype=torch.float64))
            t = importance_times(t, schedule, (float(least), float(schedule.mask_rate(torch.ones(()).double()))))
        torch.testing.assert_close(t.float(), stored[f"{name}.t"], atol=1e-6, rtol=1e-5)


class Losses:
    """Everything that the reference's two losses compute, with the draws that were stored."""

    def __init__(self, folder: Path) -> None:
        self.stored, self.config = load_file(folder / "losses.safetensors"), read_config(folder)
        self.model, self.t5 = golden_network(folder), golden_t5(folder)
        self.vocabulary = ddit_vocabulary(self.config["transformer"])

    def image(self) -> Tensor:
        case, config = Case(self.stored, "image"), self.config["training"]
        u = torch.sigmoid(config["logit_mean"] + config["logit_std"] * case["normal_u"])
        close(u, case["u"], "u", 1e-6)
        times = trained_times(u)
        level = times / self.config["training_scheduler"]["num_train_timesteps"]
        assert torch.equal(times, case["timesteps"])
        close(level, case["sigmas"], "sigmas", 1e-6)
        x = noisy_latents(case["x0"], case["noise"], level)
        close(x, case["x_t"], "x_t")
        close(self.t5(case["caption_ids"]), case["caption_emb"], "caption_emb")
        close(self.t5(case["null_ids"]), case["null_emb"], "null_emb")
        dropped = case["u_drop"] < config["text_embedding_drop"]
        text = torch.where(dropped[:, None, None], case["null_emb"], case["caption_emb"])
        close(text, case["text_emb_used"], "text_emb_used")
        velocity = self.model(x, text, times).image
        close(velocity, case["velocity"], "velocity", 5e-5)
        error = flow_error(velocity, x, case["x0"], level).flatten(1).mean(1)
        close(error, case["loss_per_sample"], "loss_per_sample", 1e-4)
        close(error.mean(), case["loss"], "loss", 1e-4)
        return error.mean()

    def text(self, name: str) -> Tensor:
        case, ids = Case(self.stored, name), self.vocabulary
        schedule, t = get_schedule("loglinear"), case["t"]
        drawn = sample_times(len(t), case["u_t"].double(), low=self.config["training"]["sampling_eps"])
        torch.testing.assert_close(drawn.float(), t, atol=1e-6, rtol=0)
        wide = t.double()
        for key, value in (
            ("move_chance", schedule.mask_rate(wide)),
            ("sigma", schedule.sigma(wide)),
            ("dsigma", schedule.dsigma(wide)),
            ("weight", schedule.weight(wide)),
        ):
            torch.testing.assert_close(value.float(), case[key], atol=1e-6, rtol=1e-4)
        x0, label = case["x0_ids"], case["label_mask"].bool()
        batch = TokenBatch.from_spans([[Span.text(row, ~own)] for row, own in zip(x0, label, strict=True)])
        noisy = mask_tokens(batch, schedule.mask_rate(wide), ids, case["u_mask"].double())
        assert torch.equal(noisy.batch.ids, case["x_t"])
        text = self.t5(noisy.batch.ids)
        close(text, case["text_emb"], "text_emb")
        latents = None if name == "text_only" else case["latents"]
        logits = self.model.text_head(self.model(latents, text, torch.zeros(len(t))).text)
        close(logits, case["text_logits"], "text_logits", 5e-5)
        start, stop = ids.text
        forbidden = torch.zeros(stop - start, dtype=torch.bool)
        forbidden[list(ids.forbidden(Modality.TEXT))] = True
        logp = logits.masked_fill(forbidden, -1e6).log_softmax(-1).gather(-1, x0[..., None])[..., 0]
        logp = torch.where(noisy.masked, logp, 0)
        close(logp, case["logp_x0"], "logp_x0", 1e-4)
        per_token = -logp * schedule.weight(wide).float()[:, None]
        close(per_token * label, case["loss_per_token"] * label, "loss_per_token", 1e-4)
        loss = (per_token * label).sum() / label.numel()
        close(loss, case["loss"], "loss", 1e-4)
        return loss

    def check_gradients(self, loss: Tensor, name: str) -> None:
        case = Case(self.stored, name)
        self.model.zero_grad()
        loss.backward()
        named = DDIT.export(Gradients(self.model))
        order = self.config["gradient_parameter_order"]
        norms = torch.stack([named[key].norm() for key in order])
        expected = case["grad_norms"]
        torch.testing.assert_close(norms, expected, atol=2e-4 * float(expected.max()), rtol=1e-3)
        close(norms.norm(), case["grad_norm_total"], "grad_norm_total", 2e-4)
        for key in (k.removeprefix(f"{name}.grad.") for k in list(self.stored) if k.startswith(f"{name}.grad.")):
            stored = case[f"grad.{key}"]
            torch.testing.assert_close(named[key], stored, atol=2e-4 * float(stored.abs().max()) + 1e-9, rtol=0)
        if name.startswith("total"):
            clip = min(1.0, self.config["training"]["grad_clip"] / float(norms.norm()))
            assert abs(clip - float(case["clip_factor"])) < 1e-4


def Gradients(model: DualMMDiT) -> DualMMDiT:
    """The same network with its gradients in place of its weights, 0 where there are none."""
    with torch.device("meta"):
        copy = DualMMDiT.from_config(dict(model.config))
    named = dict(model.named_parameters())
    values = {n: named[n].grad if n in named else v for n, v in model.state_dict().items()}
    zeros = {n: torch.zeros_like(model.state_dict()[n]) for n in values}
    copy.load_state_dict({n: zeros[n] if v is None else v for n, v in values.items()}, assign=True)
    return copy


@EVERY
def test_losses_and_gradients(folder: Path):
    losses, weights = Losses(folder), read_config(folder)["training"]
    cases: dict[str, Any] = {"image": losses.image, **{n: (lambda n=n: losses.text(n)) for n in TEXTS}}
    for stage in ("pretrain", "sft"):
        weight = weights[f"caption_training_weight_{stage}"]
        cases[f"total_{stage}"] = lambda s=stage, w=weight: losses.image() + w * losses.text(f"text_{s}")
    for name, loss in cases.items():
        value = loss()
        if name.startswith("total"):
            close(value, losses.stored[f"{name}.loss"], name, 1e-4)
        losses.check_gradients(value, name)


def schedulers(stored: dict[str, Tensor]) -> set[str]:
    return {name.rpartition(".")[0] for name in stored if name.startswith("schedule.") and name.endswith(".sigmas")}


@EVERY
def test_schedules(folder: Path):
    """By diffusers' scheduler, of which the loop of pictures makes its own."""
    stored = load_file(folder / "t2i.safetensors")
    for name in schedulers(stored):
        if name == "schedule.train":
            scheduler = FlowMatchEulerDiscreteScheduler(**read_config(folder)["training_scheduler"])
            close(scheduler.timesteps, stored[f"{name}.timesteps"], name, 1e-4)
            close(scheduler.sigmas[:1000], stored[f"{name}.sigmas"], name, 1e-6)
            close(trained_times(torch.arange(1000) / 1000 + 5e-4), stored[f"{name}.timesteps"], name, 1e-4)
            continue
        kind, length = name.split(".")[1], int(name.rpartition(".n")[2])
        if kind == "dynamic":
            tokens = int(name.split(".seq")[1].split(".")[0])
            scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
            mu = dynamic_shift(scheduler.config, tokens)
            close(torch.tensor(mu), stored[f"schedule.dynamic.seq{tokens}.mu"], "mu", 1e-6)
            scheduler.set_timesteps(length, mu=mu)
        else:
            scheduler = FlowMatchEulerDiscreteScheduler(shift=float(kind.removeprefix("shift")))
            draw = FlowDraw(scheduler, torch.zeros(1, 1, 2, 2), length)
            scheduler = draw.scheduler
            close(scheduler.timesteps, stored[f"{name}.timesteps"], name, 1e-5)
        close(scheduler.sigmas, stored[f"{name}.sigmas"], name, 1e-5)


@EVERY
@torch.no_grad()
def test_pictures(folder: Path):
    stored, config = load_file(folder / "t2i.safetensors"), read_config(folder)
    model, vae, t5 = golden_network(folder), golden_vae(folder), golden_t5(folder)
    for kind in ("prompt", "negative"):
        close(t5(stored[f"{kind}_ids"]), stored[f"{kind}_emb"], kind)
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config["scheduler"])
    for name, settings in config["t2i_cases"].items():
        case, scale = Case(stored, name), settings["guidance_scale"]
        steps = settings["num_inference_steps"]
        draw = FlowDraw(scheduler, case["latents0"], steps, sigmas=settings["sigmas"])
        close(draw.scheduler.timesteps, case["timesteps"], f"{name}.timesteps", 1e-5)
        close(draw.scheduler.sigmas, case["sigmas"], f"{name}.sigmas", 1e-5)
        text = stored["prompt_emb"]
        text = torch.cat((stored["negative_emb"], text)) if scale > 1 else text
        for step in range(steps):
            streams = len(text) // len(draw.latents)
            raw = model(draw.latents.repeat(streams, 1, 1, 1), text, draw.time.repeat(streams)).image
            close(raw, case["velocity_raw"][step], f"{name}.velocity_raw", 1e-4)
            velocity = guided(raw, scale) if scale > 1 else raw
            close(velocity, case["velocity"][step], f"{name}.velocity", 1e-4)
            draw.advance(velocity)
            close(draw.latents, case["latents"][step], f"{name}.latents", 1e-4)
        assert draw.left == 0
        close(vae.pixels_of(draw.latents), case["image"], f"{name}.image", 5e-4)


@EVERY
@torch.no_grad()
def test_words(folder: Path):
    """The reference's loop by `compat="upstream"`, with its draws."""
    stored, config = load_file(folder / "i2t.safetensors"), read_config(folder)
    model, vae, t5 = golden_network(folder), golden_vae(folder), golden_t5(folder)
    vocabulary = ddit_vocabulary(config["transformer"])
    denoiser = DualDenoiser(model, t5, vocabulary)
    for name, settings in config["i2t_cases"].items():
        case, mask = Case(stored, name), config["mask_index"]
        posterior = vae.model.encode(case["image"]).latent_dist
        close(posterior.mean, case["posterior_mean"], f"{name}.posterior_mean", 1e-4)
        close(posterior.logvar, case["posterior_logvar"], f"{name}.posterior_logvar", 1e-4)
        latents = vae.scaled(posterior.mean + posterior.std * case["posterior_noise"])
        close(latents, case["latents"], f"{name}.latents", 1e-4)
        x = torch.where(case["known"], case["ids"], mask)
        assert torch.equal(x, case["x_init"])
        patches = model.patches(latents)
        batch = TokenBatch.from_spans(
            [
                [Span.text(row, own), Span.continuous(picture, Modality.IMAGE)]
                for row, own, picture in zip(x, case["known"], patches, strict=True)
            ]
        )

        def predict(ids: Tensor, batch: TokenBatch = batch) -> Tensor:
            rows = torch.cat((ids, batch.ids[:, ids.shape[1] :]), dim=1), batch.modality, batch.positions
            hidden = denoiser.hidden(*rows, features=batch.features)[:, : ids.shape[1]]
            return substituted(denoiser.head(hidden, *vocabulary.text), ids, vocabulary.mask_id)

        steps, u = settings["num_inference_steps"], case["u"]
        close(torch.linspace(1, settings["eps"], steps + 1), case["t"], f"{name}.t", 1e-6)
        out = write_words(predict, x, mask, steps, lambda step, u=u: u[step], settings["sampler"], settings["eps"])
        assert torch.equal(torch.stack(out.states), case["x"])
        assert out.evaluations == case["nfe"].tolist() and len(out.probabilities) == int(case["nfe_total"])
        assert torch.equal(out.final, case["final"])
        close(out.probabilities[0], case["p_x0_first"], f"{name}.p_x0_first", 1e-4)
        close(out.probabilities[-1], case["p_x0_last"], f"{name}.p_x0_last", 1e-4)
        close(out.weights[0], case["weights_first"], f"{name}.weights_first", 1e-5)
        close(out.weights[-1], case["weights_last"], f"{name}.weights_last", 1e-5)
        for before, after in pairwise([x, *out.states]):
            assert torch.equal(before[before != mask], after[before != mask])
