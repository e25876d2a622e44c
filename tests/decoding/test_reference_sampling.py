"""Reverse steps and whole runs of MDLM and UniDisc, against every tensor of their golden sampling files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from golden import golden_folders
from reference.batches import mdlm_batch, unidisc_batch
from reference.reverse_steps import (
    analytic_weights,
    clean_probabilities,
    maskgit_step,
    race,
    reverse_step,
    reverse_weights,
    rounded_quotas,
    short_nucleus,
    subs_score,
)
from safetensors.torch import load_file
from torch import Tensor

from unidiff.decoding.config import Guidance
from unidiff.decoding.draw import Blend
from unidiff.diffusion.schedules import Schedule, get_schedule
from unidiff.families.mdlm import MDLM
from unidiff.families.unidisc import UNIDISC
from unidiff.tokens import Modality

pytestmark = pytest.mark.golden
MDLM_SCHEDULES = {
    "loglinear": "loglinear",
    "cosine": "mdlm_cosine",
    "cosinesqr": "mdlm_cosine_squared",
    "linear": "sigma_linear",
    "geometric": "geometric",
}


class Tensors:
    """A golden file that remembers which tensors a test has read."""

    def __init__(self, path: Path) -> None:
        self._data = load_file(path)
        self._unread = set(self._data)

    def __getitem__(self, name: str) -> Tensor:
        self._unread.discard(name)
        return self._data[name]

    def __contains__(self, name: str) -> bool:
        return name in self._data

    def names(self, pattern: str) -> list[re.Match]:
        return [m for m in (re.fullmatch(pattern, name) for name in sorted(self._data)) if m]

    def assert_all_read(self) -> None:
        assert not self._unread, f"stored tensors that nothing was compared with: {sorted(self._unread)}"


def files(name: str, file: str) -> list:
    found = [pytest.param(f, id=f.name) for f in golden_folders(name) if (f / file).is_file()]
    return found or [pytest.param(None, marks=pytest.mark.skip(reason=f"golden/{name} holds no {file}"))]


# ---------------------------------------------------------------------------------------------------------------- MDLM


class Mdlm:
    """The golden network with and without time conditioning, as p(x0 | x_t, t)."""

    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        weights = load_file(folder / "weights.safetensors")
        self.models = {}
        for tc in (0, 1):
            model, self.vocabulary = MDLM.load(weights, {**self.config, "time_conditioning": bool(tc)})
            self.models[tc] = model.eval()
        self.mask_id = self.vocabulary.mask_id
        noise = dict(self.config["noise"])
        kind = noise.pop("type")
        wanted = {"sigma_min", "sigma_max"} if kind in ("linear", "geometric") else set()
        self.schedule: Schedule = get_schedule(MDLM_SCHEDULES[kind], **{k: noise[k] for k in wanted})

    def p_x0(self, ids: Tensor, t: Tensor | float, tc: int) -> Tensor:
        sigma = self.schedule.sigma(torch.as_tensor(t, dtype=torch.float32)).expand(len(ids))
        with torch.no_grad():
            logits = self.models[tc].forward(mdlm_batch(ids), sigma)
        return clean_probabilities(logits, ids, torch.zeros_like(ids), self.vocabulary)

    def step(self, kind: str, ids: Tensor, p_x0: Tensor, t: Tensor, dt: Tensor | float) -> Tensor:
        """Unnormalised weights of one reverse step."""
        s = t - dt
        sigma_t, sigma_s = self.schedule.sigma(t), self.schedule.sigma(s)
        if kind == "ddpm_cache":
            return reverse_weights(p_x0, t, s, self.mask_id)
        if kind == "ddpm":
            return reverse_weights(p_x0, self.schedule.mask_rate(t), self.schedule.mask_rate(s), self.mask_id)
        score = subs_score(p_x0, ids, sigma_t, self.mask_id)
        if kind == "analytic":
            return analytic_weights(score, ids, sigma_t - sigma_s, self.mask_id)
        assert kind == "analytic_denoise", f"the golden set names a step that this test does not know: {kind}"
        return analytic_weights(score, ids, sigma_t, self.mask_id, denoise=True)

    def draw(self, kind: str, ids: Tensor, weights: Tensor, u: Tensor) -> Tensor:
        return race(weights, u) if kind.startswith("analytic") else reverse_step(ids, weights, u, self.mask_id)


def check_mdlm_steps(mdlm: Mdlm, data: Tensors) -> None:
    ids, t, dt = data["step.x_t"], data["step.t"][0], data["step.dt"][0]
    torch.testing.assert_close(mdlm.p_x0(ids, t, 0), data["step.p_x0"], atol=1e-5, rtol=1e-4)
    for match in data.names(r"step\.(\w+)\.tc(\d)\.probs"):
        kind, tc = match[1], int(match[2])
        case = f"step.{kind}.tc{tc}"
        weights = mdlm.step(kind, ids, mdlm.p_x0(ids, t, tc), t, dt)
        torch.testing.assert_close(weights, data[f"{case}.probs"], atol=1e-4, rtol=1e-4)
        assert torch.equal(mdlm.draw(kind, ids, weights, data[f"{case}.u"]), data[f"{case}.x_next"]), case


def check_mdlm_trajectory(mdlm: Mdlm, data: Tensors, kind: str, tc: int) -> None:
    case = f"traj.{kind}.tc{tc}"
    steps, eps = mdlm.config["sampler_steps"], mdlm.config["sampler_eps"]
    times, dt = torch.linspace(1, eps, steps + 1), (1 - eps) / steps
    u = data[f"traj.{kind}.tc0.u"]
    ids = torch.full((1, data[f"{case}.x"].shape[1]), mdlm.mask_id)
    states, evaluations, calls, p_x0 = [], [], 0, None
    for i in range(steps):
        if p_x0 is None or kind != "ddpm_cache":
            p_x0 = mdlm.p_x0(ids, times[i], tc)
            calls += 1
        after = mdlm.draw(kind, ids, mdlm.step(kind, ids, p_x0, times[i], dt), u[i][None])
        if tc or not torch.equal(after, ids):
            p_x0 = None  # the reference reuses the prediction while nothing changes
        ids = after
        states.append(ids[0])
        evaluations.append(calls)
    last = mdlm.p_x0(ids, times[-1], tc)
    if kind == "analytic":
        ids = mdlm.draw("analytic_denoise", ids, mdlm.step("analytic_denoise", ids, last, times[-1], 0.0), u[-1][None])
    else:
        ids = last.argmax(-1)
    assert torch.equal(torch.stack(states).int(), data[f"{case}.x"]), case
    assert evaluations == data[f"{case}.nfe"].tolist(), case
    assert torch.equal(ids[0].int(), data[f"{case}.final"]), case


def check_mdlm_semi_autoregressive(mdlm: Mdlm, data: Tensors) -> None:
    settings = mdlm.config["semi_ar"]
    stride, dt = settings["stride_length"], settings["dt"]
    u = iter(data["semi_ar.u"])
    states, pieces, prefix, changes = [], [], None, 0
    for _ in range(settings["num_strides"] + 1):
        ids = torch.full((settings["n_samples"], mdlm.config["model"]["length"]), mdlm.mask_id)
        if prefix is not None:
            ids[:, :-stride] = prefix
        p_x0 = None
        for i in range(int(1 / dt) + 1):  # the last one is at t = 0 with a negative mask weight
            t = torch.tensor(1 - i * dt)
            p_x0 = mdlm.p_x0(ids, t, 0) if p_x0 is None else p_x0
            after = mdlm.draw("ddpm_cache", ids, mdlm.step("ddpm_cache", ids, p_x0, t, dt), next(u))
            if not torch.equal(after, ids):
                p_x0, changes = None, changes + 1
            ids = after
            states.append(ids)
        ids = mdlm.p_x0(ids, 0.0, 0).argmax(-1)
        pieces.append(ids[:, :stride])
        prefix = ids[:, stride:]
    final = torch.cat([*pieces, prefix], 1)
    ended = (final[:, 1:] == mdlm.config["eos_token_id"]).cumsum(1) > 0
    assert torch.equal(torch.stack(states).int(), data["semi_ar.x"])
    assert torch.equal(final.int(), data["semi_ar.final_ids"])
    assert changes == data["semi_ar.sampling_steps"].item()
    assert (~ended).sum(1).tolist() == data["semi_ar.sequence_lengths"].tolist()


@pytest.mark.parametrize("folder", files("mdlm", "samplers.safetensors"))
def test_mdlm_sampling(folder: Path) -> None:
    mdlm, data = Mdlm(folder), Tensors(folder / "samplers.safetensors")
    check_mdlm_steps(mdlm, data)
    for match in data.names(r"traj\.(\w+)\.tc(\d)\.x"):
        check_mdlm_trajectory(mdlm, data, match[1], int(match[2]))
    if data.names(r"semi_ar\.u"):
        check_mdlm_semi_autoregressive(mdlm, data)
    data.assert_all_read()


# ------------------------------------------------------------------------------------------------------------- UniDisc


class UniDisc:
    """The golden network with guidance, as p(x0 | x_t)."""

    def __init__(self, folder: Path, data: Tensors) -> None:
        config = json.loads((folder / "config.json").read_text())
        model, self.vocabulary = UNIDISC.load(load_file(folder / "weights.safetensors"), config)
        self.model = model.eval()
        self.modality = data["modality"]
        self.mask_id = self.vocabulary.mask_id

    def _logits(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            return self.model.forward(unidisc_batch(ids, self.modality))

    def p_x0(self, ids: Tensor, t: Tensor, given: Tensor, weight: float, constant: bool) -> Tensor:
        """`weight` is UniDisc's w: (1 + w) cond - w uncond, where uncond hides every given token."""
        logits = self._logits(ids)
        if weight:
            unconditional = self._logits(torch.where(given, self.mask_id, ids))
            guidance = Guidance(1 + weight, mode="constant" if constant else "ramp")
            logits = Blend(guidance.scale_at(Modality.IMAGE, t.expand(len(ids))))([logits, unconditional])
        return clean_probabilities(logits, ids, self.modality, self.vocabulary, carry_over=not weight)

    def masked(self, ids: Tensor) -> Tensor:
        return (ids == self.mask_id).sum(1)


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=1e-5)


def check_unidisc_step(net: UniDisc, data: Tensors, sampler: str, case: str) -> None:
    name = f"{sampler}.{case}"
    given = data["unmask_inpaint" if case.startswith("inpaint") else "unmask_t2i"].bool()
    ids, t = data[f"{name}.x_t"], data[f"{name}.t"]
    assert torch.equal(ids[given], data["x0"][given])  # the state holds the given tokens
    p_x0 = net.p_x0(ids, t, given, data[f"{name}.cfg"].item(), bool(data[f"{name}.cfg_constant"]))
    if sampler == "maskgit":
        schedule = data[f"{name}.schedule"]
        expected = torch.stack([rounded_quotas("arccos", n, schedule.shape[1]) for n in net.masked(ids).tolist()])
        assert torch.equal(expected, schedule)
        counts = schedule[:, 2]
        after = maskgit_step(
            ids, p_x0, data[f"{name}.pred_code"], data[f"{name}.gumbel"], 4.5 * t.item(), counts, net.mask_id
        )
        assert torch.equal(after, data[f"{name}.x_s"]), name
        return
    dt = data[f"{name}.dt"]
    rate = get_schedule("loglinear").mask_rate if sampler == "ddpm" else lambda x: x
    weights = reverse_weights(p_x0, rate(t), rate(t - dt), net.mask_id)
    close(weights, data[f"{name}.q_xs"])
    if f"{name}.p_x0" in data:
        close(p_x0, data[f"{name}.p_x0"])
    if f"{name}.u" in data:
        after = reverse_step(ids, weights, data[f"{name}.u"], net.mask_id)
        assert torch.equal(after, data[f"{name}.x_s"]), name


def data_start(net: UniDisc, data: Tensors, given: Tensor) -> Tensor:
    """The state at t = 1."""
    return torch.where(given, data["x0"], net.mask_id)


def check_unidisc_run(net: UniDisc, data: Tensors, sampler: str) -> None:
    name = f"traj_{sampler}"
    steps = int(data[f"{name}.num_steps"])
    times, dt = torch.linspace(1, 1e-5, steps + 1), (1 - 1e-5) / steps
    weight = 3.0 if sampler == "maskgit" else 0.0
    given = data["unmask_t2i" if sampler == "maskgit" else "unmask_inpaint"].bool()
    ids = data_start(net, data, given)
    if sampler == "maskgit":
        schedule = torch.stack([rounded_quotas("arccos", n, steps) for n in net.masked(ids).tolist()])
        assert torch.equal(schedule, data[f"{name}.schedule"])
    for i in range(steps):
        t = times[i]
        p_x0 = net.p_x0(ids, t, given, weight, constant=False)
        if sampler == "maskgit":
            tokens, gumbel = data[f"{name}.pred_code.{i}"], data[f"{name}.gumbel.{i}"]
            ids = maskgit_step(ids, p_x0, tokens, gumbel, 4.5 * t.item(), schedule[:, i], net.mask_id)
        else:
            ids = reverse_step(ids, reverse_weights(p_x0, t, t - dt, net.mask_id), data[f"{name}.u.{i}"], net.mask_id)
        ids = torch.where(given, data["x0"], ids)
        assert torch.equal(ids, data[f"{name}.x.{i}"]), (name, i)
    p_x0 = net.p_x0(ids, times[-1], given, weight, constant=False)
    final = torch.where(ids == net.mask_id, p_x0.argmax(-1), ids)
    assert torch.equal(final, data[f"{name}.final"]), name


@pytest.mark.parametrize("folder", files("unidisc", "sampling.safetensors"))
def test_unidisc_sampling(folder: Path) -> None:
    data = Tensors(folder / "sampling.safetensors")
    net = UniDisc(folder, data)
    for match in data.names(r"(ddpm_cache|ddpm|maskgit)\.(\w+)\.x_t"):
        check_unidisc_step(net, data, match[1], match[2])
    for match in data.names(r"traj_(\w+)\.final"):
        check_unidisc_run(net, data, match[1])
    for match in data.names(r"schedule\.(\w+)\.m(\d+)\.s(\d+)"):
        assert torch.equal(rounded_quotas(match[1], int(match[2]), int(match[3])), data[match[0]]), match[0]
    for match in data.names(r"nucleus\.p([\d.]+)_t([\d.]+)\.sorted_probs"):
        close(short_nucleus(data["nucleus.probs"], float(match[1]), float(match[2])), data[match[0]])
    for match in data.names(r"cfg_weight\.ramp([\d.]+)"):
        ramp = Guidance(1 + float(match[1]), mode="ramp").scale_at(Modality.IMAGE, data["cfg_weight.t"]) - 1
        close(ramp, data[match[0]])
    data.assert_all_read()
